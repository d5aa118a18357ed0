"""Settings that distilled models and LoRAs were published with, by a name that the user gives.

A checkpoint says nowhere that it was distilled, and a file's name proves nothing: so nothing is guessed. Each row is
what the model's card or code says, which ``source`` names; a card's ``guidance_scale=0`` is 0 here, and means that the
model runs without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtimes.errors import DexportError

LIGHTNING = "https://huggingface.co/ByteDance/SDXL-Lightning"
HYPER = "https://huggingface.co/ByteDance/Hyper-SD"
DMD2 = "https://huggingface.co/tianweiy/DMD2"
LISTS = frozenset(("timesteps", "sigmas"))
TRAILING: Mapping[str, Any] = {"timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Preset:
    """What a distilled model is run with; ``model`` is for people.

    sampler: by its name. scheduler: options of it. steps, guidance: the defaults.
    """

    model: str
    source: str
    sampler: str
    steps: int
    guidance: float
    scheduler: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "lcm": Preset(
        "latent consistency models whose UNet is told the guidance",
        "https://huggingface.co/latent-consistency/lcm-sdxl", "lcm", 4, 8.0,
    ),
    "lcm-lora": Preset("LCM-LoRA", "https://huggingface.co/latent-consistency/lcm-lora-sdxl", "lcm", 4, 0.0),
    "tcd": Preset("TCD-LoRA", "https://huggingface.co/h1t/TCD-SDXL-LoRA", "tcd", 4, 0.0, {"eta": 0.3}),
    "lightning-1step": Preset(
        "SDXL-Lightning, the model of one step (x0)", LIGHTNING, "euler", 1, 0.0,
        {**TRAILING, "prediction_type": "sample"},
    ),
    "lightning-2step": Preset("SDXL-Lightning, model or LoRA of 2 steps", LIGHTNING, "euler", 2, 0.0, TRAILING),
    "lightning-4step": Preset("SDXL-Lightning, model or LoRA of 4 steps", LIGHTNING, "euler", 4, 0.0, TRAILING),
    "lightning-8step": Preset("SDXL-Lightning, model or LoRA of 8 steps", LIGHTNING, "euler", 8, 0.0, TRAILING),
    "hyper-1step": Preset("Hyper-SDXL, the UNet of one step", HYPER, "lcm", 1, 0.0, {"timesteps": [800]}),
    "hyper-2step": Preset("Hyper-SD, LoRA of 2 steps", HYPER, "ddim", 2, 0.0, TRAILING),
    "hyper-4step": Preset("Hyper-SD, LoRA of 4 steps", HYPER, "ddim", 4, 0.0, TRAILING),
    "hyper-8step": Preset("Hyper-SD, LoRA of 8 steps", HYPER, "ddim", 8, 0.0, TRAILING),
    "hyper-8step-cfg": Preset(
        "Hyper-SD, LoRA of 8 steps that keeps guidance (5 to 8)", HYPER, "ddim", 8, 5.0, TRAILING
    ),
    "hyper-12step-cfg": Preset(
        "Hyper-SD, LoRA of 12 steps that keeps guidance (5 to 8)", HYPER, "ddim", 12, 5.0, TRAILING
    ),
    "hyper-unified": Preset("Hyper-SD, the unified LoRA, for 1 to 8 steps", HYPER, "tcd", 4, 0.0, {"eta": 1.0}),
    "hyper-sd3-4step": Preset("Hyper-SD3, LoRA of 4 steps (at 0.125)", HYPER, "flow_euler", 4, 3.0),
    "hyper-sd3-8step": Preset("Hyper-SD3, LoRA of 8 steps (at 0.125)", HYPER, "flow_euler", 8, 5.0),
    "hyper-sd3-16step": Preset("Hyper-SD3, LoRA of 16 steps (at 0.125)", HYPER, "flow_euler", 16, 7.0),
    "hyper-flux-8step": Preset("Hyper-FLUX.1-dev, LoRA of 8 steps (at 0.125)", HYPER, "flow_euler", 8, 3.5),
    "hyper-flux-16step": Preset("Hyper-FLUX.1-dev, LoRA of 16 steps (at 0.125)", HYPER, "flow_euler", 16, 3.5),
    "sd-turbo": Preset("SD-Turbo", "https://huggingface.co/stabilityai/sd-turbo", "euler", 1, 0.0, TRAILING),
    "sdxl-turbo": Preset(
        "SDXL-Turbo", "https://huggingface.co/stabilityai/sdxl-turbo", "euler_ancestral", 1, 0.0, TRAILING
    ),
    "dmd2-1step": Preset("DMD2 of SDXL, the UNet of one step", DMD2, "lcm", 1, 0.0, {"timesteps": [399]}),
    "dmd2-4step": Preset(
        "DMD2 of SDXL, UNet or LoRA of 4 steps", DMD2, "lcm", 4, 0.0, {"timesteps": [999, 749, 499, 249]}
    ),
    "flash": Preset("Flash Diffusion, LoRA", "https://huggingface.co/jasperai/flash-sdxl", "lcm", 4, 0.0, TRAILING),
}  # fmt: skip
"""The presets by name; docs/samplers.md lists them."""


def find(name: str) -> Preset:
    """The preset of a name; DexportError, with those there are, if none."""
    if name not in PRESETS:
        raise DexportError(f"no preset {name!r:.60}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a request or an origin with what a preset says wherever they say nothing.

    given: any of "sampler", "steps", "guidance" (None: not given; by stage: the main one is "") and "scheduler".
    """
    preset, made = find(name), dict(given)
    asked, options = given.get("scheduler") or {}, dict(preset.scheduler)
    if not isinstance(asked, Mapping):
        return made  # which is refused where options are read
    made["sampler"] = preset.sampler if given.get("sampler") is None else given["sampler"]
    defaults: dict[str, float] = {"steps": preset.steps, "guidance": preset.guidance}
    if not LISTS.isdisjoint(asked):  # a list of one's own takes the place of the preset's, and of its steps
        options = {option: value for option, value in options.items() if option not in LISTS}
        del defaults["steps"]
    for what, value in defaults.items():
        said = given.get(what)
        made[what] = {"": value, **said} if isinstance(said, Mapping) else value if said is None else said
    made["scheduler"] = {**options, **asked}
    return made
