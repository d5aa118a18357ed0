"""Kandinsky 2.2: a prior draws CLIP's embedding of a picture, of which a UNet draws latents; MoVQ autoencoder.

Razzhigaev et al., "Kandinsky: an Improved Text-to-Image Synthesis with Image Prior and Latent Diffusion" (2023),
https://arxiv.org/abs/2310.03502; the prior is that of Ramesh et al., "unCLIP" (2022), https://arxiv.org/abs/2204.06125.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts, prior, unet2d
from exporter.families.latent_diffusion import build_vq
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Start, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "kandinsky"
COMPONENTS = {
    "prior_prior": ("PriorTransformer",),
    "prior_text_encoder": ("CLIPTextModelWithProjection",),
    "prior_image_encoder": ("CLIPVisionModelWithProjection",),
    "prior_tokenizer": CLIP_TOKENIZERS,
    "unet": ("UNet2DConditionModel",),
    "movq": ("VQModel",),
}
SCHEDULERS = ("scheduler", "prior_scheduler")
GUIDANCE, PRIOR_GUIDANCE = 4.0, 4.0  # diffusers' own
STEPS, PRIOR_STEPS = 50, 25  # of the decoder the authors' own, half of diffusers'
STRENGTH = 0.3  # of KandinskyV22Img2ImgCombinedPipeline
PRIOR = prior.Prior("prior_prior", "prior_text_encoder", "image_embeds")

rename = parts.rename


def denoiser(modules: Any, sample: Any, timestep: Any, image_embeds: Any) -> Any:
    """[B, 4, h, w], [B], [B, D] to the predicted noise and what it learned of the variance: [B, 8, h, w]."""
    told = {"image_embeds": image_embeds}
    return modules.unet(sample, timestep, None, added_cond_kwargs=told, return_dict=False)[0]


def noise_only(modules: Any, sample: Any, timestep: Any, image_embeds: Any) -> Any:
    """Likewise, without the variance: [B, 4, h, w]."""
    return denoiser(modules, sample, timestep, image_embeds)[:, : sample.shape[1]]


def embedding(modules: Any, sample: Any) -> tuple[Any, Any]:
    """What the prior has drawn, [B, D], to CLIP's embedding, and to that of a black picture, which guidance leaves."""
    drawn = modules.prior_prior.post_process_latents(sample)
    return drawn, modules.prior_image_encoder.nothing.expand_as(drawn)


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    image = modules.movq.decode(sample, force_not_quantize=True, return_dict=False)[0]
    return (image / 2 + 0.5).clamp(0, 1)


def encode(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to latents: [B, C, h, w]."""
    return modules.movq.encode(image * 2 - 1, return_dict=False)[0]


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size, (height, width) in pixels, of a checkpoint whose UNet says its latents'."""
    height, width = parts.sides("unet", "sample_size", checkpoint.components["unet"].config.get("sample_size") or 64)
    factor = parts.pixels_per_latent(checkpoint, "movq")
    return height * factor, width * factor


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The six graphs. Raises DexportError for another UNet, and for sizes that have no whole latents."""
    config, drawn = checkpoint.components["unet"].config, _canvas(checkpoint, shape)
    unet2d.check_shape(shape.height, shape.width, drawn.factor * _multiple(checkpoint))
    if (config.get("encoder_hid_dim_type"), config.get("addition_embed_type")) != ("image_proj", "image"):
        raise DexportError(
            f"unet/config.json: encoder_hid_dim_type={config.get('encoder_hid_dim_type')!r:.60} and "
            f"addition_embed_type={config.get('addition_embed_type')!r:.60} are not Kandinsky 2.2's"
        )
    taken, given = parts.whole("unet", config, "in_channels", 4), parts.whole("unet", config, "out_channels", 4)
    if (taken, given) != (drawn.channels, 2 * drawn.channels):
        raise DexportError(
            f"unet/config.json: {taken} channels in and {given} out where the autoencoder has {drawn.channels}; there "
            "must be as many in and twice as many out; inpainting and depth models are not supported"
        )
    learned = checkpoint.scheduler.get("variance_type") in parts.LEARNED
    output = Tensor("output", "float32", ("batch", given if learned else taken, *drawn.sample.shape[2:]))
    embeds = PRIOR.embedding(checkpoint)
    nothing = Tensor(f"negative_{embeds.name}", "float32", embeds.shape)
    latent = Tensor("sample", "float32", embeds.shape)
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), embeds)
    build_unet = {"unet": lambda: parts.build_unet(config)}
    build_movq = {"movq": lambda: build_vq(checkpoint.components["movq"].config)}
    build_embedding = {
        **PRIOR.builder(checkpoint), "prior_image_encoder": lambda: prior.black(checkpoint, "prior_image_encoder")
    }  # fmt: skip
    return {
        **PRIOR.specs(checkpoint),
        "embedding": Spec("decoder", build_embedding, embedding, (latent,), (embeds, nothing), {}),
        "denoiser": Spec(
            "denoiser", build_unet, denoiser if learned else noise_only, inputs, (output,), drawn.latent_sizes
        ),
        "decoder": Spec("decoder", build_movq, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", build_movq, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """The prior, which gives its embedding to the decoder."""
    drawn = _canvas(checkpoint, shape)
    sample = (drawn.channels, shape.height // drawn.factor, shape.width // drawn.factor)
    return (
        replace(
            PRIOR.stage(checkpoint, "embedding", checkpoint.schedulers["prior_scheduler"], PRIOR_GUIDANCE, PRIOR_STEPS),
            gives_negative=True,
        ),
        Stage(
            "decoder", "denoiser", None, "decoder", "encoder", sample, drawn.factor, checkpoint.scheduler,
            Guidance("cfg", GUIDANCE), STEPS, multiple=_multiple(checkpoint), image_to_image=Start(strength=STRENGTH),
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The prior's tokenizer's ids go to ``tokens``."""
    return {"prior_tokenizer": PRIOR.tokens(checkpoint)}


def _multiple(checkpoint: Checkpoint) -> int:
    """What the latents' sides must be multiples of: the autoencoder's factor, as diffusers rounds them, and the UNet's.

    Its blocks double what they were given, and do not meet a skip connection of an odd size.
    """
    halved = 1 << (len(parts.blocks("unet", checkpoint.components["unet"].config, [64])) - 1)
    return math.lcm(parts.pixels_per_latent(checkpoint, "movq"), halved)


def _canvas(checkpoint: Checkpoint, shape: Shape) -> parts.Canvas:
    config = checkpoint.components["movq"].config
    channels = parts.whole("movq", config, "vq_embed_dim", parts.whole("movq", config, "latent_channels", 4))
    return parts.draw_canvas(channels, parts.pixels_per_latent(checkpoint, "movq"), shape)
