"""SA-Solver against diffusers: the whole linear map, noise included; see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop
from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    SPACINGS,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SA = "SASolverScheduler"
STEPS = (1, 2, 3, 5, 10, 20, 50)
NOISE = {"algorithm_type": "noise_prediction"}

CASES: dict[str, dict[str, Any]] = {
    "plain": LATENT,
    "orders": {**LATENT, "predictor_order": 3, "corrector_order": 4},
    "predictor": {"predictor_order": 3, "corrector_order": 1},
    "corrector": {**OWN, "predictor_order": 1, "corrector_order": 3},
    "whole": {**LATENT, "predictor_order": 3, "corrector_order": 3, "lower_order_final": False},
    "ode": {**LATENT, "tau": 0.0},
    "half": {**LATENT, "tau": 0.5, "predictor_order": 3},
    "v": {**LATENT, "prediction_type": "v_prediction"},
    "sample": {**COSINE, "prediction_type": "sample", "lambda_min_clipped": -5.1},
    "noise": {**LATENT, **NOISE},
    "noise-orders": {**NOISE, "predictor_order": 3, "corrector_order": 3, "tau": 1.0},
    "noise-v": {**LATENT, **NOISE, "prediction_type": "v_prediction"},
    "karras": {**LATENT, "use_karras_sigmas": True},
    "exponential": {**LATENT, "use_exponential_sigmas": True},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
}
# diffusers as it is integrates polynomials by differences of near exponentials, in float32.
LIMITS = {"orders": 1e-2}
LIMIT = 5e-4
TIME_LIMITS = {"exponential": 1.0}  # in float32 some sigmas lie below a whole timestep, to which they are then cut


def with_tau(config: dict[str, Any]) -> Any:
    """Give diffusers' scheduler the constant tau of ``config``, if it has one."""

    def adapt(scheduler: Any) -> Any:
        if "tau" in config:
            scheduler.tau_func = lambda t: config["tau"]
        return scheduler

    return adapt


@pytest.mark.parametrize("case", CASES)
def test_map_is_that_of_diffusers(case: str) -> None:
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        config = {"_class_name": SA, **CASES[case], "timestep_spacing": spacing}
        ours, adapt = table_map(compile_table(config, steps)), with_tau(config)
        theirs = {key: value for key, value in config.items() if key != "tau"}
        time_limit = TIME_LIMITS.get(case, 0.0)
        exact = diffusers_map(theirs, steps, double=True, adapt=adapt).differs(ours, DOUBLE_LIMIT, time_limit)
        assert not exact, f"{spacing}, {steps} steps, in float64: {exact}"
        limits = LIMITS.get(case, LIMIT), time_limit
        rounded = diffusers_map(theirs, steps, double=False, adapt=adapt).differs(ours, *limits)
        assert not rounded, f"{spacing}, {steps} steps: {rounded}"


@pytest.mark.parametrize("case", CASES)
def test_beginning_later_is_as_in_diffusers(case: str) -> None:
    config = {"_class_name": SA, **CASES[case]}
    theirs = {key: value for key, value in config.items() if key != "tau"}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        ours = table_map(dataclasses.replace(table, init_scale=1.0))
        map_ = diffusers_map(theirs, steps, double=True, begin=begin, adapt=with_tau(config))
        different = map_.differs(ours, DOUBLE_LIMIT, TIME_LIMITS.get(case, 0.0))
        assert not different, f"{begin} of {steps}: {different}"
        scheduler = diffusers_scheduler(diffusers.SASolverScheduler, theirs, steps, False, begin)
        one, none = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
        first = torch.tensor([int(table.rows[0].t)])
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((one, none), (none, one))]
        assert table.mix == pytest.approx(mix, rel=1e-5, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(SPACINGS),
    algorithm=st.sampled_from(["data_prediction", "noise_prediction"]),
    predictor=st.integers(1, 3),
    corrector=st.integers(1, 4),
    final=st.booleans(),
    karras=st.booleans(),
    steps=st.integers(1, 50),
    total=st.integers(400, 1200),
    tau=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_map_for_any_options(
    prediction: str, spacing: str, algorithm: str, predictor: int, corrector: int, final: bool, karras: bool,
    steps: int, total: int, tau: float | None,
) -> None:  # fmt: skip
    config = {
        "_class_name": SA, "prediction_type": prediction, "timestep_spacing": spacing, "algorithm_type": algorithm,
        "predictor_order": predictor, "corrector_order": corrector, "use_karras_sigmas": karras,
        "lower_order_final": final or karras, "num_train_timesteps": total,
    }  # fmt: skip
    ours = config | ({} if tau is None else {"tau": tau})
    theirs = diffusers_map(config, steps, double=True, adapt=with_tau(ours))
    if len(theirs.times) == steps:  # rounding gives diffusers one timestep too many for some counts
        # Near steps leave the differences of its exponentials fewer digits.
        different = theirs.differs(table_map(compile_table(ours, steps)), 1e-6)
        assert not different, different


@pytest.mark.parametrize("steps", [2, 9, 20])
def test_thresholded_trajectory_is_that_of_diffusers(steps: int) -> None:
    start, *values = np.random.default_rng(steps).standard_normal((1 + 2 * steps, 2, 3, 4, 4))
    outputs, draws = values[:steps], values[steps:]
    config = {"_class_name": SA, "thresholding": True, "sample_max_value": 1.5}

    def ours(config: dict[str, Any]) -> list[np.ndarray]:
        calls, noise = iter(outputs), {}
        table = compile_table({**config, "tau": 1.0}, steps)
        for row, draw in zip(table.rows, draws, strict=True):
            noise[row.t] = draw
        now = []

        def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
            now.append(t)
            return next(calls)

        return [step.sample for step in loop.sample(table, start, model, lambda: noise[now[-1]])]

    scheduler = diffusers_scheduler(diffusers.SASolverScheduler, config, steps, True)
    scheduler.tau_func = lambda t: 1.0
    theirs, sample = [], torch.from_numpy(start)
    for t, output, draw in zip(scheduler.timesteps, outputs, draws, strict=True):
        with diffusers_noise(scheduler, lambda draw=draw: draw):
            sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
        theirs.append(sample.numpy())
    np.testing.assert_allclose(ours(config), theirs, rtol=1e-9, atol=1e-9)
    assert np.abs(ours({**config, "thresholding": False})[-1] - theirs[-1]).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"predictor_order": 5}, "predictor_order must be 1 to 4"),
        ({"corrector_order": 0}, "corrector_order must be 1 to 4"),
        ({"tau_func": "lambda t: 1"}, "tau_func"),
        ({"tau": 2.0}, "tau must be a number from 0 to 1"),
        # There diffusers looks up a timestep that it was not given.
        ({**NOISE, "thresholding": True}, "knows no thresholding"),
        ({**NOISE, "use_flow_sigmas": True}, "knows no use_flow_sigmas"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError) as caught:
        compile_table({"_class_name": SA, **options}, 4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
