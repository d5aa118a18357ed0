"""UniPC and DEIS against diffusers: the whole linear map, and thresholded trajectories; see oracle.py."""

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
    ZERO_SNR,
    diffusers_map,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
STEPS = (1, 2, 3, 5, 10, 20, 50)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LOW = {"final_sigmas_type": "sigma_min"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": (UNIPC, LATENT),
    "unipc-bh1": (UNIPC, {**LATENT, **LOW, "solver_type": "bh1"}),
    "unipc-3": (UNIPC, {**LATENT, "solver_order": 3}),
    "unipc-3-bh1": (UNIPC, {**LOW, "solver_order": 3, "solver_type": "bh1"}),
    "unipc-1": (UNIPC, {**OWN, "solver_order": 1}),
    "unipc-v": (UNIPC, {**LATENT, "prediction_type": "v_prediction", "solver_order": 3}),
    "unipc-sample": (UNIPC, {**COSINE, "prediction_type": "sample"}),
    "unipc-eps": (UNIPC, {**LATENT, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "unipc-eps-v": (
        UNIPC,
        {"predict_x0": False, "prediction_type": "v_prediction", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    ),
    "unipc-uncorrected": (UNIPC, {**LATENT, "disable_corrector": [0, 2, 5]}),
    "unipc-karras": (UNIPC, {**LATENT, "use_karras_sigmas": True}),
    "unipc-karras-range": (UNIPC, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}),
    "unipc-karras-low": (UNIPC, {**LATENT, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    "unipc-exponential": (UNIPC, {**LATENT, "use_exponential_sigmas": True}),
    "unipc-flow": (UNIPC, FLOW),
    "unipc-flow-3": (UNIPC, {**FLOW, **LOW, "solver_order": 3, "solver_type": "bh1"}),
    "unipc-flow-terminal": (UNIPC, {**FLOW, "shift_terminal": 0.1}),
    "unipc-flow-low": (UNIPC, {**FLOW, "final_sigmas_type": "sigma_min"}),
    "unipc-flow-karras": (UNIPC, {**FLOW, "use_karras_sigmas": True}),
    "unipc-zero-snr": (UNIPC, {**ZERO_SNR, "prediction_type": "v_prediction"}),
    "deis": (DEIS, LATENT),
    "deis-1": (DEIS, {**OWN, "solver_order": 1}),
    "deis-3": (DEIS, {**LATENT, "solver_order": 3}),
    "deis-3-whole": (DEIS, {"solver_order": 3, "lower_order_final": False}),
    "deis-v": (DEIS, {**LATENT, "prediction_type": "v_prediction"}),
    "deis-sample": (DEIS, {**COSINE, "prediction_type": "sample"}),
    "deis-karras": (DEIS, {**LATENT, "use_karras_sigmas": True, "solver_order": 3}),
    "deis-exponential": (DEIS, {**LATENT, "use_exponential_sigmas": True}),
    "deis-flow": (DEIS, FLOW),
}


# diffusers as it is computes coefficients in float32, and divides by differences of near logarithms and powers.
LIMITS = {"deis-sample": 1e-2}
LIMIT = 2e-4
# In float32 some spaced sigmas lie below a whole timestep, to which they are then cut.
TIME_LIMITS = {"unipc-exponential": 1.0, "deis-exponential": 1.0}


@pytest.mark.parametrize("case", CASES)
def test_map_is_that_of_diffusers(case: str) -> None:
    kind, options = CASES[case]
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        if case == "unipc-flow-terminal" and steps == 1:
            continue  # see test_one_step_has_no_end_to_stretch_to
        config = {"_class_name": kind, **options, "timestep_spacing": spacing}
        ours = table_map(compile_table(config, steps))
        different = diffusers_map(config, steps, double=True).differs(ours, DOUBLE_LIMIT, TIME_LIMITS.get(case, 0.0))
        assert not different, f"{spacing}, {steps} steps, in float64: {different}"
        limits = LIMITS.get(case, LIMIT), TIME_LIMITS.get(case, 0.0)
        rounded = diffusers_map(config, steps, double=False).differs(ours, *limits)
        assert not rounded, f"{spacing}, {steps} steps: {rounded}"


@pytest.mark.parametrize("case", CASES)
def test_beginning_later_is_as_in_diffusers(case: str) -> None:
    kind, options = CASES[case]
    config = {"_class_name": kind, **options}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        theirs = diffusers_map(config, steps, double=True, begin=begin)
        ours = table_map(dataclasses.replace(table, init_scale=1.0))
        different = theirs.differs(ours, DOUBLE_LIMIT, TIME_LIMITS.get(case, 0.0))
        assert not different, f"{begin} of {steps}: {different}"
        scheduler = diffusers_scheduler(getattr(diffusers, kind), config, steps, False, begin)
        one, none = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
        first = scheduler.timesteps[begin : begin + 1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((one, none), (none, one))]
        assert table.mix == pytest.approx(mix, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([UNIPC, DEIS]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(SPACINGS),
    solver=st.sampled_from(["bh1", "bh2", "midpoint"]),
    order=st.integers(1, 3),
    final=st.booleans(),
    karras=st.booleans(),
    steps=st.integers(1, 50),
    total=st.integers(400, 1200),
    last=st.floats(5e-3, 0.03),
)
def test_map_for_any_options(
    kind: str, prediction: str, spacing: str, solver: str, order: int, final: bool, karras: bool, steps: int,
    total: int, last: float,
) -> None:  # fmt: skip
    config = {
        "_class_name": kind, "prediction_type": prediction, "timestep_spacing": spacing, "solver_type": solver,
        "solver_order": order, "lower_order_final": final or karras, "use_karras_sigmas": karras, **LOW,
        "num_train_timesteps": total, "beta_end": last,
    }  # fmt: skip
    theirs = diffusers_map(config, steps, double=True)
    if len(theirs.times) == steps:  # rounding gives diffusers one timestep too many for some counts
        different = theirs.differs(table_map(compile_table(config, steps)), 1e-9)
        assert not different, different


@pytest.mark.parametrize("kind", [UNIPC, DEIS])
@pytest.mark.parametrize("mu", [0.3, 1.15])
def test_shift_by_resolution_is_that_of_diffusers(kind: str, mu: float) -> None:
    config = {"_class_name": kind, **FLOW, "flow_shift": 1.0, "use_dynamic_shifting": True}
    theirs = diffusers_map(config, 12, double=True, mu=mu)
    different = theirs.differs(table_map(compile_table(config, 12, mu=mu)), DOUBLE_LIMIT)
    assert not different, different


def test_own_sigmas_are_those_of_diffusers() -> None:
    config = {"_class_name": UNIPC, **FLOW}
    sigmas = [1.0, 0.9, 0.6, 0.3, 0.1]
    theirs = diffusers_map(config, 5, double=True, sigmas=np.array(sigmas))
    different = theirs.differs(table_map(compile_table(config, 5, sigmas=[*sigmas, 0.0])), DOUBLE_LIMIT)
    assert not different, different


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": UNIPC, "sample_max_value": 1.5},
        {"_class_name": UNIPC, "solver_order": 3, "dynamic_thresholding_ratio": 0.9},
        {"_class_name": DEIS, "sample_max_value": 1.5},
        {"_class_name": DEIS, "solver_order": 1, "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("steps", [2, 9, 20])
def test_thresholded_trajectory_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    start, *outputs = np.random.default_rng(steps).standard_normal((1 + steps, 2, 3, 4, 4))

    def ours(config: dict[str, Any]) -> list[np.ndarray]:
        calls = iter(outputs)
        table = compile_table(config, steps)
        return [step.sample for step in loop.sample(table, start, lambda *_: next(calls), lambda: start)]

    config = {**config, "thresholding": True}
    scheduler = diffusers_scheduler(getattr(diffusers, config["_class_name"]), config, steps, True)
    theirs, sample = [], torch.from_numpy(start)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
        theirs.append(sample.numpy())
    np.testing.assert_allclose(ours(config), theirs, rtol=1e-9, atol=1e-9)
    assert np.abs(ours({**config, "thresholding": False})[-1] - theirs[-1]).max() > 1e-2


def test_bh1_can_end_without_noise() -> None:
    """There diffusers multiplies its infinite B(h) = -h by 0, and gives NaN."""
    config = {"_class_name": UNIPC, "solver_type": "bh1"}
    assert np.isnan(diffusers_map(config, 10, double=False).samples[-1]).any()
    samples = table_map(compile_table(config, 10)).samples
    assert np.isfinite(samples).all()


def test_one_step_has_no_end_to_stretch_to() -> None:
    """From pure noise to itself: diffusers divides 0 by 0."""
    config = {"_class_name": UNIPC, **FLOW}
    stretched = table_map(compile_table({**config, "shift_terminal": 0.1}, 1))
    assert not stretched.differs(table_map(compile_table(config, 1)), 0.0)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (UNIPC, {"solver_order": 4}, "solver_order must be 1 to 3"),
        (UNIPC, {"predict_x0": False, **FLOW}, "no flow_prediction"),
        (UNIPC, {"disable_corrector": "all"}, "disable_corrector"),
        (UNIPC, {"solver_p": {"_class_name": "DDIMScheduler"}}, "solver_p"),
        (UNIPC, {"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True"),
        (UNIPC, {**FLOW, "use_exponential_sigmas": True}, "only use_karras_sigmas goes with"),
        (UNIPC, {**FLOW, "use_dynamic_shifting": True}, "needs mu"),
        (UNIPC, {"lower_order_final": False}, "no usable steps"),  # order 2 to where lambda is infinite
        (DEIS, {"solver_order": 4}, "solver_order must be 1 to 3"),
        (DEIS, {"solver_order": 3, "thresholding": True}, "solver_order=2"),
        (DEIS, {**FLOW, "use_karras_sigmas": True}, "exclude each other"),
        (DEIS, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError) as caught:
        compile_table({"_class_name": kind, **options}, 4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
