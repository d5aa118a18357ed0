"""Build the emoji model for every backend, draw with those that this machine can run, and compare them.

    python examples/demo.py            # or: make demo

Leaves the bundles and ``emoji.png`` in ``demo/``. Needs no GPU: the TensorRT engine is built for one generation of
GPUs (sm89: GeForce RTX 40, L4) and is left for such a machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import dexport
from runtimes.image import grid

MODEL = Path(__file__).parent / "emoji" / "model"
PROMPTS = ("red apple", "dog face", "rocket", "tulip", "octopus", "strawberry", "penguin", "pizza")
TARGETS = ("onnxruntime=fp32", "openvino=fp32", "openvino=bf16", "tensorrt:sm89=fp16")
STEPS, GUIDANCE, SEED = 20, 4.0, 0
ZOOM = 3  # the model draws 32x32 pixels


def main() -> None:
    """Build, draw, print the table and where the picture is."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=MODEL, help="a checkpoint (default: the emoji model)")
    arguments.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder (default: demo)")
    options = arguments.parse_args()
    console = Console()
    table = Table("backend", "precision", box=None, pad_edge=False)
    for head in ("seconds a step", "size", "agreement with torch"):
        table.add_column(head, justify="right")
    rows, labels = [], []
    columns = (
        BarColumn(24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        for built in dexport.build(
            options.model, options.output, targets=TARGETS, precisions=(), overwrite=True,
            cache=options.output / "cache",
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        ):  # fmt: skip
            progress.update(task, description=f"drawing: {built.target} {built.precision}")
            step = agreement = "not on this machine"
            if built.accuracy["gate"] == "passed":
                agreement = f"{built.accuracy['image']['psnr_db']:.1f} dB"
                step = f"{dexport.bench(built.folder)['step_seconds']:.4f}"
                rows.append(draw(built.folder))
                labels.append(f"{built.target} {built.precision}")
            table.add_row(built.target, built.precision, step, f"{built.size / 1e6:.1f} MB", agreement)
    picture = options.output / "emoji.png"
    grid(rows, labels, PROMPTS).save(picture)
    console.print(table)
    console.print("\nAgreement is the PSNR of an image against torch in fp32. The pictures:")
    console.print(str(picture), soft_wrap=True)


def draw(bundle: Path) -> list[Image.Image]:
    """Draw every prompt with one bundle; the same seeds on each backend."""
    images = dexport.load(bundle)(PROMPTS, steps=STEPS, guidance=GUIDANCE, seed=SEED).images
    return [image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST) for image in images]


if __name__ == "__main__":
    main()
