"""Judge an emoji model: does it draw what its prompt names, and do its pictures spread as the real ones do?

    python examples/emoji/evaluate.py examples/emoji/model            # the checkpoint, with diffusers
    python examples/emoji/evaluate.py BUNDLE [--against BUNDLE]       # a bundle, without torch

Retrieval: the share of prompts whose picture is nearest to the right one of all 1,636 emoji (mean squared pixel
distance), or has it among its five nearest. Fréchet distance: between Gaussians fitted to the VAE encoder's latents; it
is shown beside its null, the distance between two runs of one model that differ in nothing but the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import load, prompts
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


def retrieval(images: Array, right: list[int]) -> tuple[Array, Array]:
    """For each image whether its emoji is the nearest of all, and whether it is among the five nearest."""
    tiles = load()[0].reshape(-1, 32 * 32 * 3).astype(np.float32) / 255
    flat = images.transpose(0, 2, 3, 1).reshape(len(images), -1).astype(np.float32)
    distance = (flat**2).sum(1)[:, None] - 2 * flat @ tiles.T + (tiles**2).sum(1)[None]
    order = np.argsort(distance, axis=1)
    first = order[:, 0] == right
    return first, (order[:, :5] == np.asarray(right)[:, None]).any(axis=1)


def frechet(one: Array, other: Array) -> float:
    """Fréchet distance of Gaussians fitted to two sets of latents [N, ...] (Dowson and Landau 1982)."""
    x, y = (value.reshape(len(value), -1).astype(np.float64) for value in (one, other))
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(cx)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cy @ root), 0, None)).sum()
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx) + np.trace(cy) - 2 * cross)


def draw_all(model: Model, words: list[str], seed: int) -> Array:
    """Draw every prompt, image i with seed + i."""
    pieces = []
    for start in range(0, len(words), BATCH):
        piece = words[start : start + BATCH]
        pieces.append(model.draw(piece, [seed + start + index for index in range(len(piece))]))
        print(f"\r{start + len(piece)}/{len(words)} pictures", end="", flush=True)
    print("\r", end="")
    return np.concatenate(pieces)


def judge(model: Model, count: int, against: Model | None = None) -> tuple[dict[str, float], Array]:
    """Return the figures by name, and the pictures."""
    right, words = prompts(count)
    images = draw_all(model, words, 0)
    first, five = retrieval(images, right)
    data = load()[0][right].transpose(0, 3, 1, 2).astype(np.float32) / 255
    latents = model.encode(images)
    null = frechet(latents, model.encode(draw_all(model, words, SECOND_SEED)))
    figures = {
        "prompts": count,
        "top1": float(first.mean()),
        "top5": float(five.mean()),
        "frechet_to_data": frechet(latents, model.encode(data)),
        "frechet_null": null,
    }
    if against is not None:
        others = draw_all(against, words, 0)
        error = np.square(images - others).mean((1, 2, 3))
        psnr = -10 * np.log10(np.maximum(error, 1e-20))
        figures |= {
            "frechet_to_other": frechet(latents, model.encode(others)),
            "psnr_median_db": float(np.median(psnr)),
            "psnr_10th_percentile_db": float(np.percentile(psnr, 10)),
        }
    return figures, images


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
    from runtimes.pipeline import Pipeline, Request

    pipeline = Pipeline.load(folder)

    def draw(words: list[str], seeds: list[int]) -> Array:
        request = Request(words, steps=steps, guidance=guidance, seed=seeds[0])
        *_, last = pipeline.generate(request)
        return pipeline.decode(last.sample)

    return Model(draw, pipeline.encode)


def open_model(folder: Path, steps: int, guidance: float) -> Model:
    """A checkpoint or a bundle, whichever the folder holds."""
    return (open_bundle if (folder / "dexport.json").is_file() else open_checkpoint)(folder, steps, guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint or a bundle")
    parser.add_argument("--against", type=Path, help="another one, compared at the same seeds")
    parser.add_argument("--count", type=int, default=256, help="how many emoji (default 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--picture", type=Path, help="write a grid here: each emoji above what was drawn for its name")
    options = parser.parse_args()
    model = open_model(options.model, options.steps, options.guidance)
    other = open_model(options.against, options.steps, options.guidance) if options.against else None
    figures, images = judge(model, options.count, other)
    print(json.dumps(figures, indent=2))
    if options.picture:
        from PIL import Image

        from runtimes.image import to_images

        right, _ = prompts(options.count)
        drawn, real = to_images(images), [Image.fromarray(load()[0][index]) for index in right]
        rows = [
            row
            for start in range(0, min(len(drawn), 96), 16)
            for row in (real[start : start + 16], drawn[start : start + 16])
        ]
        sheet = grid(rows)
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(options.picture)


if __name__ == "__main__":
    main()
