"""What people call samplers, in the words of several programs, and the diffusers class and options that they mean.

A name is read without regard to case, spaces and dashes, with ``++`` as ``pp``: "DPM++ 2M Karras" is dpmpp_2m_karras.
The endings in ``ENDINGS`` go with every class that has the option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtimes.errors import DexportError
from runtimes.samplers.sampler import Sampler

DPM = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}  # which has no step to sigma = 0
NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"},
    ),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm_2m": ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 2}),
    "dpm_3m": ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpm_2s": ("DPMSolverSinglestepScheduler", {**DPM, "solver_order": 2}),
    "dpm_3s": ("DPMSolverSinglestepScheduler", {**DPM, "solver_order": 3}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
}
"""The class of each short name, and the options that the name implies."""

ALIASES = {"euler_a": "euler_ancestral", "plms": "pndm", "dpm2": "dpm_2", "dpm2_a": "dpm_2_ancestral"}
ENDINGS: Mapping[str, str] = {
    "_karras": "use_karras_sigmas",
    "_exponential": "use_exponential_sigmas",
    "_beta": "use_beta_sigmas",
}

REFUSED: Mapping[str, str] = {
    "KarrasVeScheduler": "its model reads (x + 1) / 2 of a sample to which noise is added first, which no table of "
    "factors holds; take EulerDiscreteScheduler or HeunDiscreteScheduler with a model that predicts eps",
}
"""The diffusers classes that cannot be a table, and why."""


def find(name: Any, classes: Mapping[str, Sampler], refused: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the diffusers class that ``name`` means and the options that it implies; DexportError if none."""
    if isinstance(name, str):
        plain = name.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
        for scheduler in (*classes, *refused):
            if scheduler.lower() == plain.replace("_", ""):
                if scheduler in refused:
                    raise DexportError(f"{scheduler} is not supported: {refused[scheduler]}")
                return scheduler, {}
        ending = next((ending for ending in ENDINGS if plain.endswith(ending)), "")
        base = plain.removesuffix(ending)
        base = ALIASES.get(base, base)
        if base in NAMES:
            scheduler, options = NAMES[base]
            if not ending:
                return scheduler, dict(options)
            if ENDINGS[ending] in classes[scheduler].options:
                others = {option: False for option in ENDINGS.values() if option in classes[scheduler].options}
                return scheduler, {**options, **others, ENDINGS[ending]: True}
            raise DexportError(f"{base} has no form with {ending.removeprefix('_')} sigmas; take {base}")
    raise DexportError(f"no sampler {name!r:.60}; choose one with --sampler: {', '.join(NAMES)}")
