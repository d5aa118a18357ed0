"""DPM-Solver++ on EDM's levels of noise against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from tests.runtimes.samplers.oracle import DOUBLE_LIMIT, diffusers_map, diffusers_scheduler, table_map
from tests.runtimes.samplers.test_dpm import compare_trajectories

EDM, COSINE = "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"
STEPS = (2, 3, 5, 14, 15, 50)  # for 1 see test_a_single_step_starts_from_the_noise
LOW = {"final_sigmas_type": "sigma_min"}
SOLVERS: list[dict[str, Any]] = [
    {"_class_name": EDM, "solver_order": 1},
    {"_class_name": EDM},
    {"_class_name": EDM, "solver_type": "heun"},
    {"_class_name": EDM, "solver_order": 3},
    {"_class_name": EDM, "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    {"_class_name": EDM, "algorithm_type": "sde-dpmsolver++"},
    {"_class_name": EDM, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {"_class_name": COSINE, "solver_order": 1},
    {"_class_name": COSINE},
    {"_class_name": COSINE, "solver_type": "heun"},
]
CASES: dict[str, dict[str, Any]] = {
    "karras": {"sigma_schedule": "karras"},
    "exponential": {"sigma_schedule": "exponential"},
    "rho": {"sigma_schedule": "karras", "rho": 3.5, "sigma_max": 20.0, "sigma_min": 0.05},
    "epsilon": {"prediction_type": "epsilon", "sigma_data": 0.7},
    "v": {"prediction_type": "v_prediction", "sigma_data": 1.3},
    "whole": {"lower_order_final": False},
    "low": {**LOW, "euler_at_final": True},
}
# diffusers spaces the sigmas in float32, and the timesteps are made of them; so its sigmas are only as near as this.
SIGMA_LIMIT = 2e-6


def with_sigmas(config: dict[str, Any], steps: int, begin: int = 0) -> Callable[[Any], Any]:
    """Let diffusers compute with our sigmas, and take the noise of each step from where other schedulers do."""
    sigmas = np.array([compile_table(config, steps, begin=index).mix[1] for index in range(begin, steps)])

    def adapt(scheduler: Any) -> Any:
        theirs = scheduler.sigmas[begin:-1]
        np.testing.assert_allclose(theirs, sigmas, rtol=SIGMA_LIMIT, atol=SIGMA_LIMIT * scheduler.config.sigma_max)
        scheduler.sigmas = scheduler.sigmas.clone()
        scheduler.sigmas[begin:-1] = torch.from_numpy(sigmas)
        module = sys.modules[type(scheduler).__module__]
        scheduler.noise_sampler = lambda *_: module.randn_tensor(None)
        return scheduler

    return adapt


def different(config: dict[str, Any], steps: int, begin: int = 0, limit: float = DOUBLE_LIMIT) -> str:
    """Where our map differs from diffusers', with the same sigmas."""
    table = compile_table(config, steps, begin=begin)
    theirs = diffusers_map(config, steps, double=True, begin=begin, adapt=with_sigmas(config, steps, begin))
    ours = table_map(dataclasses.replace(table, init_scale=1.0) if begin else table)
    return theirs.differs(ours, limit, 1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_map_is_that_of_diffusers(solver: dict[str, Any], case: str) -> None:
    for steps in STEPS:
        config = {**solver, **CASES[case]}
        assert not different(config, steps), f"{steps} steps"


@pytest.mark.parametrize("solver", SOLVERS)
def test_map_with_the_sigmas_of_diffusers(solver: dict[str, Any]) -> None:
    """As it is: its sigmas in float32 are apart by a digit, which the small sigmas multiply."""
    module = sys.modules[getattr(diffusers, solver["_class_name"]).__module__]

    def adapt(scheduler: Any) -> Any:
        scheduler.noise_sampler = lambda *_: module.randn_tensor(None)
        return scheduler

    for case, steps in itertools.product(("karras", "exponential"), STEPS):
        config = {**solver, **CASES[case]}
        theirs = diffusers_map(config, steps, double=False, adapt=adapt)
        assert not theirs.differs(table_map(compile_table(config, steps)), 1e-5, 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(SOLVERS),
    kind=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["karras", "exponential"]),
    low=st.floats(1e-3, 0.5),
    high=st.floats(5.0, 500.0),
    data=st.floats(0.2, 2.0),
    rho=st.floats(4.0, 10.0),  # below, float32 rounds the small sigmas away
    final=st.booleans(),
    euler=st.booleans(),
    ends_low=st.booleans(),
    steps=st.integers(2, 25),
)
def test_map_for_any_options(
    solver: dict[str, Any],
    kind: str,
    spacing: str,
    low: float,
    high: float,
    data: float,
    rho: float,
    final: bool,
    euler: bool,
    ends_low: bool,
    steps: int,
) -> None:
    config = {**solver, "prediction_type": kind, "sigma_schedule": spacing, "sigma_data": data, "rho": rho}
    config |= {"sigma_min": low, "sigma_max": high, "lower_order_final": final, "euler_at_final": euler or ends_low}
    config |= LOW if ends_low else {}  # with Euler's step: see test_a_last_step_of_no_length
    assert not different(config, steps, limit=1e-8)


def diffusers_sigmas(config: dict[str, Any], steps: int) -> np.ndarray:
    kind = getattr(diffusers, config["_class_name"])
    sigmas: np.ndarray = diffusers_scheduler(kind, config, steps, True).sigmas.numpy()
    return sigmas


@pytest.mark.parametrize("kind", [EDM, COSINE])
def test_a_last_step_of_no_length(kind: str) -> None:
    """Sigmas that end at sigma_min reach it twice, and the sample stays; diffusers divides 0 by 0 there."""
    for solver in ("midpoint", "heun"):
        config = {"_class_name": kind, **LOW, "solver_type": solver}
        table = compile_table(config, 20)
        samples = table_map(table).samples
        np.testing.assert_allclose(samples[-1], samples[-2], rtol=1e-12, atol=1e-12)
        theirs = diffusers_map(config, 20, double=True, adapt=with_sigmas(config, 20)).samples
        np.testing.assert_allclose(theirs[:-1], samples[:-1], rtol=1e-8, atol=1e-8)
        assert np.isnan(theirs[-1]).any() == (solver == "heun")


@pytest.mark.parametrize("kind", [EDM, COSINE])
def test_a_single_step_starts_from_the_noise(kind: str) -> None:
    karras = {"_class_name": kind, "sigma_schedule": "karras"}
    assert not different(karras, 1)
    # diffusers' exponential spacing starts a single step at sigma_min, with noise of sigma_max.
    config = {"_class_name": kind, "sigma_schedule": "exponential"}
    scheduler = getattr(diffusers, kind)(sigma_schedule="exponential")
    assert diffusers_sigmas(config, 1)[0] == pytest.approx(scheduler.config.sigma_min)
    assert compile_table(config, 1) == compile_table(karras, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_beginning_later_is_as_in_diffusers(solver: dict[str, Any]) -> None:
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        assert not different(solver, steps, begin)
        kind = getattr(diffusers, solver["_class_name"])
        scheduler = diffusers_scheduler(kind, solver, steps, True, begin)
        image, noise = torch.ones(1).double(), torch.zeros(1).double()
        first = scheduler.timesteps[begin : begin + 1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
        assert compile_table(solver, steps, begin=begin).mix == pytest.approx(mix, rel=SIGMA_LIMIT)


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver["_class_name"] == EDM])
def test_thresholded_trajectory_is_that_of_diffusers(solver: dict[str, Any]) -> None:
    options = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9, "sigma_max": 5.0}
    for steps in (2, 10, 20):
        compare_trajectories({**solver, **options, "sigma_data": 2.0}, steps, limit=1e-5)


def test_the_loop_starts_as_in_diffusers() -> None:
    for kind in (EDM, COSINE):
        table = compile_table({"_class_name": kind}, 10)
        assert table.init_scale == pytest.approx(getattr(diffusers, kind)().init_noise_sigma, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"_class_name": EDM, "algorithm_type": "deis"}, "no step to sigma = 0"),
        ({"_class_name": EDM, "algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"_class_name": EDM, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "no third order"),
        ({"_class_name": EDM, "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": COSINE, "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": COSINE, "solver_order": 3}, "solver_order=3"),
        ({"_class_name": COSINE, "solver_type": "rk4"}, "solver_type='rk4'"),
        ({"_class_name": COSINE, "final_sigmas_type": "none"}, "final_sigmas_type='none'"),
        ({"_class_name": EDM, "sigma_schedule": "linear"}, "sigma_schedule='linear'"),
    ],
)
def test_what_diffusers_refuses_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table(options, 5)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, NotImplementedError, UnboundLocalError)):
        diffusers_map(options, 5, double=False, adapt=noise_from_zeros)


def noise_from_zeros(scheduler: Any) -> Any:
    scheduler.noise_sampler = lambda *_: torch.zeros(1)
    return scheduler


def test_a_range_that_is_turned_around_is_refused() -> None:
    with pytest.raises(DexportError, match="sigma_min must be below sigma_max"):
        compile_table({"_class_name": EDM, "sigma_min": 9.0, "sigma_max": 1.0}, 5)
