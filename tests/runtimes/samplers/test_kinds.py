"""Which samplers fit which models: a sampler for another kind of model is refused where it is picked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from runtimes.errors import DexportError
from runtimes.samplers import CLASSES, NAMES, choose, compile_table, kinds, pick

DIFFUSION = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
WAN = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SVD = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"}
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler"}
V = {**DIFFUSION, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("config", "sampler", "words"),
    [
        (DIFFUSION, "flow_euler", "for a flow-matching model, and this checkpoint is a diffusion model"),
        (DIFFUSION, "ipndm", "an angle from 1 to 0"),
        (DIFFUSION, "EDMEulerScheduler", "EDM's preconditioning"),
        (DIFFUSION, "CMStochasticIterativeScheduler", "a consistency model"),
        (DIFFUSION, "ScoreSdeVpScheduler", "a score model"),
        (DIFFUSION, "CogVideoXDDIMScheduler", "shifted schedule"),
        (V, "RePaintScheduler", "predicts epsilon, and this checkpoint has prediction_type='v_prediction'"),
        (FLOW, "ddim", "this checkpoint is a flow-matching model; take flow_euler, flow_heun, flow_lcm, or leave"),
        (FLOW, "dpmpp_2m", "this checkpoint is a flow-matching model"),
        (WAN, "euler", "this checkpoint is a flow-matching model; take dpmpp_2m, "),
        (SVD, "dpmpp_2m", r"told log sigma \(timestep_type='continuous'\); take euler, or leave"),
        (PLAYGROUND, "dpmpp_2m", "take EDMEulerScheduler, EDMDPMSolverMultistepScheduler, or leave"),
    ],
)
def test_another_kind_of_model_is_refused_with_what_fits(config: dict[str, Any], sampler: str, words: str) -> None:
    for image in (True, False):
        with pytest.raises(DexportError, match=words) as caught:
            pick(config, sampler, image=image)
        assert "\n" not in str(caught.value)
    with pytest.raises(DexportError, match=words):
        choose(config, sampler)


@pytest.mark.parametrize("config", [DIFFUSION, FLOW, WAN, SVD, PLAYGROUND, V], ids=str)
def test_what_an_error_offers_is_accepted(config: dict[str, Any]) -> None:
    with pytest.raises(DexportError, match=r"; take .*, or leave the sampler out") as caught:
        pick(config, "SCMScheduler", image=False)
    for name in str(caught.value).partition("; take ")[2].removesuffix(", or leave the sampler out").split(", "):
        assert compile_table(choose(config, name), 4).rows


def test_each_class_fits_its_own_checkpoint_and_its_kind() -> None:
    for name in CLASSES:
        assert pick({"_class_name": name}, name, image=True)["_class_name"] == name
    for name in NAMES:
        if NAMES[name][0] not in kinds.OTHERS:
            assert pick(DIFFUSION, name, image=False)
    assert set(kinds.OTHERS) | set(kinds.INVERSE) | set(kinds.DISTILLED) <= set(CLASSES)
    assert set(kinds.OTHERS.values()) <= set(kinds.KINDS)
    for config, name in itertools.product((WAN,), ("dpmpp_2m", "unipc", "flow_heun")):
        assert pick(config, name, image=False)


def test_a_class_that_is_not_known_says_nothing_of_its_model() -> None:
    assert pick({"_class_name": "KarrasVeScheduler"}, "heun", image=False)["_class_name"] == "HeunDiscreteScheduler"
    assert pick({"_class_name": "OursScheduler"}, "euler", image=False)["_class_name"] == "EulerDiscreteScheduler"


@pytest.mark.parametrize("name", kinds.INVERSE)
def test_what_goes_to_noise_needs_an_image(name: str) -> None:
    assert pick(DIFFUSION, name, image=True)["_class_name"] == name
    for config, sampler in ((DIFFUSION, name), ({"_class_name": name}, None)):
        with pytest.raises(DexportError, match="goes from an image to noise"):
            pick(config, sampler, image=False)
    with pytest.raises(DexportError, match="goes from an image to noise"):
        choose(DIFFUSION, name)


@pytest.mark.parametrize("name", ["eulerdiscretescheduler", "EULERDISCRETESCHEDULER", "Euler Discrete Scheduler"])
def test_classes_are_names_too_in_any_case(name: str) -> None:
    assert pick(DIFFUSION, name, image=False)["_class_name"] == "EulerDiscreteScheduler"


def test_a_name_that_is_empty_or_refused_is_an_error() -> None:
    for name, words in (("", "no sampler ''"), ("vqdiffusionscheduler", "VQDiffusionScheduler is not supported")):
        for call in (lambda name: choose(DIFFUSION, name), lambda name: compile_table(DIFFUSION, 4, sampler=name)):
            with pytest.raises(DexportError, match=words):
                call(name)
