"""Tiny checkpoints of flow transformers of text, of diffusers' own classes with random weights: one writer each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.families.small import save, tokenizer
from tests.tiny import clip, kl_autoencoder
from tests.words import write_qwen, write_t5

PIXELS = 32  # a side of what they draw


def noisy(model: Any, scale: float = 0.1) -> Any:
    """The model with noise on its weights: fresh ones leave the gates of blocks next to zero."""
    for weight in model.parameters():
        weight.data.add_(scale * torch.randn_like(weight))
    return model


def t5(folder: Path, width: int) -> tuple[Any, Any]:
    """A T5 encoder with states of ``width``, and its tokenizer."""
    words = write_t5(folder.with_name(f"{folder.name}-t5"))
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
    )  # fmt: skip
    return noisy(T5EncoderModel(config)), words


def sd_3(
    folder: Path, *, with_t5: bool = True, kind: Any = diffusers.StableDiffusion3Pipeline, channels: int = 4,
    **options: Any,
) -> None:  # fmt: skip
    """As 3.5 medium: attention twice in the first block, normed queries; latents that are shifted."""
    torch.manual_seed(3)
    words, words_2 = tokenizer(folder, "words"), tokenizer(folder, "words-2", "!")
    encoder, words_3 = t5(folder, 48) if with_t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    save(
        folder, kind, transformer=noisy(transformer), text_encoder=clip(len(words), projected=True, projection_dim=8),
        text_encoder_2=clip(len(words_2), projected=True, hidden_size=16, projection_dim=16), text_encoder_3=encoder,
        tokenizer=words, tokenizer_2=words_2, tokenizer_3=words_3,
        vae=kl_autoencoder(2, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                           use_post_quant_conv=False, sample_size=PIXELS, latent_channels=channels),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options}),
    )  # fmt: skip


def sd_3_of_pictures(folder: Path) -> None:
    """Without T5; as 3.0, from a picture, with noise that is shifted by the resolution."""
    sd_3(folder, with_t5=False, kind=diffusers.StableDiffusion3Img2ImgPipeline, use_dynamic_shifting=True)


def flux(folder: Path, *, dev: bool = True) -> None:
    """As dev: told the scale of guidance, noise shifted by the resolution."""
    torch.manual_seed(4)
    words = tokenizer(folder, "words")
    encoder, words_2 = t5(folder, 24)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=dev, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    save(
        folder, diffusers.FluxPipeline, transformer=noisy(transformer), text_encoder=clip(len(words)),
        text_encoder_2=encoder, tokenizer=words, tokenizer_2=words_2,
        vae=kl_autoencoder(2, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                           use_post_quant_conv=False, sample_size=PIXELS),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
    )  # fmt: skip


def flux_schnell(folder: Path) -> None:
    flux(folder, dev=False)


def qwen_image(folder: Path) -> None:
    """With an autoencoder that halves twice, and noise whose end is stretched."""
    torch.manual_seed(5)
    words = write_qwen(folder.with_name(f"{folder.name}-words"))
    small = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(words),
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    seeing = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=small, vision_config=seeing))
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 2.0, 1.0],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    save(
        folder, diffusers.QwenImagePipeline, transformer=noisy(transformer), text_encoder=noisy(encoder),
        tokenizer=words, vae=vae, scheduler=scheduler,
    )  # fmt: skip


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def z_image(folder: Path) -> None:
    """With a picture whose tokens do not fill whole multiples of 32."""
    torch.manual_seed(6)
    words = write_qwen(folder.with_name(f"{folder.name}-words"))
    words.chat_template = CHAT
    encoder = Qwen3Model(
        Qwen3Config(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, vocab_size=len(words), bos_token_id=None, eos_token_id=words.eos_token_id,
        )
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 4, 8], axes_lens=[600, 32, 32],
    )  # fmt: skip
    vae = kl_autoencoder(2, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    save(
        folder, diffusers.ZImagePipeline, transformer=noisy(transformer), text_encoder=noisy(encoder), tokenizer=words,
        vae=vae, scheduler=scheduler,
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], None]] = {
    "sd_3": sd_3, "flux": flux, "flux_schnell": flux_schnell, "qwen_image": qwen_image, "z_image": z_image,
}  # fmt: skip
