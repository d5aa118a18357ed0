"""Tiny checkpoints without text, of diffusers' own classes with random weights, and diffusers' pipelines as oracles.

Every noise that a pipeline of diffusers or ours draws comes from one seeded list, so that both draw the same pictures.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from runtimes.pipeline import Pipeline, Request

Array = NDArray[Any]
NAMES = {"0": "tench, Tinca tinca", "7": "cock", "134": "crane", "207": "golden retriever", "517": "crane"}


def unet(**options: Any) -> Any:
    """A UNet2DModel for samples of 3 x 16 x 16."""
    torch.manual_seed(0)
    small = {
        "sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DModel(**(small | options))


def vq(**options: Any) -> Any:
    """A VQModel whose latents are a quarter of the picture's sides, with a codebook as wide as they are."""
    torch.manual_seed(1)
    small = {
        "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "num_vq_embeddings": 64, "latent_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    }  # fmt: skip
    model = diffusers.VQModel(**(small | options))
    model.quantize.embedding.weight.data.normal_()
    return model


def write_ddpm(folder: Path) -> None:
    """In colour, with the variance of DDPM's paper."""
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(folder)


def write_learned(folder: Path) -> None:
    """With a learned variance, and the names that attention had before diffusers 0.14."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet(out_channels=6), scheduler).save_pretrained(folder)


def write_grey(folder: Path) -> None:
    """In one channel."""
    grey = unet(in_channels=1, out_channels=1)
    diffusers.DDIMPipeline(grey, diffusers.DDIMScheduler()).save_pretrained(folder)


def write_consistency(folder: Path) -> None:
    """A consistency model with ten classes."""
    classes = unet(num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    scheduler = diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(classes, scheduler).save_pretrained(folder)


def write_ldm(folder: Path) -> None:
    """Unconditional latent diffusion."""
    diffusers.LDMPipeline(vq(), unet(), diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder)


def write_superresolution(folder: Path) -> None:
    """Four times the sides of a picture of 16 x 16."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.LDMSuperResolutionPipeline(vq(), unet(in_channels=6, sample_size=32), scheduler)
    pipe.save_pretrained(folder)


def write_dit(folder: Path) -> None:
    """A DiT with ImageNet's thousand classes and a learned variance, which its pipeline leaves out."""
    torch.manual_seed(2)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    for weight in transformer.parameters():  # else the gates of the blocks are next to zero
        weight.data.add_(0.1 * torch.randn_like(weight))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": NAMES}))


WRITERS: dict[str, Callable[[Path], None]] = {
    "ddpm": write_ddpm, "learned": write_learned, "grey": write_grey, "consistency": write_consistency,
    "ldm": write_ldm, "superresolution": write_superresolution, "dit": write_dit,
}  # fmt: skip


def noises(count: int, shape: tuple[int, ...]) -> Callable[[], Array]:
    """Draws of seeded noise [count, *shape], float64 with the digits of float32."""
    random = np.random.default_rng(5)
    return lambda: random.standard_normal((count, *shape)).astype(np.float32).astype(np.float64)


@contextlib.contextmanager
def drawing(pipe: Any, draw: Callable[[], Array]) -> Iterator[None]:
    """Let a pipeline of diffusers and its scheduler take their noise from ``draw``."""
    with contextlib.ExitStack() as stack:
        for part in (pipe, pipe.scheduler):
            module = sys.modules[type(part).__module__]
            given = lambda shape, **_: torch.from_numpy(draw()).float().reshape(tuple(shape))  # noqa: E731
            stack.enter_context(mock.patch.object(module, "randn_tensor", given, create=True))
        yield


def theirs(folder: Path, draw: Callable[[], Array], **settings: Any) -> Array:
    """The pictures [B, 3, H, W] of diffusers' own pipeline."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with drawing(pipe, draw):
        pictures = pipe(output_type="np", **settings).images
    return np.asarray(pictures).transpose(0, 3, 1, 2)


def ours(pipeline: Pipeline, request: Request, draw: Callable[[], Array]) -> Array:
    """The pictures [B, 3, H, W] of a bundle."""
    *_, last = pipeline.generate(request, draw)
    return pipeline.decode(last.sample)
