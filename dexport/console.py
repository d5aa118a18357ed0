"""What people see: progress on stderr, tables and figures on stdout; and JSON for machines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from runtimes.errors import Progress, silent

EVERY = 60.0  # seconds from one line of progress to the next, where there is no terminal


@contextlib.contextmanager
def working(quiet: bool = False) -> Iterator[Progress]:
    """Give a progress function that draws a bar on stderr where that is a terminal, and a line now and then elsewhere.

    While the work lasts, whatever a library prints goes to stderr too: stdout belongs to the result.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if quiet or sys.stderr is None:  # a daemon may have none
            yield silent
            return
        if not sys.stderr.isatty():
            yield _lines()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("starting", total=1.0)
            yield lambda what, share: bars.update(task, description=what, completed=share)


def _lines() -> Progress:
    """Progress for a log: one line every ``EVERY`` seconds, so none for what is done sooner."""
    last = time.monotonic()

    def say(what: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            click.echo(f"{share:4.0%}  {what}", err=True)

    return say


def print_json(value: Any) -> None:
    """Write ``value`` to stdout as JSON; frozen dataclasses become objects and paths strings."""
    text = json.dumps(value, default=_plain)
    value = json.loads(text, parse_constant=lambda name: None)  # JSON has no word for infinity: null
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Write a table to stdout; columns whose cells all begin with a digit or sign stand to the right.

    Where stdout is no terminal the table is as wide as it needs to be: no cell is cut for a width nobody has.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(title=Text(title, "bold") if title else None, title_justify="left", box=None, pad_edge=False)
    for index, head in enumerate(heads):
        cells = [row[index] for row in rows if row[index]]
        number = bool(cells) and all(cell[0].isdigit() or cell[0] in "-<≥" for cell in cells)
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(80, console.measure(table).maximum, _width(heads, rows)))
    console.print(table)


def _width(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    columns = zip(heads, *rows, strict=True)
    return sum(max(len(cell) for cell in column) + 2 for column in columns)


def size(count: int) -> str:
    """Bytes for people: ``26.3 MB``, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds(value: float) -> str:
    """A duration for people: ``1.24 s``, ``3.4 ms``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def duration(value: float) -> str:
    """A long duration for people: ``40 s``, ``7 min``, ``1.5 h``."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def shape(dims: Sequence[int | str]) -> str:
    """A tensor's shape: ``[batch, 4, 64, 64]``."""
    return "[" + ", ".join(str(dim) for dim in dims) + "]"
