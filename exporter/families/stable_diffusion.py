"""Stable Diffusion 1.x: CLIP text encoder, UNet with cross-attention, KL autoencoder; epsilon or v-prediction.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import TOKENIZERS, Shape, Spec, parts
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "stable-diffusion"
# The safety checker and the feature extractor belong to the pipeline, but no graph of ours has them.
COMPONENTS = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": TOKENIZERS,
}
GUIDANCE = 7.5  # StableDiffusionPipeline's default
STEPS = 20  # DPM-Solver++ and Euler have converged there; the pipeline's 50 were for PNDM
# UNet options that ask for conditioning which a Stable Diffusion 1.x pipeline does not give.
FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def text(modules: Any, tokens: Any) -> Any:
    """[B, S] token ids to the last layer's states, normed: [B, S, D]."""
    return modules.text_encoder(input_ids=tokens).last_hidden_state


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
    """[B, 4, h, w], [B], [B, S, D] to the predicted noise or velocity: [B, 4, h, w]."""
    return modules.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The checkpoint's own picture size, (height, width) in pixels."""
    height, width = parts.sides("unet", "sample_size", checkpoint.components["unet"].config.get("sample_size") or 64)
    factor = parts.pixels_per_latent(checkpoint)
    return height * factor, width * factor


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for UNets that need more than text, and sizes that have no whole latents."""
    config, drawn = checkpoint.components["unet"].config, parts.canvas(checkpoint, shape)
    for option in FOREIGN:
        if config.get(option) is not None:
            raise DexportError(f"unet/config.json: {option}={config[option]!r} is not Stable Diffusion 1.x")
    if config.get("in_channels", 4) != drawn.channels or config.get("out_channels", 4) != drawn.channels:
        raise DexportError(
            f"unet/config.json: {config.get('in_channels', 4)} channels in and {config.get('out_channels', 4)} out "
            f"where the autoencoder has {drawn.channels}; inpainting and upscaling models are not supported"
        )

    encoder_config = checkpoint.components["text_encoder"].config
    length = parts.whole("text_encoder", encoder_config, "max_position_embeddings", 77)
    width = parts.whole("text_encoder", encoder_config, "hidden_size", 512)
    tokens = Tensor("tokens", "int64", ("batch", length))
    states = Tensor("encoder_hidden_states", "float32", ("batch", length, width))
    timestep = Tensor("timestep", "float32", ("batch",))
    output = Tensor("output", "float32", drawn.sample.shape)
    inputs = (drawn.sample, timestep, states)
    build_text, build_unet = {"text_encoder": lambda: text_model(encoder_config)}, {"unet": lambda: unet_model(config)}
    return {
        "text": Spec("text", build_text, text, (tokens,), (states,), {}),
        "denoiser": Spec("denoiser", build_unet, denoiser, inputs, (output,), drawn.odd_sizes),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance (Ho and Salimans 2022)."""
    factor = parts.pixels_per_latent(checkpoint)
    channels = parts.whole("unet", checkpoint.components["unet"].config, "in_channels", 4)
    sample = (channels, shape.height // factor, shape.width // factor)
    guidance = Guidance("cfg", GUIDANCE)
    return (
        Stage("base", "denoiser", "text", "decoder", "encoder", sample, factor, checkpoint.scheduler, guidance, STEPS),
    )


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, tuple[str, int]]:
    """The tokenizer's ids go to ``tokens``, as many as the text encoder has positions."""
    length = parts.whole("text_encoder", checkpoint.components["text_encoder"].config, "max_position_embeddings", 77)
    return {"tokenizer": ("tokens", length)}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids, which are no weights.

    transformers dropped the level "text_model." from CLIPTextModel; the checkpoints have it. diffusers gave the
    autoencoder's attention its present names in 0.14.
    """
    if component == "text_encoder":
        name = name.removeprefix("text_model.")
        return None if name == "embeddings.position_ids" else name
    if component == "vae":
        return parts.rename_attention(name)
    return name


def text_model(config: Mapping[str, Any]) -> Any:
    """A CLIP text encoder of this config.json."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def unet_model(config: Mapping[str, Any]) -> Any:
    """A UNet of this config.json."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))
