"""Stable Cascade: a prior draws a small map of the picture, of which a second UNet draws latents; Paella's VQ decoder.

Pernias et al., "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models" (2023),
https://arxiv.org/abs/2306.00637, whose stages C, B and A they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "stable-cascade"
# The decoder's own text encoder is the prior's over again, and the combined pipeline makes no use of it.
COMPONENTS = {
    "prior_prior": ("StableCascadeUNet",),
    "prior_text_encoder": ("CLIPTextModelWithProjection",),
    "prior_tokenizer": CLIP_TOKENIZERS,
    "decoder": ("StableCascadeUNet",),
    "vqgan": ("PaellaVQModel",),
}
SCHEDULERS = ("prior_scheduler", "scheduler")  # the prior is the one that is guided, and so the main one
SIDE = 1024  # pixels, which the authors trained for; no config says it
GUIDANCE, STEPS = 4.0, 20  # diffusers' own of the prior's pipeline
DECODER_STEPS = 10  # likewise, and without guidance
GIVEN = "image_embeddings"
POSITIONS = 10000  # times are told from POSITIONS to 0; StableCascadeUNet's own
# Pixels for each element of the prior's map, and the decoder's latents for each; the pipelines' own defaults.
PIXELS, LATENTS = 42.67, 10.67


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] token ids to the last layer's states, not normed, and the projected one: [B, S, D], [B, 1, P]."""
    encoder = modules.prior_text_encoder
    mask = text_encoders.there(encoder, tokens).long()
    made = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return made.hidden_states[-1], made.text_embeds[:, None]


def draw_map(modules: Any, sample: Any, timestep: Any, text_states: Any, text_pooled: Any) -> Any:
    """[B, C, h, w], [B] from 1 to 0, and the prompt's to the predicted noise: [B, C, h, w]."""
    unet = modules.prior_prior
    nothing = sample.new_zeros(sample.shape[0], 1, unet.config.clip_image_in_channels)  # no picture beside the prompt
    return unet(sample, timestep, text_pooled, text_states, nothing, return_dict=False)[0]


def draw_latents(modules: Any, sample: Any, timestep: Any, text_pooled: Any, image_embeddings: Any) -> Any:
    """[B, 4, h, w], [B] from 1 to 0, the prompt's, and the prior's map to the predicted noise: [B, 4, h, w]."""
    return modules.decoder(sample, timestep, text_pooled, effnet=image_embeddings, return_dict=False)[0]


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, 4, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    return modules.vqgan.decode(sample * modules.vqgan.config.scale_factor, return_dict=False)[0].clamp(0, 1)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size, (height, width) in pixels, that the model was trained for."""
    return SIDE, SIDE


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for options and sizes that they do not meet in."""
    config = {name: part.config for name, part in checkpoint.components.items()}
    small, large = samples(checkpoint, shape)
    tokens = parts.tokens(checkpoint, "prior_text_encoder", "tokens")
    width = parts.whole("prior_text_encoder", config["prior_text_encoder"], "hidden_size", 512)
    projected = parts.whole("prior_text_encoder", config["prior_text_encoder"], "projection_dim", 512)
    check_widths(
        config,
        {
            "prior_prior": {"clip_text_in_channels": width, "clip_text_pooled_in_channels": projected},
            "decoder": {"clip_text_pooled_in_channels": projected, "effnet_in_channels": small[0]},
        },
    )
    parts.whole("prior_prior", config["prior_prior"], "clip_image_in_channels", 768)
    states = Tensor("text_states", "float32", (*tokens.shape, width))
    pooled = Tensor("text_pooled", "float32", ("batch", 1, projected))
    timestep, given = Tensor("timestep", "float32", ("batch",)), Tensor(GIVEN, "float32", ("batch", *small))
    latents = Tensor("sample", "float32", ("batch", *large))
    image = Tensor("image", "float32", ("batch", 3, shape.height, shape.width))

    def both(sample: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return Tensor("sample", "float32", ("batch", *sample)), Tensor("output", "float32", ("batch", *sample))

    (first, first_output), (second, second_output) = both(small), both(large)
    encoder, files = config["prior_text_encoder"], checkpoint.tokenizers["prior_tokenizer"]
    build_text = {"prior_text_encoder": text_encoders.padded(parts.build_projected_text, encoder, files)}
    build_prior = {"prior_prior": lambda: build_unet(config["prior_prior"])}
    build_decoder = {"decoder": lambda: build_unet(config["decoder"])}
    build_vqgan = {"vqgan": lambda: build_paella(config["vqgan"])}
    return {
        "text": Spec("text", build_text, text, (tokens,), (states, pooled), {}),
        "prior": Spec("denoiser", build_prior, draw_map, (first, timestep, states, pooled), (first_output,), {}),
        "denoiser": Spec(
            "denoiser", build_decoder, draw_latents, (second, timestep, pooled, given), (second_output,), {}
        ),
        "decoder": Spec("decoder", build_vqgan, decode, (latents,), (image,), {}),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """The prior, guided, and the decoder, which goes by the map that the prior draws."""
    return two_stages(checkpoint, samples(checkpoint, shape), (STEPS, DECODER_STEPS))


def two_stages(
    checkpoint: Checkpoint, shapes: tuple[tuple[int, ...], tuple[int, ...]], steps: tuple[int, int]
) -> tuple[Stage, ...]:
    """The prior's loop and the decoder's, for samples of these shapes and with so many steps each."""
    small, large = shapes
    return (
        Stage(
            "prior", "prior", "text", None, None, small, 1, checkpoint.scheduler, Guidance("cfg", GUIDANCE), steps[0],
            gives=GIVEN,
        ),
        Stage(
            "decoder", "denoiser", "text", "decoder", None, large, _factor(checkpoint),
            checkpoint.schedulers["scheduler"], Guidance("none", 1.0), steps[1],
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The prior's tokenizer's ids go to ``tokens``."""
    _, length = parts.tokens(checkpoint, "prior_text_encoder", "tokens").shape
    return {"prior_tokenizer": Tokens("tokens", int(length))}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids and for statistics of the VQ's encoder."""
    if name.endswith(("embeddings.position_ids", "running_mean", "running_var", "num_batches_tracked")):
        return None
    return name


def _factor(checkpoint: Checkpoint) -> int:
    """Pixels for each latent of Paella's."""
    config = checkpoint.components["vqgan"].config
    halved = 1 << (parts.whole("vqgan", config, "levels", 2) - 1)
    return parts.whole("vqgan", config, "up_down_scale_factor", 2) * halved


def samples(
    checkpoint: Checkpoint, shape: Shape, option: str = "in_channels"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the prior's map and of the latents, as diffusers' pipelines make them of a size in pixels.

    ``option``: in the two UNets' config.json, what says their channels. Raises DexportError for sizes that the two do
    not meet in, and for free ones.
    """
    if shape.free:
        raise DexportError("the maps of this model are of one size; leave --dynamic-shape out, and choose with --shape")
    index, config = checkpoint.index, {name: part.config for name, part in checkpoint.components.items()}
    pixels = parts.number("model_index", index, "prior_resolution_multiple", PIXELS)
    latents = parts.number("model_index", index, "latent_dim_scale", LATENTS)
    if min(pixels, latents) < 1:
        raise DexportError("model_index.json: resolution_multiple and latent_dim_scale must be 1 or more")
    sides = [math.ceil(side / pixels) for side in (shape.height, shape.width)]
    large = [int(side * latents) for side in sides]
    factor = _factor(checkpoint)
    if [side * factor for side in large] != [shape.height, shape.width]:
        near = [side * factor for side in large]
        raise DexportError(
            f"{shape.height}x{shape.width} pixels: this model's maps make {near[0]}x{near[1]} of it; choose that, or "
            "multiples of 128 pixels"
        )
    map_channels = parts.whole("prior_prior", config["prior_prior"], option, 16)
    channels = parts.whole("decoder", config["decoder"], option, 4)
    return (map_channels, *sides), (channels, *large)


def check_widths(config: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, int]]) -> None:
    """Raise DexportError for UNets that do not take what the text encoders and the prior give, by option of each."""
    for name, options in wanted.items():
        for option, size in options.items():
            if config[name].get(option) != size:
                raise DexportError(f"{name}/config.json: {option}={config[name].get(option)!r:.60} must be {size}")


def build_unet(config: Mapping[str, Any]) -> Any:
    """A UNet of this config.json."""
    from diffusers import StableCascadeUNet

    unet = StableCascadeUNet.from_config(dict(config))
    unet.get_timestep_ratio_embedding = times(unet, unet.config.timestep_ratio_embedding_dim)
    return unet


def times(unet: Any, width: int) -> Callable[[Any], Any]:
    """What embeds times from 1 to 0, [B] to [B, ``width``], with frequencies as torch computes them, put in ``unet``.

    They turn through thousands of radians, so that another last bit of them would be seen in the pictures.
    """
    import torch

    half = width // 2
    steps = torch.arange(half).float().mul(-math.log(POSITIONS) / (half - 1)).exp()
    unet.register_buffer("frequencies", steps, persistent=False)

    def embedding(ratio: Any) -> Any:
        angles = (ratio * POSITIONS)[:, None] * unet.frequencies
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
        return torch.nn.functional.pad(embedded, (0, width % 2))

    return embedding


def build_paella(config: Mapping[str, Any]) -> Any:
    """A VQ autoencoder of this config.json."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return PaellaVQModel.from_config(dict(config))
