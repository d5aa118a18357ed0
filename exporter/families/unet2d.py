"""The UNet without text, diffusers' UNet2DModel, which several families share: its graph, channels, classes and sizes.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), https://arxiv.org/abs/2105.05233, have its
classes; Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, the variance that it may learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.families import parts
from runtimes.errors import DexportError
from runtimes.manifest import Labels, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint


@dataclass(frozen=True)
class Denoiser:
    """What a UNet is, read from its config: how its graph is built, and what goes in and out of it."""

    build: Callable[[], Any]
    inputs: tuple[Tensor, ...]  # sample, timestep, and labels where it has classes
    output: Tensor
    labels: Labels | None
    multiple: int  # of height and width of its sample

    def __call__(self, modules: Any, sample: Any, timestep: Any, labels: Any = None) -> Any:
        """[B, C, h, w], [B], [B] to what it predicts: [B, C or 2 C, h, w]."""
        unet = modules.unet
        if unet.config.time_embedding_type == "learned":
            timestep = timestep.long()
        output = unet(sample, timestep, class_labels=labels, return_dict=False)[0]
        return output if output.shape[1] == self.output.shape[1] else output[:, : self.output.shape[1]]


def denoiser(checkpoint: Checkpoint, channels: int, sides: tuple[int | str, ...], more: int = 0) -> Denoiser:
    """Read a checkpoint's UNet for samples [B, ``channels``, *sides], and ``more`` channels of what it is shown.

    Raises DexportError where its config does not fit.
    """
    config = checkpoint.components["unet"].config
    taken, given = (parts.whole("unet", config, name, 3) for name in ("in_channels", "out_channels"))
    if taken != channels + more or given not in (channels, 2 * channels):
        shown = f" and {more} of a picture" if more else ""
        raise DexportError(
            f"unet/config.json: {taken} channels in and {given} out; a {checkpoint.pipeline} has {channels} of a "
            f"sample{shown} in, and {channels} or {2 * channels} out"
        )
    # Where no scheduler of the checkpoint's takes the variance, it is left out here.
    out = given if checkpoint.scheduler.get("variance_type") in parts.LEARNED else channels
    own, label = labels(checkpoint), Tensor("labels", "int64", ("batch",))
    sample = Tensor("sample", "float32", ("batch", channels, *sides))
    return Denoiser(
        lambda: build(config),
        (sample, Tensor("timestep", "float32", ("batch",)), *((label,) if own else ())),
        Tensor("output", "float32", ("batch", out, *sides)),
        own,
        2 ** (len(parts.blocks("unet", config, [224, 448, 672, 896])) - 1),
    )


def labels(checkpoint: Checkpoint) -> Labels | None:
    """The classes of a UNet, None where it has none; no number stands for no class, since none was trained."""
    config = checkpoint.components["unet"].config
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is None and count is None:
        return None
    if kind not in (None, "timestep"):
        raise DexportError(f"unet/config.json: class_embed_type={kind!r:.60} takes more than a class's number")
    if count is None:
        raise DexportError("unet/config.json: class_embed_type without num_class_embeds: how many classes has it?")
    return Labels(parts.whole("unet", config, "num_class_embeds", 1), None, {})


def default_sides(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the sample that the checkpoint was made for."""
    size = checkpoint.components["unet"].config.get("sample_size")
    return parts.sides("unet", "sample_size", size)


def check_shape(height: int, width: int, multiple: int) -> None:
    """Raise DexportError for a picture that the UNet cannot halve as often as it does; ``multiple`` in pixels."""
    if height % multiple or width % multiple:
        raise DexportError(f"{height}x{width} pixels: this model needs multiples of {multiple}")


def build(config: Mapping[str, Any]) -> Any:
    """A UNet of this config.json."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(dict(config))
