"""Stable Diffusion 1.x and 2.x, and latent consistency models made of them: CLIP, UNet with cross-attention, KL VAE.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts
from runtimes.errors import DexportError
from runtimes.manifest import Stage, Start, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "stable-diffusion"
# The safety checker and the feature extractor belong to the pipeline, but no graph of ours has them.
COMPONENTS = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "ConsistencyDecoderVAE", "AutoencoderTiny"),
    "tokenizer": CLIP_TOKENIZERS,
}
# Scale of guidance, diffusers' own, and steps. DPM-Solver++ and Euler have converged after 20; 50 were for PNDM.
DISTILLED = "LatentConsistencyModelPipeline"
DEFAULTS = {DISTILLED: (8.5, 4)}
OTHERS = (7.5, 20)
# UNet options that ask for conditioning which a Stable Diffusion pipeline does not give.
FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")

default_shape = parts.default_shape
rename = parts.rename


def text(modules: Any, tokens: Any) -> Any:
    """[B, S] token ids to the last layer's states, normed: [B, S, D]."""
    return modules.text_encoder(input_ids=tokens).last_hidden_state


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, guidance: Any = None) -> Any:
    """[B, 4, h, w], [B], [B, S, D], and [B] if distilled, to the predicted noise or velocity: [B, 4, h, w]."""
    known = None if guidance is None else parts.guidance_embedding(modules.unet, guidance)
    return modules.unet(sample, timestep, encoder_hidden_states, timestep_cond=known, return_dict=False)[0]


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for UNets that need more than text, and sizes that have no whole latents."""
    config, drawn = checkpoint.components["unet"].config, parts.canvas(checkpoint, shape)
    for option in FOREIGN:
        if config.get(option) is not None:
            raise DexportError(f"unet/config.json: {option}={config[option]!r} is not Stable Diffusion 1.x or 2.x")
    if checkpoint.pipeline == DISTILLED and config.get("time_cond_proj_dim") is None:
        raise DexportError(f"unet/config.json: time_cond_proj_dim is missing, and a {DISTILLED} has it")
    hole = parts.painting(checkpoint, drawn)
    encoder_config = checkpoint.components["text_encoder"].config
    width = parts.whole("text_encoder", encoder_config, "hidden_size", 512)
    tokens = parts.tokens(checkpoint, "text_encoder", "tokens")
    states = Tensor("encoder_hidden_states", "float32", (*tokens.shape, width))
    timestep = Tensor("timestep", "float32", ("batch",))
    output = Tensor("output", "float32", drawn.sample.shape)
    inputs = (drawn.sample, *hole, timestep, states, *parts.further_inputs(config))
    forward = parts.painter(denoiser) if hole else denoiser
    build_text = {"text_encoder": lambda: parts.build_text(encoder_config)}
    build_unet = {"unet": lambda: parts.build_unet(config)}
    unet = Spec("denoiser", build_unet, forward, inputs, (output,), drawn.odd_sizes)
    return {
        "text": Spec("text", build_text, text, (tokens,), (states,), {}),
        "denoiser": parts.long_prompts(checkpoint, unet, states),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance (Ho and Salimans 2022), or with guidance that the UNet knows."""
    scale, steps = DEFAULTS.get(checkpoint.pipeline, OTHERS)
    guidance = parts.guidance(checkpoint.components["unet"].config, scale)
    # Only the latent consistency models' class from image to image tells its scheduler the strength.
    how = Start("spread" if checkpoint.pipeline == DISTILLED else "floor")
    drawn = parts.canvas(checkpoint, shape)
    return (drawn.stage(checkpoint, guidance, steps, states=parts.STATES, image_to_image=how),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The tokenizer's ids go to ``tokens``, as many as it fills up to."""
    _, length = parts.tokens(checkpoint, "text_encoder", "tokens").shape
    return {"tokenizer": Tokens("tokens", int(length))}
