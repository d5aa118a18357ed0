"""Options of a scheduler by name: what diffusers' own scheduler makes of them, and what is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from runtimes import samplers
from runtimes.errors import DexportError
from runtimes.presets import PRESETS
from runtimes.samplers import options
from runtimes.samplers.sampler import OneOf

LATENT = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
BASE = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **LATENT}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def table(config: dict[str, Any], sampler: str | None, asked: dict[str, Any], steps: int) -> samplers.Table:
    return samplers.compile_table(samplers.pick(config, sampler, asked, image=False), steps)


@pytest.mark.parametrize(
    ("sampler", "asked", "steps"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "linspace"}, 7),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "steps_offset": 0}, 6),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, 6),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "lambda_min_clipped": -5.1}, 6),
        ("UniPCMultistepScheduler", {"solver_order": 3, "timestep_spacing": "trailing"}, 6),
        ("LCMScheduler", {"original_inference_steps": 100}, 4),
    ],
)
def test_timesteps_are_those_of_from_config(sampler: str, asked: dict[str, Any], steps: int) -> None:
    """As values, and as the text of a command line."""
    base = diffusers.EulerDiscreteScheduler.from_config(BASE)
    theirs = getattr(diffusers, sampler).from_config(base.config, **asked)
    theirs.set_timesteps(steps)
    for given in (asked, {name: str(value) for name, value in asked.items()}):
        made = table(BASE, sampler, given, steps)
        assert np.allclose([row.t for row in made.rows if row.level], np.asarray(theirs.timesteps), atol=1e-3)


@pytest.mark.parametrize("sampler", ["LCMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "TCDScheduler"])
def test_a_list_of_timesteps_is_as_long_as_it_is(sampler: str) -> None:
    wanted = [999, 749, 499, 249]
    config = samplers.pick(BASE, sampler, {"timesteps": "999,749,499,249"}, image=False)
    assert config["timesteps"] == wanted and samplers.listed(config) == 4
    theirs = getattr(diffusers, sampler).from_config(BASE)
    theirs.set_timesteps(timesteps=wanted)
    assert [row.t for row in samplers.compile_table(config, 4).rows] == theirs.timesteps.tolist() == wanted
    with pytest.raises(DexportError, match=r"4 timesteps for 8 steps.*timesteps=none"):
        samplers.compile_table(config, 8)
    again = samplers.pick(config, None, {"timesteps": "none"}, image=False)
    assert samplers.listed(again) is None and samplers.compile_table(again, 8)
    # A class that takes no list ignores it, as it ignores every option that it does not have.
    other = samplers.pick(config, "DPMSolverSDEScheduler", image=False)
    assert samplers.listed(other) is None and samplers.compile_table(other, 8)


def test_a_list_of_sigmas_is_diffusers_own() -> None:
    """Flow matching adds the end by itself, Euler's list has it; either way it may be left out."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    flow.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    euler = diffusers.EulerDiscreteScheduler.from_config(BASE)
    euler.set_timesteps(sigmas=[14.0, 3.0, 0.5, 0.0])
    for config, theirs, text in ((FLOW, flow, "1,0.6,0.2"), (BASE, euler, "14,3,0.5,0"), (BASE, euler, "14,3,0.5")):
        made = samplers.pick(config, None, {"sigmas": text}, image=False)
        assert samplers.listed(made) == 3
        rows = samplers.compile_table(made, 3).rows
        assert np.allclose([row.t for row in rows], np.asarray(theirs.timesteps), rtol=1e-6)
        assert np.allclose([row.level[1] for row in rows], np.asarray(theirs.sigmas[:-1]), rtol=1e-6)


def test_what_is_asked_for_counts_where_a_config_calls_it_unset() -> None:
    """diffusers too drops what ``_use_default_values`` names before it takes the arguments of ``from_config``."""
    config = {**BASE, "_use_default_values": ["use_karras_sigmas", "timestep_spacing"]}
    theirs = diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True)
    theirs.set_timesteps(5)
    for sampler, asked in (("euler_karras", {}), ("euler", {"use_karras_sigmas": "true"})):
        assert np.allclose([row.t for row in table(config, sampler, asked, 5).rows], np.asarray(theirs.timesteps))


@pytest.mark.parametrize(
    ("sampler", "asked", "words"),
    [
        ("euler", {"spacing": "trailing"}, "has no option 'spacing'; it has num_train_timesteps, "),
        ("euler", {"solver_order": "2"}, "EulerDiscreteScheduler has no option 'solver_order'"),
        ("dpmpp_sde", {"timesteps": "9,8"}, "has no option 'timesteps'"),
        ("euler", {"timestep_spacing": "even"}, "timestep_spacing is one of leading, linspace, trailing, not 'even'"),
        ("euler", {"beta_end": "2"}, "beta_end=2.0 must be a number from 0 to 1"),
        ("euler", {"beta_end": "many"}, "beta_end must be a number, not 'many'"),
        ("euler", {"num_train_timesteps": "10.5"}, "num_train_timesteps must be a whole number"),
        ("euler", {"use_karras_sigmas": "1"}, "use_karras_sigmas is true or false"),
        ("euler", {"use_karras_sigmas": 1}, "use_karras_sigmas=1 has the wrong type"),
        ("euler", {"timesteps": "9,x"}, "timesteps are numbers with commas between"),
        ("euler", {"timesteps": "9,99"}, "do not fall"),
        ("euler", {"timesteps": "9", "sigmas": "9"}, "exclude each other"),
        ("euler", {"sigma_min": "5", "sigma_max": "1"}, "sigma_min must be below sigma_max"),
        ("dpmpp_2m", {"use_flow_sigmas": "true"}, "is for a flow-matching model"),
        (None, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "leave them out"),
        ("euler", ["trailing"], "by name"),
    ],
)
def test_wrong_options_are_refused(sampler: str | None, asked: Any, words: str) -> None:
    with pytest.raises(DexportError) as caught:
        samplers.choose(BASE, sampler, asked)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_option_of_every_class_reads_its_own_default() -> None:
    """The text of a value is that value again."""
    for name, sampler in samplers.CLASSES.items():
        for option, value in sampler.options.items():
            default = value.default if isinstance(value, OneOf) else value
            if isinstance(value, OneOf) and default not in value.choices:
                continue
            assert options.read(name, sampler, {option: str(default)}) == {option: default}, (name, option)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_diffusers_own_schedules(name: str) -> None:
    """The row makes the timesteps that diffusers' scheduler has with the same arguments."""
    preset = PRESETS[name]
    config = FLOW if preset.sampler == "flow_euler" else BASE
    class_name, implied = samplers.find(preset.sampler)
    given = {key: value for key, value in preset.scheduler.items() if key not in ("eta", "timesteps")}
    theirs = getattr(diffusers, class_name).from_config(config, **implied, **given)
    lists = {"timesteps": preset.scheduler["timesteps"]} if "timesteps" in preset.scheduler else {}
    theirs.set_timesteps(**(lists or {"num_inference_steps": preset.steps}))
    made = table(config, preset.sampler, dict(preset.scheduler), preset.steps)
    assert np.allclose([row.t for row in made.rows], np.asarray(theirs.timesteps), atol=1e-3)
    assert len(made.rows) == preset.steps and preset.source.startswith("https://huggingface.co/")
