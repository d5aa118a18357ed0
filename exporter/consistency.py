"""The consistency decoder in place of an autoencoder's: it draws the picture out of noise, going by the latents.

It was published with DALL-E 3 for the latents of Stable Diffusion 1: https://github.com/openai/consistencydecoder,
after Song et al., "Consistency Models" (2023), https://arxiv.org/abs/2303.01469; diffusers' ConsistencyDecoderVAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.families import Shape, Spec, parts
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

CLASS = "ConsistencyDecoderVAE"
COMPONENT = "consistency_decoder"  # of a checkpoint that it was given to with --decoder
GIVEN = "latents"
COLOURS, STEPS = 3, 2
SCHEDULER = {"_class_name": "ConsistencyDecoderScheduler"}


def component(checkpoint: Checkpoint) -> str | None:
    """The component of a checkpoint that is a consistency decoder, if one is."""
    if COMPONENT in checkpoint.components:
        return COMPONENT
    vae = checkpoint.components.get("vae")
    return "vae" if vae is not None and vae.class_name == CLASS else None


def check(checkpoint: Checkpoint) -> None:
    """Raise DexportError where a decoder that was given is not for the latents of the checkpoint's autoencoder."""
    part, vae = checkpoint.components[COMPONENT], checkpoint.components.get("vae")
    if vae is None:
        raise DexportError(
            f"{part.path}: it draws from latents of Stable Diffusion 1's autoencoder, which a {checkpoint.pipeline} "
            "does not have; leave --decoder out"
        )
    own, theirs = (
        (parts.whole(name, one.config, "latent_channels", 4), parts.latent_scale(name, one.config))
        for name, one in ((COMPONENT, part), ("vae", vae))
    )
    if own != theirs:
        raise DexportError(
            f"{part.path}: its latents have {_described(*own)}, those of {checkpoint.path} {_described(*theirs)}; "
            "leave --decoder out"
        )


def _described(channels: int, normal: tuple[Any, Any]) -> str:
    scale, shift = (", ".join(f"{number:.4g}" for number in np.atleast_1d(value)) for value in normal)
    return f"{channels} channels, scale {scale}, shift {shift}"


def specs(checkpoint: Checkpoint, shape: Shape) -> dict[str, Spec]:
    """The three graphs: what it goes by, of the latents; its denoiser; and the picture of what that has drawn."""
    name = str(component(checkpoint))
    config, drawn = checkpoint.components[name].config, parts.canvas(checkpoint, shape)
    if parts.pixels_per_latent(checkpoint, name) != drawn.factor:
        raise DexportError(f"{checkpoint.components[name].path}: its pictures are not {drawn.factor} pixels a latent")
    channels = parts.whole(name, config, "decoder_in_channels", 7)
    if channels != COLOURS + drawn.channels:
        raise DexportError(f"{name}/config.json: decoder_in_channels={channels} must be {COLOURS + drawn.channels}")
    sides = drawn.image.shape[2:]
    sample, output = (Tensor(item, "float32", ("batch", COLOURS, *sides)) for item in ("sample", "output"))
    given = Tensor(GIVEN, "float32", ("batch", drawn.channels, *sides))
    build_decoder = {name: lambda: build(config)}

    def enlarged(modules: Any, sample: Any) -> Any:
        """Latents [B, 4, h, w] as they are put beside the picture: [B, 4, H, W]."""
        import torch

        decoder = modules.get_submodule(name)
        normal = (sample - decoder.means) / decoder.stds
        return torch.nn.functional.interpolate(normal, mode="nearest", scale_factor=float(drawn.factor))

    def denoiser(modules: Any, sample: Any, timestep: Any, latents: Any) -> Any:
        import torch

        both = torch.cat([sample, latents], dim=1)
        return modules.get_submodule(name).decoder_unet(both, timestep.long(), return_dict=False)[0][:, :COLOURS]

    def picture(modules: Any, sample: Any) -> Any:
        return (sample / 2 + 0.5).clamp(0, 1)

    inputs = (sample, Tensor("timestep", "float32", ("batch",)), given)
    return {
        "latents": Spec("decoder", build_decoder, enlarged, (drawn.sample,), (given,), drawn.latent_sizes),
        "consistency": Spec("denoiser", build_decoder, denoiser, inputs, (output,), drawn.pixel_sizes),
        "decoder": Spec("decoder", {}, picture, (sample,), (drawn.image,), drawn.pixel_sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape, before: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages that end with latents, and the one that draws the picture."""
    config = checkpoint.components[str(component(checkpoint))].config
    halved = 1 << (len(config.get("decoder_block_out_channels") or range(4)) - 1)
    return (
        *before[:-1],
        replace(before[-1], decoder="latents", gives=GIVEN),
        Stage(
            "consistency", "consistency", None, "decoder", None, (COLOURS, shape.height, shape.width), 1, SCHEDULER,
            Guidance("none", 1.0), STEPS, multiple=halved,
        ),
    )  # fmt: skip


def encoder(config: Mapping[str, Any], drawn: parts.Canvas) -> dict[str, Spec]:
    """The encoder of a checkpoint whose autoencoder is one with this decoder."""
    scale, _ = parts.latent_scale("vae", config)

    def encode(modules: Any, image: Any) -> Any:
        return modules.vae.encode(image * 2 - 1, return_dict=False)[0].mode() * scale

    return {
        "encoder": Spec(
            "encoder", {"vae": lambda: build(config)}, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes
        )
    }


def build(config: Mapping[str, Any]) -> Any:
    """An encoder with a consistency decoder, of this config.json."""
    from diffusers import ConsistencyDecoderVAE

    return ConsistencyDecoderVAE.from_config(dict(config))
