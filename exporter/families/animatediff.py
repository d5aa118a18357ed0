"""AnimateDiff: Stable Diffusion that draws videos, with a motion adapter in its UNet; XL's is a file beside.

Guo et al., "AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models without Specific Tuning" (2023),
https://arxiv.org/abs/2307.04725
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec, parts, stable_diffusion, stable_diffusion_xl
from runtimes.errors import DexportError
from runtimes.manifest import Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "animatediff"
MOVING = {
    "unet": ("UNetMotionModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "motion_adapter": ("MotionAdapter", None),  # exporter.motion joins it to the UNet
}
COMPONENTS = {**stable_diffusion.COMPONENTS, **MOVING}
# The family that draws the frames, and its pipeline.
BASES: Mapping[str, tuple[Any, str]] = {
    "AnimateDiffPipeline": (stable_diffusion, "StableDiffusionPipeline"),
    "AnimateDiffSDXLPipeline": (stable_diffusion_xl, "StableDiffusionXLPipeline"),
}
FRAMES = 16  # diffusers' default, and the length of the videos that the adapters were trained on
FPS = 8.0  # likewise
STEPS = 25  # of diffusers' documentation; the checkpoints come with DDIM

default_shape = parts.default_shape
token_inputs = stable_diffusion.token_inputs


def rename(component: str, name: str) -> str | None:
    """Today's module name of a tensor; the sine tables of positions in time are made anew."""
    return None if name.endswith(".pos_embed.pe") else parts.rename(component, name)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The graphs of a family of pictures, with a denoiser of samples with frames, and no encoder."""
    config, frames = checkpoint.components["unet"].config, _frames(checkpoint)
    family, pictures = _base(checkpoint)
    made = dict(family.specs(pictures, shape))
    del made["encoder"]

    def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, *more: Any) -> Any:
        """[B, 4, F, h, w], [B], [B, S, D] and what the family has more, to the predicted noise: [B, 4, F, h, w]."""
        states = encoder_hidden_states.repeat_interleave(sample.shape[2], dim=0)  # [B·F, S, D]
        return family.denoiser(modules, sample, timestep, states, *more)

    def moving(tensor: Tensor) -> Tensor:
        batch, channels, *sides = tensor.shape
        return replace(tensor, shape=(batch, channels, frames, *sides))

    own = made["denoiser"]
    sample, *further = own.inputs
    made["denoiser"] = replace(
        own, builders={"unet": lambda: build_unet(config)}, forward=denoiser, inputs=(moving(sample), *further),
        outputs=tuple(moving(tensor) for tensor in own.outputs),
    )  # fmt: skip
    return made


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """The loop of a family of pictures over samples with frames."""
    family, pictures = _base(checkpoint)
    (stage,) = family.stages(pictures, shape)
    channels, *sides = stage.sample
    sample = (channels, _frames(checkpoint), *sides)
    return (replace(stage, sample=sample, encoder=None, steps=STEPS, fps=FPS),)


def build_unet(config: Mapping[str, Any]) -> Any:
    """A UNet with motion modules of this config.json."""
    from diffusers import UNetMotionModel

    return parts.with_guidance(UNetMotionModel.from_config(dict(config)))


def _base(checkpoint: Checkpoint) -> tuple[Any, Checkpoint]:
    """The family that draws the frames, and the checkpoint as one of it."""
    family, pipeline = BASES[checkpoint.pipeline]
    return family, replace(checkpoint, pipeline=pipeline)


def _frames(checkpoint: Checkpoint) -> int:
    """How many frames a video has; DexportError for more than the motion modules have positions for."""
    longest = parts.whole("unet", checkpoint.components["unet"].config, "motion_max_seq_length", 32)
    frames = min(FRAMES, longest) if checkpoint.frames is None else checkpoint.frames
    if not 1 <= frames <= longest:
        raise DexportError(f"a video of this model has 1 to {longest} frames, not {frames}; change --frames")
    return frames
