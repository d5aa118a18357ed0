"""Judge an emoji model: does it draw what its prompt names, and do its pictures spread as the real ones do?

    python examples/emoji/evaluate.py examples/emoji/model            # the checkpoint, with diffusers
    python examples/emoji/evaluate.py BUNDLE [--against BUNDLE]       # a bundle, without torch
    python examples/emoji/evaluate.py BUNDLE --against examples/emoji/model --gate   # 1 where it is too far from it

Retrieval: the share of prompts whose picture is nearest to the right one of all 1,636 emoji (mean squared pixel
distance), or has it among its five nearest. Fréchet distance: between Gaussians fitted to the VAE encoder's latents; it
is shown beside its null, the distance between two runs of one model that differ in nothing but the seeds.

Against another model, at the same seeds: PSNR of the pictures and the difference of top-1 with the bootstrap's 95 %
intervals, and the shift of the Fréchet distance to the data beside the interval that other seeds alone move it in.
With a gate the figures must reach its thresholds; what is missed is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import load, prompts
from measures import Gate, Reference, retrieval
from numpy.typing import NDArray

from runtimes.image import grid
from runtimes.loop import noise_source

Array = NDArray[Any]
BATCH = 32
SECOND_SEED = 1_000_000  # the null's seeds: far from those of the judged run


@dataclass(frozen=True)
class Model:
    """What the judge needs: images, float [B, 3, H, W] in [0, 1], from prompts and seeds; latents from images."""

    draw: Callable[[list[str], list[int]], Array]
    encode: Callable[[Array], Array]


def draw_all(model: Model, words: list[str], seed: int) -> Array:
    """Draw every prompt, image i with seed + i."""
    pieces = []
    for start in range(0, len(words), BATCH):
        piece = words[start : start + BATCH]
        pieces.append(model.draw(piece, [seed + start + index for index in range(len(piece))]))
        print(f"\r{start + len(piece)}/{len(words)} pictures", end="", flush=True, file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return np.concatenate(pieces)


def judge(model: Model, count: int, against: Model | None = None) -> tuple[dict[str, Any], Array]:
    """Return the figures by name, and the pictures; the encoder and the null are those of ``against``, if given."""
    right, words = prompts(count)
    images = draw_all(model, words, 0)
    first, five = retrieval(images, right)
    figures: dict[str, Any] = {"prompts": count, "top1": float(first.mean()), "top5": float(five.mean())}
    other = against or model
    others = images if against is None else draw_all(against, words, 0)
    reference = Reference(others, draw_all(other, words, SECOND_SEED), right, other.encode)
    figures |= {
        "frechet_to_data": reference.data.distance(other.encode(images)),
        "frechet_null": reference.seeds,
    }
    return figures | (reference.compare(images) if against is not None else {}), images


def open_checkpoint(folder: Path, steps: int, guidance: float) -> Model:
    """The checkpoint as diffusers runs it, in fp32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    vae = pipeline.vae

    def draw(words: list[str], seeds: list[int]) -> Array:
        start = noise_source(seeds, (4, 8, 8))().astype(np.float32)
        images = pipeline(
            words, latents=torch.from_numpy(start), num_inference_steps=steps, guidance_scale=guidance, output_type="np"
        ).images
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    @torch.inference_mode()
    def encode(images: Array) -> Array:
        latents = vae.encode(torch.from_numpy(images.astype(np.float32) * 2 - 1)).latent_dist.mode()
        return (latents * vae.config.scaling_factor).numpy()

    return Model(draw, encode)


def open_bundle(folder: Path, steps: int, guidance: float) -> Model:
    """A bundle as a device runs it."""
    from runtimes.pipeline import Pipeline
    from runtimes.request import Request

    pipeline = Pipeline.load(folder)

    def draw(words: list[str], seeds: list[int]) -> Array:
        request = Request(words, steps=steps, guidance=guidance, seed=seeds[0])
        *_, last = pipeline.generate(request)
        return pipeline.decode(last.sample)

    return Model(draw, pipeline.encode)


def open_model(folder: Path, steps: int, guidance: float) -> Model:
    """A checkpoint or a bundle, whichever the folder holds."""
    return (open_bundle if (folder / "dexport.json").is_file() else open_checkpoint)(folder, steps, guidance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print the figures as JSON and return the exit code: 1 where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint or a bundle")
    parser.add_argument("--against", type=Path, help="another one, compared at the same seeds")
    parser.add_argument("--count", type=int, default=256, help="how many emoji (default 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--picture", type=Path, help="write a grid here: each emoji above what was drawn for its name")
    parser.add_argument(
        "--gate", action="store_true", help="hold the model to the thresholds below; one alone does too"
    )
    thresholds = {
        "psnr": f"least median PSNR, dB (default {Gate.psnr:g})",
        "psnr_10th": f"least 10th percentile of PSNR, dB (default {Gate.psnr_10th:g})",
        "top1_drop": f"most that top-1 may fall, percentage points (default {Gate.top1_drop:g})",
    }
    for name, text in thresholds.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)
    options = parser.parse_args(arguments)
    given = {name: value for name in thresholds if (value := getattr(options, name)) is not None}
    gate = Gate(**given) if options.gate or given else None
    if gate and not options.against:
        parser.error("a gate compares with another model; name it with --against")
    model = open_model(options.model, options.steps, options.guidance)
    other = open_model(options.against, options.steps, options.guidance) if options.against else None
    figures, images = judge(model, options.count, other)
    missed = gate.missed(figures) if gate else []
    print(json.dumps(figures | ({"gate": asdict(gate), "missed": missed} if gate else {}), indent=2))
    if options.picture:
        _write_grid(images, options.count, options.picture)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


def _write_grid(images: Array, count: int, file: Path) -> None:
    """Each emoji above what was drawn for its name."""
    from PIL import Image

    from runtimes.image import to_images

    right, _ = prompts(count)
    drawn, real = to_images(images), [Image.fromarray(load()[0][index]) for index in right]
    rows = [
        row
        for start in range(0, min(len(drawn), 96), 16)
        for row in (real[start : start + 16], drawn[start : start + 16])
    ]
    sheet = grid(rows)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    sys.exit(main())
