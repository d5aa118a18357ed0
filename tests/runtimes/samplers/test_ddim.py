"""DDIM, its inverse and CogVideoX's samplers against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMParallelScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop
from runtimes.errors import DexportError
from runtimes.samplers import Table, compile_table
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    PREDICTIONS,
    SPACINGS,
    STEP_OPTIONS,
    STEPS,
    ZERO_SNR,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

COGVIDEOX = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


class CogVideoXDPM:
    """Called as CogVideoXPipeline calls it: with the step before, and what x_0 was there."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.init_noise_sigma, self.scale_model_input = scheduler.init_noise_sigma, scheduler.scale_model_input
        self.before: Any = (None, None)

    def step(self, output: Any, t: Any, sample: Any) -> Any:
        back, x0 = self.before
        sample, x0 = self.scheduler.step(output, x0, t, back, sample)
        self.before = (t, x0)
        return SimpleNamespace(prev_sample=sample)


def adapt(scheduler: Any) -> Any:
    return CogVideoXDPM(scheduler) if type(scheduler).__name__ == "CogVideoXDPMScheduler" else scheduler


def same(config: dict[str, Any], steps: int, begin: int = 0, rounded: float = 1e-5) -> None:
    """The maps agree: to 1e-10 with diffusers in float64, and to ``rounded`` with it as it is."""
    ours = table_map(dataclasses.replace(compile_table(config, steps, begin=begin), init_scale=1.0))
    for double, limit in ((True, DOUBLE_LIMIT), (False, rounded)):
        theirs = diffusers_map(config, steps, double=double, begin=begin, adapt=adapt)
        assert not theirs.differs(ours, limit), (config, steps, begin, double, theirs.differs(ours, limit))


INVERSE = {
    "latent": {**LATENT, "clip_sample": False, "set_alpha_to_one": False},
    "linear": {"clip_sample": False},
    "own": {**OWN, "clip_sample": False, "set_alpha_to_zero": False},
    "zero-snr": {**ZERO_SNR, "clip_sample": False, "set_alpha_to_one": False},
}


@pytest.mark.filterwarnings("ignore:The `set_alpha_to_zero` argument:FutureWarning")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", INVERSE)
def test_inverse_is_that_of_diffusers(case: str, prediction: str) -> None:
    options = {**INVERSE[case], "prediction_type": prediction}
    if prediction == "sample":
        options |= {"set_alpha_to_one": False}
    for spacing, steps in itertools.product(("leading", "trailing"), STEPS):
        config = {"_class_name": "DDIMInverseScheduler", **options, "timestep_spacing": spacing}
        # diffusers rescales to zero SNR in float32.
        rounded = 1e-4 if case == "zero-snr" else 1e-5
        same(config, steps, rounded=rounded)
        if steps > 3:
            same(config, steps, steps // 3, rounded)


def test_inverse_starts_from_the_image_and_undoes_ddim() -> None:
    # A model whose eps does not depend on x: then each step of the inverse is undone by DDIM's exactly.
    options = {**LATENT, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0}
    image, eps = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 4))
    inverse = compile_table({"_class_name": "DDIMInverseScheduler", **options, "set_alpha_to_one": True}, 10)
    assert inverse.mix == (1.0, 0.0)
    *_, noisy = loop.sample(inverse, image, lambda x, t, row: eps, pytest.fail)
    forwards = compile_table({"_class_name": "DDIMScheduler", **options, "set_alpha_to_one": True}, 10)
    assert [row.t for row in forwards.rows] == [row.t for row in inverse.rows][::-1]
    *_, back = loop.sample(forwards, noisy.sample, lambda x, t, row: eps, pytest.fail)
    np.testing.assert_allclose(back.sample, image, atol=1e-12)


def test_inverse_of_a_model_of_x0_needs_noise_in_the_image() -> None:
    # diffusers divides by the noise's share, 0.
    config = {"_class_name": "DDIMInverseScheduler", "prediction_type": "sample", "clip_sample": False}
    scheduler = DDIMInverseScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(5)
    assert not scheduler.step(torch.ones(1), 0, torch.zeros(1)).prev_sample.isfinite().all()
    with pytest.raises(DexportError, match="set set_alpha_to_one to False"):
        compile_table(config, 5)
    with pytest.raises(DexportError, match="timestep_spacing='linspace'"):
        compile_table({**config, "timestep_spacing": "linspace"}, 5)


@pytest.mark.parametrize("begin", [0, 1, 4])
def test_the_inverse_begins_as_noisy_as_its_first_step_expects(begin: int) -> None:
    config = {"_class_name": "DDIMInverseScheduler", **LATENT, "set_alpha_to_one": False}
    scheduler = DDIMInverseScheduler(**LATENT)
    start = [0, *(float(bar) for bar in scheduler.alphas_cumprod[1::100])][begin]
    expected = (start**0.5, (1 - start) ** 0.5) if begin else (1.0, 0.0)
    assert compile_table(config, 10, begin=begin).mix == pytest.approx(expected, rel=1e-6)


COG = {
    "default": {},
    "linear": {"beta_schedule": "linear", "snr_shift_scale": 1.0, "set_alpha_to_one": False},
    "cosine": {**COSINE, "snr_shift_scale": 2.5},
    "own": {**OWN, "steps_offset": 1},
    "zero-snr": {"rescale_betas_zero_snr": True},  # CogVideoX-5b, with "trailing" and v_prediction
    "zero-snr-linear": {"rescale_betas_zero_snr": True, "beta_schedule": "linear", "snr_shift_scale": 0.4},
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", COG)
@pytest.mark.parametrize("kind", COGVIDEOX)
def test_cogvideox_is_that_of_diffusers(kind: str, case: str, prediction: str) -> None:
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 5, 20, 50)):
        config = {"_class_name": kind, **COG[case], "prediction_type": prediction, "timestep_spacing": spacing}
        if prediction == "epsilon" and "zero-snr" in case and spacing != "leading":
            if steps > 1:  # for one step "linspace" gives t = 0
                with pytest.raises(DexportError, match="cannot start from pure noise"):
                    compile_table(config, steps)
            continue
        same(config, steps, rounded=1e-4 if "zero-snr" in case else 1e-5)
        if steps > 3:
            same(config, steps, begin=steps // 3, rounded=1e-4)


@pytest.mark.parametrize("kind", COGVIDEOX)
def test_cogvideox_clips_nothing(kind: str) -> None:
    rows = compile_table({"_class_name": kind, "clip_sample": True, "clip_sample_range": 0.1}, 5).rows
    assert {row.clip for row in rows} == {np.inf}


@pytest.mark.parametrize("begin", [0, 4, 9])
@pytest.mark.parametrize("kind", ["DDIMParallelScheduler", *COGVIDEOX])
def test_an_image_is_noised_as_in_diffusers(kind: str, begin: int) -> None:
    scheduler = getattr(diffusers, kind)(**LATENT)
    scheduler.set_timesteps(10)
    image, noise = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    first = scheduler.timesteps[begin : begin + 1]
    mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
    assert compile_table({"_class_name": kind, **LATENT}, 10, begin=begin).mix == pytest.approx(mix, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", *COGVIDEOX]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "trailing"]),
    schedule_name=st.sampled_from(["linear", "scaled_linear"]),
    total=st.integers(100, 1200),
    first=st.floats(1e-5, 1e-3),
    last=st.floats(2e-3, 0.05),
    offset=st.integers(0, 1),
    steps=st.integers(1, 50),
    eta=st.floats(0, 1),
    to_one=st.booleans(),
    shift=st.floats(0.2, 5),
)
def test_any_schedule(**drawn: Any) -> None:
    names = ("prediction", "spacing", "schedule_name", "total", "first", "last", "offset", "to_one", "shift")
    options = ("prediction_type", "timestep_spacing", "beta_schedule", "num_train_timesteps", "beta_start", "beta_end",
               "steps_offset", "set_alpha_to_one", "snr_shift_scale")  # fmt: skip
    config = {option: drawn[name] for option, name in zip(options, names, strict=True)}
    config |= {"_class_name": drawn["kind"], "clip_sample": False}
    if drawn["kind"] in ("DDIMScheduler", "DDIMParallelScheduler"):
        config["eta"] = drawn["eta"]
    theirs = diffusers_map(config, drawn["steps"], double=True, adapt=adapt)
    if len(theirs.times) == drawn["steps"]:  # see test_trailing_never_runs_past_the_end
        assert not theirs.differs(table_map(compile_table(config, drawn["steps"])), DOUBLE_LIMIT)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIMScheduler", {"use_clipped_model_output": True, "eta": 0.5}),
        ("DDIMParallelScheduler", {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "v_prediction"}),
        ("DDIMParallelScheduler", {**LATENT, "eta": 1.0}),
        ("DDIMInverseScheduler", {"clip_sample_range": 0.7}),
        ("DDIMInverseScheduler", {**ZERO_SNR, "prediction_type": "v_prediction"}),
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_clipped_trajectory_is_that_of_diffusers(kind: str, options: dict[str, Any], steps: int) -> None:
    config = {"_class_name": kind, **options}
    random = np.random.default_rng(steps)
    start, *values = random.standard_normal((1 + 2 * steps, 2, 3, 4, 4))
    known = {key: value for key, value in options.items() if key not in STEP_OPTIONS}
    extra = {key: value for key, value in options.items() if key in STEP_OPTIONS}
    scheduler = diffusers_scheduler(getattr(diffusers, kind), known, steps, True)
    theirs, sample = [], torch.from_numpy(start)
    for t, output, draw in zip(scheduler.timesteps, values[:steps], values[steps:], strict=True):
        with diffusers_noise(scheduler, lambda draw=draw: draw):
            sample = scheduler.step(torch.from_numpy(output), t, sample, **extra).prev_sample
        theirs.append(sample.numpy())

    def run(table: Table) -> list[np.ndarray]:
        outputs, draws = iter(values[:steps]), iter(values[steps:])
        return [step.sample for step in loop.sample(table, start, lambda *_: next(outputs), lambda: next(draws))]

    np.testing.assert_allclose(run(compile_table(config, steps)), theirs, rtol=0, atol=1e-10)
    free = compile_table({**config, "clip_sample": False, "thresholding": False}, steps)
    assert np.abs(run(free)[-1] - theirs[-1]).max() > 1e-2


def test_the_parallel_class_differs_from_ddim_only_where_it_runs_in_parallel() -> None:
    config = {**LATENT, "clip_sample": False, "eta": 0.3}
    plain = compile_table({"_class_name": "DDIMScheduler", **config}, 20)
    assert compile_table({"_class_name": "DDIMParallelScheduler", **config}, 20) == plain
    # With set_alpha_to_one=False diffusers' batched step ends at alpha_bar = 1, its own single step at alpha_bar[0].
    scheduler = DDIMParallelScheduler(**LATENT, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    t, output, sample = scheduler.timesteps[-1:], torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    batched = scheduler.batch_step_no_noise(output, t, sample)
    assert (batched - scheduler.step(output, t[0], sample).prev_sample).abs() > 1e-3
