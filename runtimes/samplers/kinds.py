"""Which samplers fit which models: one that is for another kind of model draws a picture too, but a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtimes.errors import DexportError
from runtimes.samplers.names import NAMES
from runtimes.samplers.sampler import Sampler, resolve

Classes = Mapping[str, Sampler]
SHOWN = 5  # names in an error

KINDS: Mapping[str, str] = {
    "diffusion": "a diffusion model that is told timesteps",
    "shifted": "a diffusion model on CogVideoX's shifted schedule",
    "continuous": "a diffusion model that is told log sigma (timestep_type='continuous')",
    "flow": "a flow-matching model",
    "flow map": "a flow map, which is told two times",
    "rising flow": "a flow-matching model whose time rises from noise (MiniMax H3)",
    "EDM": "a model with EDM's preconditioning",
    "EDM by angle": "a model with EDM's preconditioning that is told an angle (Stable Audio)",
    "angle": "a v-prediction model that is told an angle from 1 to 0 (Dance Diffusion)",
    "Wuerstchen": "a diffusion model that is told a time from 1 to 0 (Wuerstchen)",
    "consistency": "a consistency model that is told log sigma",
    "TrigFlow": "a consistency model in TrigFlow's terms (sCM)",
    "decoder": "DALL-E 3's consistency decoder",
    "VE": "a score model whose noise grows (VE SDE)",
    "VP": "a score model that keeps the variance (VP SDE)",
}
"""The kinds of models, in words that follow "it is"."""

OTHERS: Mapping[str, str] = {
    "CogVideoXDDIMScheduler": "shifted",
    "CogVideoXDPMScheduler": "shifted",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
    "LTXEulerAncestralRFScheduler": "flow",
    "HeliosScheduler": "flow",
    "HeliosDMDScheduler": "flow",
    "FlowMapEulerDiscreteScheduler": "flow map",
    "MiniMaxH3Scheduler": "rising flow",
    "EDMEulerScheduler": "EDM",
    "EDMDPMSolverMultistepScheduler": "EDM",
    "CosineDPMSolverMultistepScheduler": "EDM by angle",
    "IPNDMScheduler": "angle",
    "DDPMWuerstchenScheduler": "Wuerstchen",
    "CMStochasticIterativeScheduler": "consistency",
    "SCMScheduler": "TrigFlow",
    "ConsistencyDecoderScheduler": "decoder",
    "ScoreSdeVeScheduler": "VE",
    "ScoreSdeVpScheduler": "VP",
}
"""The kind of each class whose models are of another than "diffusion"."""

DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler")
"""They fit each model of their kind, but only one that was distilled for few steps draws well with them."""

INVERSE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
"""They go from an image to noise."""


def kind_of(name: str, config: Mapping[str, Any], classes: Classes) -> str:
    """The kind of the models that the class ``name`` is for with the options in ``config``."""
    options = classes[name].options
    if config.get("use_flow_sigmas") and "use_flow_sigmas" in options:
        return "flow"
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return "continuous" if continuous and "timestep_type" in options else OTHERS.get(name, "diffusion")


def check(own: str, scheduler: Mapping[str, Any], name: str, config: Mapping[str, Any], classes: Classes) -> None:
    """Raise DexportError if a model with a ``scheduler`` of the class ``own`` cannot be sampled by the class ``name``.

    config: the scheduler's with the options that the other sampler's name implies.
    """
    if why := _misfit(own, scheduler, name, config, classes):
        if name == own:
            raise DexportError(f"{why}; leave them out")
        fit = [short for short, (other, implied) in NAMES.items() if _fits(own, scheduler, other, implied, classes)]
        fit = fit or [other for other in classes if _fits(own, scheduler, other, {}, classes)]
        raise DexportError(f"{why}; take {', '.join(fit[:SHOWN])}, or leave the sampler out")


def _misfit(own: str, scheduler: Mapping[str, Any], name: str, config: Mapping[str, Any], classes: Classes) -> str:
    """Why not, or "". The class that the checkpoint brings always fits."""
    model, needed = kind_of(own, scheduler, classes), kind_of(name, config, classes)
    if model != needed:
        how = " with these options" if name == own else ""
        return f"{name}{how} is for {KINDS[needed]}, and this checkpoint is {KINDS[model]}"
    if name == own:
        return ""
    predicted = scheduler.get("prediction_type") or "epsilon"
    if needed == "diffusion" and "prediction_type" not in classes[name].options and predicted != "epsilon":
        return f"{name} is for a model that predicts epsilon, and this checkpoint has prediction_type={predicted!r:.60}"
    return ""


def _fits(own: str, scheduler: Mapping[str, Any], name: str, implied: Mapping[str, Any], classes: Classes) -> bool:
    config = {**scheduler, **implied}
    if name in INVERSE or _misfit(own, scheduler, name, config, classes):
        return False
    try:
        resolve(name, classes[name], config)
    except DexportError:
        return False
    return True
