"""Compare every change of every class, and write docs/exactness.md; exit with 1 if anything is silently different.

python -m tests.exactness
python -m tests.exactness --every 10 --classes StableDiffusionPipeline,FluxPipeline
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import diffusers
import torch

from tests.exactness.compare import SUBJECTS, Outcome, compare, page
from tests.exactness.mutations import mutations

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"


def outcomes(number: int, every: int) -> list[tuple[str, str, Outcome]]:
    """The kind, the name and the outcome of each change of one class, or of every so many; none is kind ""."""
    torch.set_num_threads(1)
    subject = SUBJECTS[number]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        subject.make(checkpoint)
        found = [("", "as it is", compare(subject, checkpoint, None))]
        for index, mutation in enumerate(mutations(checkpoint)):
            if index % every == number % every:
                found.append((mutation.kind, mutation.name, compare(subject, checkpoint, mutation)))
    return found


def main() -> int:
    """Read the arguments, compare, and write the page if all was compared."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="of each class, every N-th change alone")
    parser.add_argument("--classes", default="", help="names with commas between; default: all")
    options = parser.parse_args()
    wanted = options.classes.split(",") if options.classes else [subject.pipeline for subject in SUBJECTS]
    chosen = [number for number, subject in enumerate(SUBJECTS) if subject.pipeline in wanted]
    found: dict[str, list[tuple[str, str, Outcome]]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(outcomes, chosen, [options.every] * len(chosen))
        for number, run in zip(chosen, runs, strict=True):
            name = SUBJECTS[number].pipeline
            found[name] = run
            counts = {what: sum(outcome.what == what for *_, outcome in run) for what in Outcome.KINDS}
            click.echo(f"{name}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
            for _, change, outcome in run:
                if outcome.what == Outcome.DIFFERENT:
                    click.echo(f"  {change}: {outcome.how}")
    if len(chosen) == len(SUBJECTS):
        PAGE.write_text(page(found, options.every, diffusers.__version__), encoding="utf-8")
    return int(any(outcome.what == Outcome.DIFFERENT for run in found.values() for *_, outcome in run))


if __name__ == "__main__":
    sys.exit(main())
