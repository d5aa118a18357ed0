"""What steers a UNet by a picture, in the graphs: inputs of the denoiser, and graphs that run once for each picture.

The denoiser calls its UNet as it always does; what stands in its place runs the ControlNets on the same arguments, and
hands their residuals, the features of T2I-Adapters and the tokens of IP-Adapters on to the UNet.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023), https://arxiv.org/abs/2302.05543;
Mou et al., "T2I-Adapter" (2023), https://arxiv.org/abs/2302.08453; for IP-Adapter see ``exporter.ip_adapter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from operator import add
from typing import Any

from exporter import ip_adapter
from exporter.checkpoint import Checkpoint, Component
from exporter.families import Shape, Spec, parts
from exporter.ip_adapter import CLASS, IMAGE_ENCODER
from runtimes.check import NEGATIVE
from runtimes.errors import DexportError
from runtimes.manifest import HintInput, Stage, Tensor

DENOISER = "denoiser"  # the graph that is steered
CONTROL = "ControlNetModel"
STRENGTH = 0.8  # from image to image with a ControlNet, of every class of diffusers
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes a picture grey
# What a ControlNet must have as the UNet has it, for its residuals to fit; with the default of both classes.
SAME = {
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 1280,
    "addition_embed_type": None, "class_embed_type": None, "encoder_hid_dim_type": None,
    "projection_class_embeddings_input_dim": None,
}  # fmt: skip


def specs(checkpoint: Checkpoint, shape: Shape, own: Mapping[str, Spec]) -> Mapping[str, Spec]:
    """A family's graphs with the checkpoint's hints: more inputs of the denoiser, and a graph for each that has one."""
    if not checkpoint.hints:
        return own
    denoiser, picture = own[DENOISER], next(t for t in own["decoder"].outputs if t.name == "image")
    made, builders = dict(own), dict(denoiser.builders)
    further: list[tuple[str, Tensor]] = []  # inputs of the denoiser, each with the hint that it is of
    adapters = [name for name in checkpoint.hints if checkpoint.components[name].class_name == CLASS]
    if adapters:
        build = denoiser.builders["unet"]
        builders["unet"] = lambda: ip_adapter.install(build(), len(adapters))
    for name in checkpoint.hints:
        part = checkpoint.components[name]
        if part.class_name == CONTROL:
            _check_control(checkpoint, part)
            builders[name] = _builder(part.class_name, part.config)
            further.append((name, replace(picture, name=f"{name}_image")))
        else:
            adapter = _image_adapter if part.class_name == CLASS else _feature_adapter
            made[f"hint_{name}"] = spec = adapter(checkpoint, part, shape)
            further += [(name, tensor) for tensor in spec.outputs if not tensor.name.startswith(NEGATIVE)]
        further.append((name, Tensor(f"{name}_scale", "float32", ("batch",))))
    kinds = {name: checkpoint.components[name].class_name for name in checkpoint.hints}
    forward = Steered(denoiser.forward, len(denoiser.inputs), tuple(name for name, _ in further), kinds)
    inputs = (*denoiser.inputs, *(tensor for _, tensor in further))
    factor = parts.pixels_per_latent(checkpoint)
    sizes = {f"image_{side}": size * factor for side, size in denoiser.example.items()}
    made[DENOISER] = replace(
        denoiser, builders=builders, forward=forward, inputs=inputs, example={**denoiser.example, **sizes}
    )
    return made


def stages(checkpoint: Checkpoint, own: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A family's stages with the hints of those whose denoiser is steered."""
    hints = tuple(_hint(checkpoint.components[name]) for name in checkpoint.hints)
    controlled = any(checkpoint.components[name].class_name == CONTROL for name in checkpoint.hints)

    def steered(stage: Stage) -> Stage:
        how = replace(stage.image_to_image, strength=STRENGTH) if controlled else stage.image_to_image
        return replace(stage, hints=hints, image_to_image=how)

    return tuple(steered(stage) if stage.denoiser == DENOISER else stage for stage in own)


def _hint(part: Component) -> HintInput:
    name, graph = part.name, f"hint_{part.name}"
    if part.class_name == CONTROL:
        return HintInput(name, None, f"{name}_image", f"{name}_scale", 1.0, "lanczos")
    return HintInput(name, graph, "image", f"{name}_scale", 1.0, "bicubic" if part.class_name == CLASS else "lanczos")


def _builder(class_name: str, config: Mapping[str, Any]) -> Callable[[], Any]:
    """What builds a network of one of diffusers' classes."""

    def build() -> Any:
        import diffusers

        kinds = {CONTROL: diffusers.ControlNetModel, "T2IAdapter": diffusers.T2IAdapter}
        return kinds[class_name].from_config(dict(config))

    return build


def _check_control(checkpoint: Checkpoint, part: Component) -> None:
    """Raise DexportError for a ControlNet that was made for another UNet, or that asks for what is not done."""
    unet, own = checkpoint.components["unet"].config, part.config
    for option, default in SAME.items():
        pair = [config.get(option, default) for config in (own, unet)]
        if pair[0] != pair[1]:
            raise DexportError(
                f"{part.path}: {option} is {pair[0]!r:.60}, and {pair[1]!r:.60} of the checkpoint's UNet; it is a "
                "ControlNet for another model"
            )
    latents = parts.whole("vae", checkpoint.components["vae"].config, "latent_channels", 4)
    factor = 1 << (len(own.get("conditioning_embedding_out_channels") or [16, 32, 96, 256]) - 1)
    wanted = {
        "in_channels": (own.get("in_channels", 4), latents),
        "conditioning_channels": (own.get("conditioning_channels", 3), 3),
        "pixels for each latent by conditioning_embedding_out_channels": (factor, parts.pixels_per_latent(checkpoint)),
        "global_pool_conditions": (own.get("global_pool_conditions", False), False),
    }
    for option, (value, needed) in wanted.items():
        if value != needed:
            raise DexportError(
                f"{part.path}: {option}: {value!r:.60}; only {needed!r} is exported with this checkpoint"
            )


def _feature_adapter(checkpoint: Checkpoint, part: Component, shape: Shape) -> Spec:
    """The graph of a T2I-Adapter: a picture to what is added in each block of the UNet."""
    name, config = part.name, part.config
    if shape.free:
        raise DexportError(f"{part.path}: a T2I-Adapter needs its picture's size fixed; leave --dynamic-shape out")
    channels = config.get("in_channels", 3)
    if channels not in (1, 3):
        raise DexportError(f"{part.path}: in_channels is {channels!r:.60}; a picture has 3, or 1 in grey")
    features = _features(checkpoint, part, shape)
    outputs = tuple(Tensor(f"{name}_{index}", "float32", ("batch", *size)) for index, size in enumerate(features))
    picture = Tensor("image", "float32", ("batch", 3, shape.height, shape.width))

    def features_of(modules: Any, image: Any) -> Any:
        if channels == 1:
            image = sum(weight * image[:, i : i + 1] for i, weight in enumerate(LUMA))
        return tuple(getattr(modules, name)(image))

    return Spec("hint", {name: _builder(part.class_name, config)}, features_of, (picture,), outputs, {})


def _features(checkpoint: Checkpoint, part: Component, shape: Shape) -> list[tuple[int, int, int]]:
    """The shapes [C, h, w] of what a T2I-Adapter makes; DexportError unless the UNet's blocks have just these."""
    own, unet = part.config, checkpoint.components["unet"].config
    kind, widths = own.get("adapter_type", "full_adapter"), own.get("channels", [320, 640, 1280, 1280])
    halved = {
        "full_adapter": lambda index: index > 0, "light_adapter": lambda index: index > 0,
        "full_adapter_xl": lambda index: index == 2,
    }  # fmt: skip
    factor = own.get("downscale_factor", 8)
    if kind not in halved or type(factor) is not int or factor < 1 or shape.height % factor or shape.width % factor:
        raise DexportError(
            f"{part.path}: adapter_type {kind!r:.60} with downscale_factor {factor!r:.60}: one of {', '.join(halved)} "
            f"is exported, with a factor that {shape.height}x{shape.width} pixels can be divided by"
        )
    size, made = (shape.height // factor, shape.width // factor), []
    widths = [*widths, widths[-1]] if kind == "light_adapter" else widths
    for index, width in enumerate(widths):
        size = _half(size) if halved[kind](index) else size
        made.append((width, *size))
    # A block with attention adds its feature before it halves the picture, one without after that; the middle the last.
    latents = parts.pixels_per_latent(checkpoint)
    size, taken = (shape.height // latents, shape.width // latents), []
    blocks = parts.blocks("unet", unet, [320, 640, 1280, 1280])
    kinds = unet.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(blocks) - 1) + ["DownBlock2D"])
    for index, (width, block) in enumerate(zip(blocks, kinds, strict=False)):
        after = size if index == len(blocks) - 1 else _half(size)
        taken.append((width, *(size if "CrossAttn" in block else after)))
        size = after
    taken.append((blocks[-1], *size))
    if not made or made != taken[: len(made)]:
        raise DexportError(
            f"{part.path}: its features are {made!r:.90} where the UNet's blocks are {taken!r:.90}; it is a "
            "T2I-Adapter for another model"
        )
    return made


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _image_adapter(checkpoint: Checkpoint, part: Component, shape: Shape) -> Spec:
    """The graph of an IP-Adapter: a picture, as CLIP's image encoder takes it, to tokens; and those of no picture."""
    name, encoder = part.name, checkpoint.components[IMAGE_ENCODER].config
    count, width = ip_adapter.tokens(part.entries)
    side = parts.whole(IMAGE_ENCODER, encoder, "image_size", 224)
    option = "hidden_size" if ip_adapter.is_plus(part.entries) else "projection_dim"
    given, taken = parts.whole(IMAGE_ENCODER, encoder, option, 768), ip_adapter.taken(part.entries)
    if given != taken:
        raise DexportError(
            f"{part.path}: it takes {taken} numbers of a picture where {option} of the image encoder is {given}; give "
            "the one that it was trained with"
        )
    tokens = Tensor(f"{name}_tokens", "float32", ("batch", count, width))
    builders = {
        IMAGE_ENCODER: lambda: ip_adapter.build_encoder(encoder),
        name: lambda: ip_adapter.build_projection(part.entries),
    }

    def tokens_of(modules: Any, image: Any) -> Any:
        return ip_adapter.encode(modules.image_encoder, getattr(modules, name), image)

    picture = Tensor("image", "float32", ("batch", 3, side, side))
    outputs = (tokens, replace(tokens, name=f"{NEGATIVE}{tokens.name}"))
    return Spec("hint", builders, tokens_of, (picture,), outputs, {})


@dataclass(frozen=True)
class Steered:
    """A family's denoiser, ``own``, whose UNet is steered by the inputs after its own ``count``.

    owners: the hint that each of those is of; the last of a hint's is its scale. kinds: the class of each hint.
    """

    own: Callable[..., Any]
    count: int
    owners: tuple[str, ...]
    kinds: Mapping[str, str]

    def __call__(self, modules: Any, *inputs: Any) -> Any:
        """Call the denoiser with a UNet that takes what the further inputs give."""
        given: dict[str, list[Any]] = {name: [] for name in self.kinds}
        for name, value in zip(self.owners, inputs[self.count :], strict=True):
            given[name].append(value)
        return self.own(_Modules(_SteeredUNet(modules, self.kinds, given)), *inputs[: self.count])


class _SteeredUNet:
    """Called as the UNet is, and with its attributes."""

    def __init__(self, modules: Any, kinds: Mapping[str, str], given: Mapping[str, list[Any]]) -> None:
        self._modules, self._kinds, self._given = modules, kinds, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules.unet, name)

    def __call__(self, sample: Any, timestep: Any, states: Any, **options: Any) -> Any:
        """The UNet's output, steered."""
        residuals, features, tokens = [], [], []
        for name, kind in self._kinds.items():
            *given, scale = self._given[name]
            factor = scale[:, None, None, None]
            if kind == CONTROL:
                network = getattr(self._modules, name)
                down, middle = network(
                    sample[:, : network.config.in_channels], timestep, states, *given, conditioning_scale=factor,
                    added_cond_kwargs=options.get("added_cond_kwargs"), return_dict=False,
                )  # fmt: skip
                residuals.append((*down, middle))
            elif kind == CLASS:
                tokens.append((*given, scale))
            else:
                features.append([value * factor for value in given])
        if residuals:
            *down, middle = _summed(residuals)
            options |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        if features:
            options["down_intrablock_additional_residuals"] = _summed(features)
        return self._modules.unet(sample, timestep, (states, tokens) if tokens else states, **options)


@dataclass(frozen=True)
class _Modules:
    unet: _SteeredUNet


def _summed(rows: Iterable[Sequence[Any]]) -> list[Any]:
    """The first tensors of all rows in one, then the second ones, and so on; a row may be shorter than others."""
    columns = zip_longest(*rows)
    return [reduce(add, (value for value in column if value is not None)) for column in columns]
