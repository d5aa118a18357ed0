"""A tiny Stable Diffusion and a motion adapter for it, each saved for itself, and diffusers' pipeline with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.families.small import SCHEDULE, save, sdxl, tokenizer
from tests.tiny import clip, conditional_unet, kl_autoencoder

WIDTHS = (32, 32)  # diffusers' motion modules have 32 groups of channels
LONGEST = 6  # frames that the motion modules have positions for


def adapter(**changes: Any) -> Any:
    """Motion modules for every layer of ``stable_diffusion``'s UNet."""
    torch.manual_seed(8)
    options = {"block_out_channels": WIDTHS, "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    return diffusers.MotionAdapter(**{**options, "motion_max_seq_length": LONGEST, **changes})


def animatediff(folder: Path) -> Any:
    """Write Stable Diffusion into ``folder`` and the adapter beside it, into "adapter"; return diffusers' pipeline."""
    torch.manual_seed(7)
    words = tokenizer(folder, "words", "!")
    parts = {
        "vae": kl_autoencoder(2), "text_encoder": clip(len(words)), "tokenizer": words,
        "unet": conditional_unet(sample_size=8, block_out_channels=WIDTHS),
        "scheduler": diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    }  # fmt: skip
    pictures = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    save(folder, diffusers.StableDiffusionPipeline, **parts, **pictures)
    moving = adapter()
    moving.save_pretrained(folder.with_name("adapter"))
    scheduler = diffusers.DDIMScheduler(**{**SCHEDULE, "beta_schedule": "linear"}, clip_sample=False)
    return diffusers.AnimateDiffPipeline(**{**parts, "scheduler": scheduler}, motion_adapter=moving)


def animatediff_xl(folder: Path) -> Any:
    """Likewise with Stable Diffusion XL, whose autoencoder has no mean of latents: diffusers' videos leave it out."""
    sdxl(folder)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(latents_mean=None, latents_std=None)
    vae.save_pretrained(folder / "vae")
    pictures = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    moving = adapter(block_out_channels=tuple(pictures.unet.config.block_out_channels))
    moving.save_pretrained(folder.with_name("adapter"))
    scheduler = type(pictures.scheduler).from_config(pictures.scheduler.config, beta_schedule="linear")
    pipe = diffusers.AnimateDiffSDXLPipeline(
        **{**pictures.components, "scheduler": scheduler, "motion_adapter": moving}
    )
    # diffusers leaves this one out when it makes the UNet, and so has random weights there.
    pipe.unet.add_embedding.load_state_dict(pictures.unet.add_embedding.state_dict())
    return pipe


def saved(folder: Path) -> None:
    """As diffusers saves its pipeline: all in the UNet, and the adapter beside it once more."""
    animatediff(folder.with_name("pictures")).save_pretrained(folder)


def saved_xl(folder: Path) -> None:
    """Likewise of Stable Diffusion XL."""
    animatediff_xl(folder.with_name("pictures")).save_pretrained(folder)
