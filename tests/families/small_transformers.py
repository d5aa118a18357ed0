"""Tiny checkpoints of transformers that a language model tells what to draw: one writer each, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import Gemma2Config, Gemma2Model, UMT5Config, UMT5EncoderModel

from tests.families.small import SCHEDULE, save
from tests.families.small_flow import noisy, t5
from tests.tiny import kl_autoencoder
from tests.words import write_gemma, write_llama


def gemma(folder: Path, width: int) -> tuple[Any, Any]:
    """A Gemma 2 with states of ``width``, and its tokenizer."""
    words = write_gemma(folder.with_name(f"{folder.name}-gemma"))
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return noisy(Gemma2Model(config)), words


def pixart(folder: Path, kind: Any, **options: Any) -> None:
    """A transformer that also gives a learned variance, which the pipeline leaves out."""
    torch.manual_seed(5)
    encoder, words = t5(folder, 16)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=16, **options,
    )  # fmt: skip
    save(
        folder, kind, transformer=noisy(transformer), text_encoder=encoder, tokenizer=words, vae=kl_autoencoder(2),
        scheduler=diffusers.DPMSolverMultistepScheduler(**{**SCHEDULE, "beta_end": 0.006}),
    )  # fmt: skip


def pixart_alpha(folder: Path) -> None:
    """As the model for 1024 pixels: told the size and the aspect ratio."""
    pixart(folder, diffusers.PixArtAlphaPipeline, sample_size=128)


def pixart_sigma(folder: Path) -> None:
    pixart(folder, diffusers.PixArtSigmaPipeline, sample_size=8, use_additional_conditions=False)


def sana(folder: Path, kind: Any = diffusers.SanaPipeline, scheduler: Any = None, **options: Any) -> None:
    """As Sana for 1024 pixels."""
    torch.manual_seed(6)
    encoder, words = gemma(folder, 16)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, **options,
    )  # fmt: skip
    autoencoder: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        autoencoder |= {
            f"{part}_block_types": ("ResBlock", "EfficientViTBlock"), f"{part}_block_out_channels": (8, 16),
            f"{part}_layers_per_block": (1, 1), f"{part}_qkv_multiscales": ((), (5,)),
        }  # fmt: skip
    save(
        folder, kind, transformer=noisy(transformer), text_encoder=encoder, tokenizer=words,
        vae=noisy(diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **autoencoder)),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        ),
    )  # fmt: skip


def sana_wide(folder: Path) -> None:
    """As Sana for 4096 pixels: with positions."""
    sana(folder, interpolation_scale=2)


def sana_sprint(folder: Path) -> None:
    """Distilled: told the scale of guidance, normed queries and keys."""
    sana(
        folder, diffusers.SanaSprintPipeline, diffusers.SCMScheduler(), guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def aura_flow(folder: Path) -> None:
    """A tokenizer that fills up with its mark of the end; fewer positions are used than were learned."""
    torch.manual_seed(7)
    words = write_llama(folder.with_name(f"{folder.name}-llama"))
    config = UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )  # fmt: skip
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    save(
        folder, diffusers.AuraFlowPipeline, transformer=noisy(transformer, 0.14), tokenizer=words,
        text_encoder=noisy(UMT5EncoderModel(config)), vae=kl_autoencoder(2, scaling_factor=0.13025),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


def lumina2(folder: Path, **options: Any) -> None:
    torch.manual_seed(8)
    encoder, words = gemma(folder, 16)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    save(
        folder, diffusers.Lumina2Pipeline, transformer=noisy(transformer), text_encoder=encoder, tokenizer=words,
        vae=kl_autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **options}),
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], None]] = {
    "pixart_alpha": pixart_alpha, "pixart_sigma": pixart_sigma, "sana": sana, "sana_wide": sana_wide,
    "sana_sprint": sana_sprint, "aura_flow": aura_flow, "lumina2": lumina2,
}  # fmt: skip
