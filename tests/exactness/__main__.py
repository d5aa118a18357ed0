"""Compare every change of every class, and write docs/exactness.md; exit with 1 if anything gives another image.

python -m tests.exactness
python -m tests.exactness --every 10 --jobs 1
python -m tests.exactness --classes StableDiffusionPipeline,FluxPipeline
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import diffusers
import torch

from tests.exactness.compare import Comparison, Outcome
from tests.exactness.page import Change, Sweep, page
from tests.exactness.subjects import SUBJECTS

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"


def sweep(number: int, every: int) -> Sweep:
    """Compare one class's checkpoint as it is, and each of its changes, or every so many."""
    torch.set_num_threads(1)
    subject = SUBJECTS[number]
    with Comparison.of(subject) as comparison:
        chosen = comparison.mutations[number % every :: every]
        changes = tuple(Change(one.kind, one.name, comparison.outcome(one)) for one in chosen)
        return Sweep(subject.pipeline, subject.task, comparison.as_it_is(), changes, len(comparison.mutations))


def main() -> int:
    """Read the arguments, compare, and write the page if all classes were compared."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="of each class, every N-th change alone; the page says so")
    parser.add_argument("--classes", default="", help="names with commas between, and no page; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many classes at a time")
    options = parser.parse_args()
    names = [subject.pipeline for subject in SUBJECTS]
    wanted = options.classes.split(",") if options.classes else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such class: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [number for number, name in enumerate(names) if name in wanted]
    sweeps: list[Sweep] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for done in pool.map(sweep, chosen, [options.every] * len(chosen)):
            sweeps.append(done)
            counts = ", ".join(f"{what} {count}" for what, count in done.counts().items())
            click.echo(f"{done.pipeline}: as it is {done.unchanged.what} {done.unchanged.how}; {counts}")
            for line in done.wrong():
                click.echo(f"  {line}")
    wrong = [done.pipeline for done in sweeps if done.unchanged.what != Outcome.SAME]
    if wrong:
        click.echo(f"not the same image without a change: {', '.join(wrong)}; {PAGE} was not written")
    elif len(chosen) < len(SUBJECTS):
        click.echo(f"not all classes were compared; {PAGE} was not written")
    else:
        PAGE.write_text(page(sweeps, options.every, diffusers.__version__), encoding="utf-8")
    return int(bool(wrong) or any(done.wrong() for done in sweeps))


if __name__ == "__main__":
    sys.exit(main())
