"""Stable Diffusion 1.x: CLIP text encoder, UNet with cross-attention, KL autoencoder; epsilon or v-prediction.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import TOKENIZERS, Shape, Spec
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
SIDE = 65536  # the largest picture, latent, width or length that a config may ask for
BLOCKS = 10  # of an autoencoder; Stable Diffusion's has 4
# UNet options that ask for conditioning which a Stable Diffusion 1.x pipeline does not give.
FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
# Names of the autoencoder's attention before diffusers 0.14, and those of today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def text(modules: Any, tokens: Any) -> Any:
    """[B, S] token ids to the last layer's states, normed: [B, S, D]."""
    return modules.text_encoder(input_ids=tokens).last_hidden_state


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
    """[B, 4, h, w], [B], [B, S, D] to the predicted noise or velocity: [B, 4, h, w]."""
    return modules.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def decoder(modules: Any, sample: Any) -> Any:
    """Latents [B, 4, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    scale, shift = _latent_scale(modules.vae.config)
    image = modules.vae.decode(sample / scale + shift, return_dict=False)[0]  # in [-1, 1], and a little beyond
    return (image / 2 + 0.5).clamp(0, 1)


def encoder(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to the mode of its latents' distribution: [B, 4, h, w]."""
    scale, shift = _latent_scale(modules.vae.config)
    return (modules.vae.encode(image * 2 - 1, return_dict=False)[0].mode() - shift) * scale


def _latent_scale(config: Any) -> tuple[float, float]:
    """The loop's latents are (vae latents − shift) · scale; 0.18215 is the paper's, and diffusers' default."""
    return _number(config, "scaling_factor", 0.18215), _number(config, "shift_factor", 0.0)


def _number(config: Any, name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        value = default
    # A scale of 0 would erase every picture, and the decoder divides by it.
    if type(value) not in (int, float) or not abs(value) <= 1e6 or (name == "scaling_factor" and value <= 0):
        raise DexportError(f"vae/config.json: {name}={value!r:.60} is not a usable number")
    return float(value)


def _whole(component: str, config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= SIDE:
        raise DexportError(f"{component}/config.json: {name}={value!r:.60} must be a whole number from 1 to {SIDE}")
    return value


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The checkpoint's own picture size, (height, width) in pixels."""
    size = checkpoint.components["unet"].config.get("sample_size") or 64
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= SIDE for side in sides):
        raise DexportError(
            f"unet/config.json: sample_size={size!r:.60} must be a whole number from 1 to {SIDE}, or two of them"
        )
    return sides[0] * _factor(checkpoint), sides[1] * _factor(checkpoint)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for UNets that need more than text, and sizes that have no whole latents."""
    config, vae = checkpoint.components["unet"].config, checkpoint.components["vae"].config
    channels, factor = _whole("vae", vae, "latent_channels", 4), _factor(checkpoint)
    _latent_scale(vae)  # now, not after the other graphs
    for option in FOREIGN:
        if config.get(option) is not None:
            raise DexportError(f"unet/config.json: {option}={config[option]!r} is not Stable Diffusion 1.x")
    if config.get("in_channels", 4) != channels or config.get("out_channels", 4) != channels:
        raise DexportError(
            f"unet/config.json: {config.get('in_channels', 4)} channels in and {config.get('out_channels', 4)} out "
            f"where the autoencoder has {channels}; inpainting and upscaling models are not supported"
        )
    if shape.height % factor or shape.width % factor or min(shape.height, shape.width) < factor:
        raise DexportError(f"{shape.height}x{shape.width} pixels: this model needs multiples of {factor}")

    encoder_config = checkpoint.components["text_encoder"].config
    length = _whole("text_encoder", encoder_config, "max_position_embeddings", 77)
    width = _whole("text_encoder", encoder_config, "hidden_size", 512)
    fixed = (shape.height, shape.width)
    small = ("height", "width") if shape.free else tuple(n // factor for n in fixed)
    large = ("image_height", "image_width") if shape.free else fixed
    tokens = Tensor("tokens", "int64", ("batch", length))
    states = Tensor("encoder_hidden_states", "float32", ("batch", length, width))
    latents = Tensor("sample", "float32", ("batch", channels, *small))
    image = Tensor("image", "float32", ("batch", 3, *large))
    timestep = Tensor("timestep", "float32", ("batch",))
    output = Tensor("output", "float32", latents.shape)

    # A UNet that meets sizes which its downsampling does not divide upsamples to the size of each skip connection,
    # which is right for all sizes; traced with sizes that it does divide, it would only ever double.
    odd = {"height": shape.height // factor | 1, "width": shape.width // factor | 1}
    even = {"height": shape.height // factor, "width": shape.width // factor}
    pixels = {"image_height": shape.height, "image_width": shape.width}
    build_text = {"text_encoder": lambda: text_model(encoder_config)}
    build_unet, build_vae = {"unet": lambda: unet_model(config)}, {"vae": lambda: vae_model(vae)}
    return {
        "text": Spec("text", build_text, text, (tokens,), (states,), {}),
        "denoiser": Spec("denoiser", build_unet, denoiser, (latents, timestep, states), (output,), odd),
        "decoder": Spec("decoder", build_vae, decoder, (latents,), (image,), even),
        "encoder": Spec("encoder", build_vae, encoder, (image,), (latents,), pixels),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance (Ho and Salimans 2022)."""
    factor = _factor(checkpoint)
    channels = _whole("unet", checkpoint.components["unet"].config, "in_channels", 4)
    sample = (channels, shape.height // factor, shape.width // factor)
    guidance = Guidance("cfg", GUIDANCE)
    return (
        Stage("base", "denoiser", "text", "decoder", "encoder", sample, factor, checkpoint.scheduler, guidance, STEPS),
    )


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, tuple[str, int]]:
    """The tokenizer's ids go to ``tokens``, as many as the text encoder has positions."""
    length = _whole("text_encoder", checkpoint.components["text_encoder"].config, "max_position_embeddings", 77)
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
        return re.sub(
            r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
            lambda match: f"{match[1]}{OLD_ATTENTION[match[2]]}.",
            name,
        )
    return name


def _factor(checkpoint: Checkpoint) -> int:
    """Pixels of the picture for each latent: the autoencoder halves between its blocks."""
    blocks = checkpoint.components["vae"].config.get("block_out_channels", [64])
    if (
        not isinstance(blocks, list)
        or not 1 <= len(blocks) <= BLOCKS
        or any(type(n) is not int or n < 1 for n in blocks)
    ):
        raise DexportError(
            f"vae/config.json: block_out_channels={blocks!r:.60} must be a list of 1 to {BLOCKS} whole numbers from 1"
        )
    return int(1 << (len(blocks) - 1))


def text_model(config: Mapping[str, Any]) -> Any:
    """A CLIP text encoder of this config.json."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def unet_model(config: Mapping[str, Any]) -> Any:
    """A UNet of this config.json."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))


def vae_model(config: Mapping[str, Any]) -> Any:
    """An autoencoder of this config.json."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))
