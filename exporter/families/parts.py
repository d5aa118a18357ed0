"""What several families are made of: the KL autoencoder, and readings of configs that say what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec
from runtimes.errors import DexportError
from runtimes.manifest import Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

Config = Mapping[str, Any]
SIDE = 65536  # the largest picture, latent, width or length that a config may ask for
BLOCKS = 10  # of a UNet or an autoencoder; the largest of them have 7
LARGEST = 1e6  # magnitude of what latents are scaled and shifted by
# Names of attention in autoencoders and unconditional UNets before diffusers 0.14, and those of today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Canvas:
    """The tensors of a picture and of its latents, and the sizes to trace them with."""

    channels: int  # of the latents
    factor: int  # pixels of the picture for each latent
    sample: Tensor
    image: Tensor
    latent_sizes: Mapping[str, int]
    # A UNet that meets sizes which its downsampling does not divide upsamples to the size of each skip connection,
    # which is right for all sizes; traced with sizes that it does divide, it would only ever double.
    odd_sizes: Mapping[str, int]
    pixel_sizes: Mapping[str, int]


def canvas(checkpoint: Checkpoint, shape: Shape) -> Canvas:
    """The canvas of a checkpoint with a KL autoencoder; DexportError for a size that has no whole latents."""
    vae = checkpoint.components["vae"].config
    latent_scale("vae", vae)  # a scale that makes no sense is said now, not after the other graphs
    return draw_canvas(whole("vae", vae, "latent_channels", 4), pixels_per_latent(checkpoint), shape)


def draw_canvas(channels: int, factor: int, shape: Shape) -> Canvas:
    """The canvas of latents with these channels, each of ``factor`` pixels a side."""
    if shape.height % factor or shape.width % factor or min(shape.height, shape.width) < factor:
        raise DexportError(f"{shape.height}x{shape.width} pixels: this model needs multiples of {factor}")
    height, width = shape.height // factor, shape.width // factor
    small = ("height", "width") if shape.free else (height, width)
    large = ("image_height", "image_width") if shape.free else (shape.height, shape.width)
    return Canvas(
        channels,
        factor,
        Tensor("sample", "float32", ("batch", channels, *small)),
        Tensor("image", "float32", ("batch", 3, *large)),
        {"height": height, "width": width},
        {"height": height | 1, "width": width | 1},
        {"image_height": shape.height, "image_width": shape.width},
    )


def autoencoder(checkpoint: Checkpoint, drawn: Canvas) -> dict[str, Spec]:
    """The decoder and the encoder of a KL autoencoder."""
    config = checkpoint.components["vae"].config
    build = {"vae": lambda: build_vae(config)}
    return {
        "decoder": Spec("decoder", build, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", build, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    scale, shift = latent_scale("vae", modules.vae.config)
    image = modules.vae.decode(sample / scale + shift, return_dict=False)[0]  # in [-1, 1], and a little beyond
    return (image / 2 + 0.5).clamp(0, 1)


def encode(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to the mode of its latents' distribution: [B, C, h, w]."""
    scale, shift = latent_scale("vae", modules.vae.config)
    return (modules.vae.encode(image * 2 - 1, return_dict=False)[0].mode() - shift) * scale


def latent_scale(component: str, config: Config) -> tuple[float, float]:
    """The loop's latents are (the autoencoder's − shift) · scale; 0.18215 is the paper's, and diffusers' default."""
    return number(component, config, "scaling_factor", 0.18215), number(component, config, "shift_factor", 0.0)


def number(component: str, config: Config, name: str, default: float) -> float:
    """A config's number; DexportError for what is none, and for a scale that is not above 0."""
    value = config.get(name)
    if value is None:
        value = default
    # A scale of 0 would erase every picture, and the decoder divides by it.
    if type(value) not in (int, float) or not abs(value) <= LARGEST or (name == "scaling_factor" and value <= 0):
        raise DexportError(f"{component}/config.json: {name}={value!r:.60} is not a usable number")
    return float(value)


def whole(component: str, config: Config, name: str, default: int) -> int:
    """A config's whole number from 1; DexportError for what is none."""
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= SIDE:
        raise DexportError(f"{component}/config.json: {name}={value!r:.60} must be a whole number from 1 to {SIDE}")
    return value


def sides(component: str, name: str, value: Any) -> tuple[int, int]:
    """Height and width, which a config has as one number or as two."""
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= SIDE for side in pair):
        raise DexportError(
            f"{component}/config.json: {name}={value!r:.60} must be a whole number from 1 to {SIDE}, or two of them"
        )
    return pair[0], pair[1]


def blocks(component: str, config: Config, default: Sequence[int]) -> list[int]:
    """The channels of each block of a UNet or an autoencoder; it halves the picture between two of them."""
    value = config.get("block_out_channels", list(default))
    if not isinstance(value, list) or not 1 <= len(value) <= BLOCKS or any(type(n) is not int or n < 1 for n in value):
        raise DexportError(
            f"{component}/config.json: block_out_channels={value!r:.60} must be a list of 1 to {BLOCKS} whole numbers "
            "from 1"
        )
    return value


def pixels_per_latent(checkpoint: Checkpoint, component: str = "vae") -> int:
    """Pixels of the picture for each latent: the autoencoder halves between its blocks."""
    return int(1 << (len(blocks(component, checkpoint.components[component].config, [64])) - 1))


def rename_attention(name: str) -> str:
    """Today's name of a tensor of an attention that may have its name from before diffusers 0.14."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}{OLD_ATTENTION[match[2]]}.",
        name,
    )


def build_vae(config: Config) -> Any:
    """An autoencoder of this config.json."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))
