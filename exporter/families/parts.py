"""What several families are made of: CLIP text encoders, the conditional UNet, the KL autoencoder.

Their builders, the graphs around the autoencoder, and readings of their configs that say what is wrong with a value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec
from runtimes.errors import DexportError
from runtimes.manifest import SEQUENCE, Guidance, Stage, Start, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

Config = Mapping[str, Any]
SIDE = 65536  # the largest picture, latent, width or length that a config may ask for
BLOCKS = 10  # of a UNet or an autoencoder; the largest of them have 7
STATES = ("encoder_hidden_states",)  # of CLIP, one for each token
LARGEST = 1e6  # magnitude of what latents are scaled and shifted by
LEARNED = ("learned", "learned_range")  # variance_type of schedulers that take it from the model
# Names of attention in autoencoders and unconditional UNets before diffusers 0.14, and those of today.
# How diffusers' flow pipelines start from an image; of those that have no class for masks, all steps are made of one.
FLOW: Mapping[str, Any] = {"image_to_image": Start("ceil", 0.6), "inpaint": Start("ceil", 0.6)}
UNMASKED_FLOW: Mapping[str, Any] = {**FLOW, "inpaint": Start("ceil", 1.0)}
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

    def stage(
        self, checkpoint: Checkpoint, guidance: Guidance, steps: int, *, text: str | None = "text",
        scheduler: Mapping[str, Any] | None = None, **options: Any,
    ) -> Stage:  # fmt: skip
        """The one loop of a model whose graphs have their plain names; ``options``: more of ``Stage``."""
        sample = (self.channels, self.latent_sizes["height"], self.latent_sizes["width"])
        return Stage(
            "base", "denoiser", text, "decoder", "encoder", sample, self.factor, scheduler or checkpoint.scheduler,
            guidance, steps, **options,
        )  # fmt: skip


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
    """The decoder and the encoder of a KL autoencoder; of one with a consistency decoder, the encoder alone."""
    config = checkpoint.components["vae"].config
    if checkpoint.components["vae"].class_name == "ConsistencyDecoderVAE":
        from exporter import consistency

        return consistency.encoder(config, drawn)
    if checkpoint.components["vae"].class_name == "AutoencoderTiny":
        from exporter import tiny_decoder

        return tiny_decoder.autoencoder(config, drawn)
    build = {"vae": lambda: build_vae(config)}
    return {
        "decoder": Spec("decoder", build, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", build, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    scale, shift = _own_scale(modules.vae)
    image = modules.vae.decode(sample / scale + shift, return_dict=False)[0]  # in [-1, 1], and a little beyond
    return (image / 2 + 0.5).clamp(0, 1)


def encode(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to the mode of its latents' distribution: [B, C, h, w]."""
    scale, shift = _own_scale(modules.vae)
    return (modules.vae.encode(image * 2 - 1, return_dict=False)[0].mode() - shift) * scale


def _own_scale(vae: Any) -> tuple[Any, Any]:
    """The scale and shift of an autoencoder from ``build_vae``: numbers, or buffers with one for each channel."""
    if hasattr(vae, "channel_scale"):
        return vae.channel_scale, vae.channel_shift
    return latent_scale("vae", vae.config)


def latent_scale(component: str, config: Config) -> tuple[Any, Any]:
    """The loop's latents are (vae latents − shift) · scale: two numbers, or two lists with one for each channel.

    ``scaling_factor`` 0.18215 is the paper's, and diffusers' default; ``latents_mean`` and ``latents_std`` make each
    channel normal before.
    """
    scale, shift = (
        number(component, config, "scaling_factor", 0.18215),
        number(component, config, "shift_factor", 0.0),
    )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, shift
    check_normal(component, mean, std, whole(component, config, "latent_channels", 4))
    return [scale / deviation for deviation in std], [float(value) for value in mean]


def check_normal(component: str, mean: Any, std: Any, channels: int) -> None:
    """Raise DexportError unless ``mean`` and ``std`` of a config are usable numbers, one for each channel."""
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        fits = isinstance(values, list | tuple) and len(values) == channels
        if not fits or not all(type(v) in (int, float) and abs(v) <= LARGEST for v in values):
            raise DexportError(f"{component}/config.json: {name}={values!r:.60} must be {channels} usable numbers")
    if min(std) <= 0:
        raise DexportError(f"{component}/config.json: latents_std={std!r:.60} must be above 0")


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


def blocks(component: str, config: Config, default: Sequence[int], name: str = "block_out_channels") -> list[int]:
    """The channels of each block of a UNet or an autoencoder; it halves the picture between two of them."""
    value = config.get(name, list(default))
    if not isinstance(value, list) or not 1 <= len(value) <= BLOCKS or any(type(n) is not int or n < 1 for n in value):
        raise DexportError(
            f"{component}/config.json: {name}={value!r:.60} must be a list of 1 to {BLOCKS} whole numbers from 1"
        )
    return value


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size, (height, width) in pixels, of a checkpoint whose UNet says its latents'."""
    height, width = sides("unet", "sample_size", checkpoint.components["unet"].config.get("sample_size") or 64)
    factor = pixels_per_latent(checkpoint)
    return height * factor, width * factor


def pixels_per_latent(checkpoint: Checkpoint, component: str = "vae") -> int:
    """Pixels of the picture for each latent: the autoencoder halves between its blocks."""
    return int(1 << (len(blocks(component, checkpoint.components[component].config, [64])) - 1))


def painting(checkpoint: Checkpoint, drawn: Canvas) -> tuple[Tensor, ...]:
    """The inputs ``mask`` and ``masked_sample`` of a UNet that was trained to paint into a picture; () of another one.

    Raises DexportError for a UNet that takes or gives something else than the autoencoder's channels.
    """
    config, channels = checkpoint.components["unet"].config, drawn.channels
    taken, given = config.get("in_channels", 4), config.get("out_channels", 4)
    paints = "Inpaint" in checkpoint.pipeline and taken == 2 * channels + 1
    if given != channels or not (taken == channels or paints):
        hint = "; for an inpainting model, model_index.json names an inpainting pipeline" * (taken == 2 * channels + 1)
        raise DexportError(
            f"unet/config.json: {taken!r:.60} channels in and {given!r:.60} out where the autoencoder has {channels}; "
            f"upscaling models and others that are shown a picture so are not supported{hint}"
        )
    if not paints:
        return ()
    return (
        replace(drawn.sample, name="mask", shape=("batch", 1, *drawn.sample.shape[2:])),
        replace(drawn.sample, name="masked_sample"),
    )


def painter(denoiser: Callable[..., Any]) -> Callable[..., Any]:
    """A denoiser over [B, C, h, w] and ``painting``'s [B, 1, h, w] and [B, C, h, w], joined: [B, 2 C + 1, h, w].

    In the order of the released models, those of Rombach et al. (2022), https://arxiv.org/abs/2112.10752.
    """

    def paint(modules: Any, sample: Any, mask: Any, masked_sample: Any, *others: Any) -> Any:
        import torch

        return denoiser(modules, torch.cat([sample, mask, masked_sample], dim=1), *others)

    return paint


def check_transformer(config: Config, channels: int, packed: int = 1) -> None:
    """Raise DexportError for a transformer that takes or gives something else than the autoencoder's ``channels``.

    packed: the side of the patches in which it takes them.
    """
    wanted = channels * packed * packed
    taken = whole("transformer", config, "in_channels", wanted)
    given = whole("transformer", config, "out_channels", taken)
    if (taken, given) != (wanted, wanted):
        raise DexportError(
            f"transformer/config.json: {taken} channels in and {given} out where the autoencoder's latents have "
            f"{wanted}; models that are shown a picture (inpainting, editing) are not supported"
        )


def check_width(checkpoint: Checkpoint, name: str, default: int, given: int) -> None:
    """Raise DexportError for a transformer that takes text of another width than the encoders give."""
    width = whole("transformer", checkpoint.components["transformer"].config, name, default)
    if width != given:
        raise DexportError(f"transformer/config.json: {name}={width} where the text encoders give {given}")


def check_axes(config: Config, name: str, default: Sequence[int], head: int) -> None:
    """Raise DexportError unless the channels of a head that turn by each axis are even and make the whole head."""
    value = config.get(name) or list(default)
    whole_ = isinstance(value, list | tuple) and len(value) == len(default) and all(type(n) is int for n in value)
    if not whole_ or any(n < 2 or n % 2 for n in value) or sum(value) != head:
        raise DexportError(
            f"transformer/config.json: {name}={value!r:.60} must be {len(default)} even numbers from 2 that make the "
            f"{head} channels of a head"
        )


def check_patches(shape: Shape, multiple: int, most: int) -> None:
    """Raise DexportError for a picture without whole tokens, or larger than ``most``; both in pixels."""
    if shape.height % multiple or shape.width % multiple:
        raise DexportError(f"{shape.height}x{shape.width} pixels: this model needs multiples of {multiple}")
    if max(shape.height, shape.width) > most:
        raise DexportError(f"{shape.height}x{shape.width} pixels: this model knows positions up to {most} pixels")


def tokens(checkpoint: Checkpoint, component: str, name: str, tokenizer: str | None = None) -> Tensor:
    """The token ids that a CLIP text encoder takes: as many as its tokenizer fills up to.

    tokenizer: the component that says how many, where that is not the encoder's own. Raises DexportError where the
    encoder has positions for fewer, in which diffusers fails.
    """
    most = whole(component, checkpoint.components[component].config, "max_position_embeddings", 77)
    files = checkpoint.tokenizers[tokenizer or component.replace("text_encoder", "tokenizer")]
    length = files.made.limit
    if length is None or length > most:
        said = "names no model_max_length" if length is None else f"says model_max_length={length}"
        raise DexportError(
            f"{files.path}: its tokenizer_config.json {said}, and the {component} has {most} positions; "
            f"set model_max_length to {most}"
        )
    return Tensor(name, "int64", ("batch", length))


def long_prompts(checkpoint: Checkpoint, spec: Spec, states: Tensor) -> Spec:
    """A denoiser that takes the states [B, S, D] of as many chunks of a prompt as the checkpoint is to take.

    Free, not as long as the longest prompt: a short one then has the very states that it has without this.
    """
    if checkpoint.chunks == 1:
        return spec
    batch, length, width = states.shape
    assert isinstance(length, int)
    free = replace(states, shape=(batch, SEQUENCE, width))
    return replace(
        spec,
        inputs=tuple(free if tensor == states else tensor for tensor in spec.inputs),
        example={**spec.example, SEQUENCE: 2 * length},
        sizes={SEQUENCE: (length, checkpoint.chunks * length)},
    )


def guidance(config: Config, scale: float) -> Guidance:
    """Classifier-free guidance, or one call where the UNet was distilled to know the scale."""
    return Guidance("cfg" if config.get("time_cond_proj_dim") is None else "embedded", scale)


def further_inputs(config: Config) -> tuple[Tensor, ...]:
    """The input of a UNet that was distilled to know the scale of guidance."""
    if config.get("time_cond_proj_dim") is None:
        return ()
    whole("unet", config, "time_cond_proj_dim", 256)
    return (Tensor("guidance", "float32", ("batch",)),)


def guidance_embedding(unet: Any, scale: Any) -> Any:
    """Scales of guidance [B] to the ``timestep_cond`` of a distilled UNet: [B, time_cond_proj_dim].

    Luo et al., "Latent Consistency Models" (2023), https://arxiv.org/abs/2310.04378, count from a scale of 0 where the
    user's, like diffusers', counts from 1: w = scale − 1.
    """
    import torch

    angles = (scale[:, None] - 1) * 1000 * unet.guidance_frequencies
    embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedded, (0, unet.config.time_cond_proj_dim % 2))


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids, which are no weights.

    transformers dropped the level "text_model." from CLIPTextModel; the checkpoints have it, and the class with a
    projection ("text_encoder_2") keeps it. diffusers gave the autoencoder's attention its present names in 0.14.
    """
    if name.endswith("embeddings.position_ids"):
        return None
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    if component == "vae":
        return rename_attention(name)
    return name


def rename_attention(name: str) -> str:
    """Today's name of a tensor of an attention that may have its name from before diffusers 0.14."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}{OLD_ATTENTION[match[2]]}.",
        name,
    )


def build_text(config: Config) -> Any:
    """A CLIP text encoder of this config.json."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def build_projected_text(config: Config) -> Any:
    """A CLIP text encoder of this config.json that also gives its projected, pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def build_unet(config: Config) -> Any:
    """A UNet of this config.json; with the frequencies of ``guidance_embedding`` if it knows the scale of guidance."""
    from diffusers import UNet2DConditionModel

    return with_guidance(UNet2DConditionModel.from_config(dict(config)))


def with_guidance(unet: Any) -> Any:
    """The UNet with the frequencies of ``guidance_embedding``, if it knows the scale of guidance."""
    import torch

    if unet.config.time_cond_proj_dim is not None:
        half = unet.config.time_cond_proj_dim // 2
        steps = torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / max(half - 1, 1))
        unet.register_buffer("guidance_frequencies", steps.exp(), persistent=False)
    return unet


def build_vae(config: Config) -> Any:
    """An autoencoder of this config.json, with the scale and shift of each channel where it has them."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(dict(config))
    scale, shift = latent_scale("vae", config)
    if isinstance(scale, list):
        for name, values in (("channel_scale", scale), ("channel_shift", shift)):
            vae.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
    return vae
