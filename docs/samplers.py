"""Write docs/samplers.md: every scheduler class of the installed diffusers with its state, and every short name.

python docs/samplers.py
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import diffusers.schedulers
from diffusers import SchedulerMixin

from runtimes.presets import PRESETS
from runtimes.samplers import CLASSES, NAMES, REFUSED, kinds

PAGE = Path(__file__).with_name("samplers.md")
EXCEPT = {
    "DDIMInverseScheduler": "`sample` prediction from an image without noise",
    "DEISMultistepScheduler": "thresholding with order 3",
    "DPMSolverMultistepInverseScheduler": "SDEs and flows, where diffusers gives NaN",
    "DPMSolverMultistepScheduler": "order 3 of dpmsolver with thresholding; spaced sigmas of a flow",
    "FlowMapEulerDiscreteScheduler": "its model's second time, which the loop does not pass",
    "FlowMatchLCMScheduler": "`scale_factors`, which resize the latents",
    "HeliosDMDScheduler": "`stages` other than 1",
    "HeliosScheduler": "`stages` other than 1, and solvers other than `scheduler_type='euler'`",
    "LTXEulerAncestralRFScheduler": "`invert_sigmas`",
    "PNDMScheduler": "a list of timesteps with Runge-Kutta steps",
    "SASolverScheduler": "`tau_func`, a function (`tau`, a number, in its place); thresholding with noise_prediction",
    "ScoreSdeVeScheduler": "`correct_steps` other than 0: the corrector's step depends on norms",
    "UniPCMultistepScheduler": "`solver_p` and orders above 3",
}
HEAD = """# Samplers

A sampler is a table with one row for each call of the model ([architecture](architecture.md)). Whatever scheduler a
checkpoint brings, its `scheduler_config.json` is compiled to such a table, in float64 and without torch. `--sampler`
takes another by its name, and the options that both know carry over.

    dexport sampler dpmpp_2m_karras --steps 20                        # the table
    dexport sampler euler --of checkpoint --plot euler.png            # with its schedule; sigma and timesteps drawn
    dexport run bundle --prompt "a red apple" --sampler "DPM++ 2M Karras" -o apple.png

`--scheduler NAME=VALUE` sets an option of the sampler by diffusers' name for it, in `build` and `run` alike, as
`Scheduler.from_config(config, NAME=VALUE)` does; from Python `scheduler={"timestep_spacing": "trailing"}`. A name that
the class does not have is refused with those that it has, and so is a value of another type, or beyond its choices or
range. `none` is the class's default. `timesteps=999,749,499,249`, or `sigmas=`, is a list in place of the spacing, one
for each step. What a bundle was built with carries over to another `--sampler` where its class has that option.

    dexport build sd15.safetensors --sampler ddim --scheduler timestep_spacing=trailing --target openvino=bf16 -o bundle
    dexport run bundle --prompt "a red apple" --scheduler use_karras_sigmas=true -o apple.png

Names are read without regard to case, spaces and dashes. `_karras`, `_exponential` and `_beta` may follow each name
whose class can space its sigmas so. The classes of diffusers are names too. Beyond diffusers' options a config may hold
`eta` (DDIM: 0 to 1; TCD: its gamma), `tau` (SA-Solver) and `use_clipped_model_output` (DDIM), which there are arguments
of methods.

A model can be sampled only by what speaks its language: how its timesteps are told and what it predicts. A sampler for
another kind of model than the checkpoint's is refused; the [kinds](#kinds-of-models) are below.

This page is written by `python docs/samplers.py`; a test holds it to the code.

## Names

| name | class | options that it implies |
|---|---|---|
"""
PRESETS_OF = """
## Presets

What a distilled model or LoRA was published with, by a name that you give: nothing in a file says that it was
distilled. `--preset` fills in what is not given beside it, in `build` (as the bundle's defaults) and in `run`.

    dexport build sdxl.safetensors --lora sdxl_lightning_4step_lora.safetensors --preset lightning-4step \\
        --target openvino=bf16 -o bundle

| preset | for | sampler | steps | guidance | options | source |
|---|---|---|---|---|---|---|
"""
STATES = """
## Kinds of models

The kind is read from the checkpoint's own scheduler: its class and, for those that serve two kinds, `use_flow_sigmas`
(flow matching) and `timestep_type`. Each class fits the models of its kind, and `use_flow_sigmas` in a checkpoint's
config makes its names fit flow matching. With a model that was distilled for few steps alone these draw well:
{distilled}. These need an image to start from:
{inverse}.

| the model is | names | further classes |
|---|---|---|
{kinds}

## Classes

"exact" is: the whole linear map, from start noise, outputs of the model and fresh noise to every step's sample, is that
of diffusers. Its code is made to compute in float64 for this, and agrees to 1e-10; where it makes its noise levels in
float32, to what the tests in `tests/runtimes/samplers` say. What is not supported is refused with one line.

| class of diffusers {version} | state |
|---|---|
"""
TAIL = """
## Where diffusers errs

Followed, so that the same config gives the same picture:

- DPM-Solver of order 3, multistep, takes half of the second difference that it should, and so is of order 2.
- sde-dpmsolver++ of order 3 has a wrong sign in the same term: its samples spread too far. Take `dpmpp_2m_sde`.
- Flow matching shifts the ends of a spaced schedule, and then the whole of it again.
- RePaint's step back takes its betas about one stride too high.

Not followed, since nothing could be drawn there: divisions of 0 by 0 (UniPC's bh1 at the end, Karras sigmas that end
twice at sigma_min, one step of several schedules), LMS from the middle, a mu that stays in the config. The tests name
each.
"""


def every_class() -> list[str]:
    """The names of diffusers' scheduler classes, sorted."""
    found = set()
    for info in pkgutil.walk_packages(diffusers.schedulers.__path__, diffusers.schedulers.__name__ + "."):
        if "flax" in info.name:
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(value) and issubclass(value, SchedulerMixin) and value is not SchedulerMixin:
                found.add(name)
    return sorted(found)


def state(name: str) -> str:
    """What can be said of a class in a line."""
    if name in REFUSED:
        return f"refused: {REFUSED[name]}"
    if name not in CLASSES:
        return "unknown"
    return f"exact but for {EXCEPT[name]}" if name in EXCEPT else "exact"


def kinds_of_models() -> list[str]:
    """A line for each kind of model: the names for it, and its classes that have no name."""
    kind = {name: kinds.OTHERS.get(name, "diffusion") for name in CLASSES}
    named = {scheduler for scheduler, _ in NAMES.values()}
    lines = []
    for which, words in kinds.KINDS.items():
        names = [f"`{name}`" for name, (scheduler, _) in NAMES.items() if kind[scheduler] == which]
        others = sorted(name for name in CLASSES if kind[name] == which and name not in named)
        if which == "continuous":
            others = ["EulerDiscreteScheduler with these options"]
        lines.append(f"| {words} | {', '.join(names)} | {', '.join(others)} |")
    return lines


def presets_table() -> list[str]:
    """A line for each preset."""
    return [
        f"| `{name}` | {preset.model} | `{preset.sampler}` | {preset.steps} | {preset.guidance:g} | "
        f"{', '.join(f'`{key}={shown(value)}`' for key, value in preset.scheduler.items())} | "
        f"[card]({preset.source}) |"
        for name, preset in PRESETS.items()
    ]


def shown(value: object) -> str:
    """A value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def page() -> str:
    """The whole page."""
    named = [
        f"| `{name}` | {kind} | {', '.join(f'`{key}={value!r}`' for key, value in options.items())} |"
        for name, (kind, options) in NAMES.items()
    ]
    classes = [f"| {name} | {state(name)} |" for name in every_class()]
    states = STATES.format(
        version=diffusers.__version__, kinds="\n".join(kinds_of_models()), distilled=", ".join(kinds.DISTILLED),
        inverse=", ".join(kinds.INVERSE),
    )  # fmt: skip
    presets = PRESETS_OF + "\n".join(presets_table()) + "\n"
    return HEAD + "\n".join(named) + "\n" + presets + states + "\n".join(classes) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
