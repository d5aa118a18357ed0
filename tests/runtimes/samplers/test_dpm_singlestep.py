"""DPM-Solver in groups of steps against diffusers: see oracle.py."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    diffusers_map,
    diffusers_scheduler,
    made,
    table_map,
)  # fmt: skip
from tests.runtimes.samplers.test_dpm import FLOW, LOW, combined, compare_trajectories

pytestmark = [
    # torch's arrays and numpy's newest differ on this inside of diffusers.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*deprecated:FutureWarning"),
]

KIND = {"_class_name": "DPMSolverSinglestepScheduler"}
STEPS = (1, 2, 3, 4, 5, 6, 12, 20, 21, 49, 50)
SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SOLVERS = [
    pair
    for pair in itertools.product(("dpmsolver++", "sde-dpmsolver++", "dpmsolver"), (1, 2, 3), ("midpoint", "heun"))
    if pair[1:] != (1, "heun")
]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "latent": (LATENT, {}),
    "v": ({**OWN, "prediction_type": "v_prediction"}, {}),
    "sample": ({**LATENT, "prediction_type": "sample"}, {}),
    "low": ({**LATENT, **LOW}, {}),
    "low-final": ({**LATENT, **LOW, "lower_order_final": True}, {}),
    "lambda-clipped": ({**COSINE, "lambda_min_clipped": -5.1}, {}),
    "karras": ({**LATENT, "use_karras_sigmas": True}, {}),
    "karras-cosine": ({**COSINE, "use_karras_sigmas": True}, {}),
    "exponential": ({**LATENT, "use_exponential_sigmas": True}, {}),
    "beta": ({**LATENT, "use_beta_sigmas": True}, {}),
    "flow": ({**FLOW, "flow_shift": 3.0}, {}),
    "flow-low": ({**FLOW, **LOW, "prediction_type": "epsilon"}, {}),
    "flow-shifted": ({**FLOW, "use_dynamic_shifting": True}, {"mu": 1.1}),
}


@pytest.fixture(autouse=True)
def configs_of_their_own() -> None:
    """diffusers changes its config: see test_lower_orders_stay_in_the_config_of_diffusers."""
    made.cache_clear()


def different(config: dict[str, Any], steps: int, limit: float = DOUBLE_LIMIT, **asked: Any) -> str:
    """Where our map differs from diffusers' in float64."""
    made.cache_clear()
    return diffusers_map(config, steps, double=True, **asked).differs(
        table_map(compile_table(config, steps, **asked)), limit
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_map_is_that_of_diffusers(case: str, algorithm: str, order: int, solver: str) -> None:
    options, asked = CASES[case]
    config = combined(algorithm, order, solver, **options) | KIND
    if config.get("prediction_type") == "flow_prediction" and algorithm == "dpmsolver":
        config |= {"prediction_type": "epsilon"}
    for steps in STEPS:
        assert not different(config, steps, **asked), f"{steps} steps"


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_map_is_near_that_of_diffusers_in_float32(algorithm: str, order: int, solver: str) -> None:
    config = combined(algorithm, order, solver, **LATENT) | KIND
    for steps in STEPS:
        made.cache_clear()
        theirs = diffusers_map(config, steps, double=False)
        # Its differences of lambda, and e^h - 1 by powers of h, are in float32.
        assert not theirs.differs(table_map(compile_table(config, steps)), 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(SOLVERS),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
    spaced=st.sampled_from([None, *SPACED]),
    shift=st.floats(0.2, 12.0),
    final=st.booleans(),
    low=st.booleans(),
    total=st.integers(100, 1200),
    last=st.floats(2e-3, 0.05),
    steps=st.integers(1, 50),
)
def test_map_for_any_options(
    solver: tuple[str, int, str],
    kind: str,
    spaced: str | None,
    shift: float,
    final: bool,
    low: bool,
    total: int,
    last: float,
    steps: int,
) -> None:
    options = {"num_train_timesteps": total, "beta_end": last, "prediction_type": kind, "lower_order_final": final}
    options |= LOW if low else {}
    if kind == "flow_prediction":
        solver = (solver[0] if solver[0].endswith("++") else "dpmsolver++", *solver[1:])
        options |= {"use_flow_sigmas": True, "flow_shift": shift}
    elif spaced:
        options |= {spaced: True}
    config = combined(*solver, **options) | KIND
    made.cache_clear()
    theirs = diffusers_map(config, steps, double=True)
    if np.isnan(theirs.samples).any():  # see test_an_sde_does_not_step_up_to_sigma_min
        with pytest.raises(DexportError, match="no step up"):
            compile_table(config, steps)
        return
    # Spaced timesteps that lie between two of float32 are cut to whole ones by their last digit.
    assert not theirs.differs(table_map(compile_table(config, steps)), 1e-8, 1.0 if spaced else 0.0)


def test_an_sde_does_not_step_up_to_sigma_min() -> None:
    """sigma_min is that of the betas, and may be above the last sigmas of a flow; diffusers then makes NaN of noise."""
    config = combined("sde-dpmsolver++", 1, "midpoint", **LATENT, **LOW, use_flow_sigmas=True) | KIND
    assert np.isnan(diffusers_map(config, 40, double=True).samples).any()
    with pytest.raises(DexportError, match="no step up in noise") as caught:
        compile_table(config, 40)
    assert "\n" not in str(caught.value)
    assert not different(config, 20)
    # Without noise it is a step like any.
    assert not different(config | {"algorithm_type": "dpmsolver++"}, 40)


@pytest.mark.parametrize(("algorithm", "order", "solver"), [s for s in SOLVERS if s[0].endswith("++")])
def test_thresholded_trajectory_is_that_of_diffusers(algorithm: str, order: int, solver: str) -> None:
    options = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    for steps, kind in itertools.product((1, 3, 10, 20), ("epsilon", "v_prediction")):
        config = combined(algorithm, order, solver, **LATENT, **options, prediction_type=kind) | KIND
        compare_trajectories(config, steps)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_given_timesteps_as_in_diffusers(algorithm: str, order: int, solver: str) -> None:
    for times in ([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500]):
        assert not different(combined(algorithm, order, solver, **LATENT) | KIND, len(times), timesteps=times)


@pytest.mark.parametrize("case", ["latent", "v", "karras", "low", "flow", "flow-shifted"])
@pytest.mark.parametrize(("algorithm", "order", "solver"), [s for s in SOLVERS if s[0].endswith("++")])
def test_beginning_later_is_as_in_diffusers(case: str, algorithm: str, order: int, solver: str) -> None:
    """Within a group too, of which the rest is then a group of its own."""
    options, asked = CASES[case]
    config = combined(algorithm, order, solver, **options) | KIND
    for steps, begin in ((10, 1), (10, 4), (12, 2), (12, 3), (20, 19)):
        assert not different(config, steps, begin=begin, **asked)
        scheduler = diffusers_scheduler(diffusers.DPMSolverSinglestepScheduler, config, steps, True, begin, **asked)
        image, noise = torch.ones(1).double(), torch.zeros(1).double()
        first = scheduler.timesteps[begin : begin + 1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
        assert compile_table(config, steps, begin=begin, **asked).mix == pytest.approx(mix, rel=1e-9)


def test_lower_orders_stay_in_the_config_of_diffusers() -> None:
    """A number of steps that its groups do not divide lowers the order of the runs after it; not of ours."""
    config = {**KIND, **LATENT, **LOW}
    assert not different(config, 10)
    scheduler = diffusers.DPMSolverSinglestepScheduler.from_config(config)
    scheduler.set_timesteps(10)
    before = list(scheduler.order_list)
    scheduler.set_timesteps(9)
    scheduler.set_timesteps(10)
    assert (before[-2:], scheduler.order_list[-2:]) == ([1, 2], [1, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm_type": "dpmsolver"}, "no step to sigma = 0"),
        ({"algorithm_type": "deis"}, "no step to sigma = 0"),
        ({"algorithm_type": "sde-dpmsolver", **LOW}, "algorithm_type='sde-dpmsolver'"),
        ({"algorithm_type": "dpmsolver", **LOW, "thresholding": True}, "no thresholding"),
        ({"algorithm_type": "dpmsolver", **LOW, **FLOW}, "knows no flow_prediction"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"solver_type": "rk4"}, "solver_type='rk4'"),
        ({"final_sigmas_type": "none"}, "final_sigmas_type='none'"),
        ({"prediction_type": "score"}, "prediction_type='score'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    ],
)
def test_what_diffusers_refuses_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({**KIND, **options}, 5)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError, TypeError)):
        diffusers_map({**KIND, **options}, 5, double=False)
