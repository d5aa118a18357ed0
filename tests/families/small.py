"""Tiny checkpoints of diffusers' own classes with random weights: one writer each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTokenizer

from tests.tiny import clip, conditional_unet, kl_autoencoder, write_clip_vocabulary

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NAMES = {
    "0": "tench, Tinca tinca", "7": "cock", "134": "crane", "207": "golden retriever", "517": "crane", "999": "tissue",
}  # fmt: skip


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


def write_pndm(folder: Path) -> None:
    """In colour, with Runge-Kutta steps before the others."""
    diffusers.PNDMPipeline(unet(), diffusers.PNDMScheduler()).save_pretrained(folder)


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


def save(folder: Path, kind: Any, **components: Any) -> None:
    """Save a pipeline of diffusers' class ``kind``, its weights as random as they are."""
    kind(**components).save_pretrained(folder)


def tokenizer(folder: Path, name: str, pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer of few words."""
    place = folder.with_name(f"{folder.name}-{name}")
    write_clip_vocabulary(place, pad)
    return CLIPTokenizer.from_pretrained(place)


def stable_diffusion(folder: Path, kind: Any, scheduler: Any, unet: dict[str, Any], **text: Any) -> None:
    torch.manual_seed(1)
    words = tokenizer(folder, "words", "!")
    save(
        folder, kind, vae=kl_autoencoder(2), text_encoder=clip(len(words), **text), tokenizer=words,
        unet=conditional_unet(**unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
    )  # fmt: skip


def sd_2(folder: Path) -> None:
    """As 2.1: OpenCLIP's text encoder, linear projections, heads by block, v-prediction down to no signal at all."""
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
    stable_diffusion(
        folder, diffusers.StableDiffusionPipeline, scheduler, unet, hidden_act="gelu", num_hidden_layers=3,
        projection_dim=24,
    )  # fmt: skip


def latent_consistency(folder: Path) -> None:
    scheduler = diffusers.LCMScheduler(**{**SCHEDULE, "steps_offset": 0})
    stable_diffusion(folder, diffusers.LatentConsistencyModelPipeline, scheduler, {"time_cond_proj_dim": 31})


def inpainting(folder: Path) -> None:
    """As 1.5's inpainting model: a UNet that is told the mask and the picture without the hole."""
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    stable_diffusion(folder, diffusers.StableDiffusionInpaintPipeline, scheduler, {"in_channels": 9})


def stable_diffusion_xl(
    folder: Path, kind: Any, scheduler: Any, *, refiner: bool = False, channels: int = 4, means: bool = True,
    blocks: dict[str, Any] | None = None, **options: Any,
) -> None:  # fmt: skip
    """Two tokenizers that fill up with other ids, text encoders of two widths, and latents with a mean each."""
    torch.manual_seed(2)
    words, words_2 = tokenizer(folder, "words"), tokenizer(folder, "words-2", "!")
    wide = clip(len(words_2), projected=True, hidden_size=48, projection_dim=24, hidden_act="gelu")
    unet = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=48 if refiner else 32 + 48,
        projection_class_embeddings_input_dim=24 + 8 * (5 if refiner else 6), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), in_channels=channels, **(blocks or {}),
    )  # fmt: skip
    normal = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 2.0, 1.0]}
    # diffusers' inpainting pipeline leaves the mean out when it encodes, and takes it in when it decodes.
    vae = kl_autoencoder(2, scaling_factor=0.13025, **(normal if means and channels == 4 else {}))
    save(
        folder, kind, vae=vae, text_encoder=None if refiner else clip(len(words)), text_encoder_2=wide,
        tokenizer=None if refiner else words, tokenizer_2=words_2, unet=unet, scheduler=scheduler, **options,
    )  # fmt: skip


def sdxl(folder: Path) -> None:
    stable_diffusion_xl(folder, diffusers.StableDiffusionXLPipeline, diffusers.EulerDiscreteScheduler(**SCHEDULE))


def sdxl_inpainting(folder: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE)
    stable_diffusion_xl(folder, diffusers.StableDiffusionXLInpaintPipeline, scheduler, channels=9)


def sdxl_turbo(folder: Path) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**{**SCHEDULE, "timestep_spacing": "trailing"})
    stable_diffusion_xl(folder, diffusers.StableDiffusionXLPipeline, scheduler)


def refiner(folder: Path) -> None:
    stable_diffusion_xl(
        folder, diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.EulerDiscreteScheduler(**SCHEDULE), refiner=True,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], None]] = {
    "ddpm": write_ddpm, "pndm": write_pndm, "learned": write_learned, "grey": write_grey,
    "consistency": write_consistency, "ldm": write_ldm, "superresolution": write_superresolution, "dit": write_dit,
}  # fmt: skip
