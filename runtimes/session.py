"""Sessions: one compiled graph, ready to run, behind one small protocol; and the table of backends.

A backend is one module in runtimes/backends (here) and one in exporter/compile (there); docs/adding-a-backend.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import DexportError
from runtimes.manifest import Graph
from runtimes.target import DEVICES, Target

Array = NDArray[Any]


class Session(Protocol):
    """One graph on one device."""

    max_batch: int | None  # the largest batch that one call takes; None: any

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph: arrays by input name, C-contiguous and of the graph's dtypes, to arrays by output name."""


@dataclass(frozen=True)
class Device:
    """A device that a runtime sees: its name in targets, its own full name, the precisions that it computes in."""

    name: str
    description: str
    precisions: tuple[str, ...]


class Backend(Protocol):
    """What a module in runtimes/backends offers."""

    EXTRA: str  # the pip extra that installs the runtime: ``pip install dexport[EXTRA]``

    def version(self) -> str | None:
        """The installed runtime's version, or None where it cannot be imported."""

    def devices(self) -> list[Device]:
        """The devices of this machine that the runtime can use."""

    def missing(self) -> str | None:
        """Why nothing can run here, in one line that says what to do; None where it can."""

    def open(self, file: Path, graph: Graph, device: str, threads: int | None, cache: Path | None) -> Session:
        """Open ``file``. ``threads``: None for all cores; ``cache``: folder for what a runtime compiles at load."""


def backend(name: str) -> Backend:
    """Return the backend module of this name; its runtime may still be missing."""
    if name not in DEVICES:
        raise DexportError(f"no backend {name!r}; there are {', '.join(DEVICES)}")
    module: Any = importlib.import_module(f"runtimes.backends.{name}")
    return module  # type: ignore[no-any-return]


def require(name: str) -> Backend:
    """Return the backend of this name if its runtime can be imported here."""
    found = backend(name)
    if found.version() is None:
        raise DexportError(f"the {name} runtime is not installed; run: pip install 'dexport[{found.EXTRA}]'")
    return found


def runs_here(target: Target) -> bool:
    """Whether this machine has a device that runs a target; "local" is whatever one there is."""
    here = [device.name for device in require(target.backend).devices()]
    return target.device in here or (target.device == "local" and bool(here))


def one_at_a_time(load: Callable[[str], Session]) -> Callable[[str], Session]:
    """Return an opener that lets go of a graph before it opens the next: memory for the largest is enough."""
    opened: dict[str, Session] = {}

    def open_graph(name: str) -> Session:
        if name not in opened:
            opened.clear()
            opened[name] = load(name)
        return opened[name]

    return open_graph


def check_inputs(graph: Graph, inputs: Mapping[str, Array]) -> None:
    """Raise DexportError unless ``inputs`` are what ``graph`` takes: names, dtypes, shapes, equal free dimensions."""
    wanted = {tensor.name: tensor for tensor in graph.inputs}
    if missing := [name for name in wanted if name not in inputs]:
        raise DexportError(f"{graph.kind}: input {missing[0]!r} is missing; it takes {', '.join(wanted)}")
    if unknown := [name for name in inputs if name not in wanted]:
        raise DexportError(f"{graph.kind}: there is no input {unknown[0]!r}; it takes {', '.join(wanted)}")
    sizes: dict[str, int] = {}  # what each free dimension is in this call
    for name, tensor in wanted.items():
        value = inputs[name]
        if value.dtype != np.dtype(tensor.dtype):
            raise DexportError(f"{graph.kind}: input {name!r} is {value.dtype}; it must be {tensor.dtype}")
        fits = len(value.shape) == len(tensor.shape) and all(
            size > 0 and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for size, dim in zip(value.shape, tensor.shape, strict=True)
        )
        if not fits:
            shape = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else str(dim) for dim in tensor.shape)
            raise DexportError(f"{graph.kind}: input {name!r} has shape {list(value.shape)}; it must be [{shape}]")


def run_batched(session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a batch of any size: in pieces where the session takes only ``max_batch`` at once."""
    batch = len(next(iter(inputs.values())))
    piece = session.max_batch or batch
    if batch <= piece:
        return session.run(inputs)
    parts = [
        session.run({name: np.ascontiguousarray(value[start : start + piece]) for name, value in inputs.items()})
        for start in range(0, batch, piece)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
