"""AnimateDiff with Stable Diffusion XL: its text encoders and sizes, and the denoiser of ``animatediff``."""

from __future__ import annotations

from exporter.families import animatediff, stable_diffusion_xl

NAME = "animatediff-xl"
COMPONENTS = {**stable_diffusion_xl.COMPONENTS, **animatediff.MOVING}

default_shape = stable_diffusion_xl.default_shape
token_inputs = stable_diffusion_xl.token_inputs
rename = animatediff.rename
specs = animatediff.specs
stages = animatediff.stages
