"""DPM-Solver over past steps against diffusers: the whole linear map, and thresholded trajectories; see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop
from runtimes.errors import DexportError
from runtimes.samplers import compile_table, dpm
from runtimes.table import H0, H1, H2
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    SPACINGS,
    STEPS,
    ZERO_SNR,
    Float64,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

pytestmark = [
    # torch's arrays and numpy's newest differ on this inside of diffusers.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # Of the algorithms that integrate eps.
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*deprecated:FutureWarning"),
]

KIND = "DPMSolverMultistepScheduler"
LOW = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "karras": ({**LATENT, "use_karras_sigmas": True}, {}),
    "exponential": ({**LATENT, "use_exponential_sigmas": True}, {}),
    "beta": ({**LATENT, "use_beta_sigmas": True}, {}),
    "lu": ({**LATENT, "use_lu_lambdas": True}, {}),
    "lu-cosine": ({**COSINE, "use_lu_lambdas": True}, {}),
    "own": ({**OWN, **LOW, "lower_order_final": False, "timestep_spacing": "leading"}, {}),
    "euler-at-final": ({**LATENT, **LOW, "euler_at_final": True, "timestep_spacing": "trailing"}, {}),
    "lambda-clipped": ({**COSINE, "lambda_min_clipped": -5.1}, {}),
    "zero-snr": ({**ZERO_SNR, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
    "sample": ({**LATENT, "prediction_type": "sample"}, {}),
    "flow": ({**FLOW, "flow_shift": 3.0}, {}),
    "flow-low": ({**FLOW, **LOW}, {}),
    "flow-epsilon": ({**FLOW, "prediction_type": "epsilon", "flow_shift": 0.4}, {}),
    "flow-shifted": ({**FLOW, "flow_shift": 3.0, "use_dynamic_shifting": True}, {"mu": 1.3}),
    "flow-unshifted": ({**FLOW, "flow_shift": 2.5, "use_dynamic_shifting": True}, {}),
}


def combined(algorithm: str, order: int, solver: str, **options: Any) -> dict[str, Any]:
    config = {"_class_name": KIND, **options, "algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    return config | (LOW if not algorithm.endswith("++") else {})


SOLVERS = [
    (algorithm, order, solver)
    for algorithm, (order, solver) in itertools.product(
        ALGORITHMS, [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
    )
    if (algorithm, order) != ("sde-dpmsolver", 3)
]


def different(config: dict[str, Any], steps: int, limit: float = DOUBLE_LIMIT, **asked: Any) -> str:
    """Where our map differs from diffusers' in float64."""
    ours = table_map(compile_table(config, steps, **asked))
    return diffusers_map(config, steps, double=True, **asked).differs(ours, limit)


def ends_twice(config: dict[str, Any]) -> bool:
    """Whether the last two sigmas are one and the same."""
    return config.get("final_sigmas_type") == "sigma_min" and any(config.get(option) for option in SPACED)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_map_is_that_of_diffusers(algorithm: str, order: int, solver: str) -> None:
    for kind, steps in itertools.product(("epsilon", "v_prediction"), STEPS):
        config = combined(algorithm, order, solver, **LATENT, prediction_type=kind)
        assert not different(config, steps)
        # As it is, diffusers takes e^h - 1 and differences of lambda in float32, and divides by both for order 3.
        ours = table_map(compile_table(config, steps))
        assert not diffusers_map(config, steps, double=False).differs(ours, 1e-4 if order == 3 else 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_map_of_every_solver_on_every_schedule(case: str, algorithm: str, order: int, solver: str) -> None:
    options, asked = CASES[case]
    config = combined(algorithm, order, solver, **options)
    if config.get("prediction_type") == "flow_prediction" and not algorithm.endswith("++"):
        config |= {"prediction_type": "epsilon"}
    for steps in (1, 2, 4, 14, 15, 30):
        if steps >= 15 and ends_twice(config) and (solver == "heun" or order == 3):
            continue  # see test_a_last_step_of_no_length
        assert not different(config, steps, **asked), f"{steps} steps"


def test_an_sde_does_not_go_back() -> None:
    """Where a flow's last sigma lies below the lowest that betas give, the last step would take noise away."""
    config = {
        "_class_name": KIND, **LOW, "algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True,
        "prediction_type": "flow_prediction", "flow_shift": 0.2,
    }  # fmt: skip
    with pytest.raises(DexportError, match="final_sigmas_type to 'zero'"):
        compile_table(config, 50)


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(SOLVERS),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
    spacing=st.sampled_from(SPACINGS),
    spaced=st.sampled_from([None, *SPACED]),
    shift=st.floats(0.2, 12.0),
    final=st.booleans(),
    euler=st.booleans(),
    low=st.booleans(),
    total=st.integers(100, 1200),
    last=st.floats(2e-3, 0.05),
    steps=st.integers(1, 50),
)
def test_map_for_any_options(
    solver: tuple[str, int, str],
    kind: str,
    spacing: str,
    spaced: str | None,
    shift: float,
    final: bool,
    euler: bool,
    low: bool,
    total: int,
    last: float,
    steps: int,
) -> None:
    options = {"timestep_spacing": spacing, "num_train_timesteps": total, "beta_end": last, "prediction_type": kind}
    options |= {"lower_order_final": final, "euler_at_final": euler, **(LOW if low else {})}
    if kind == "flow_prediction":
        solver = (solver[0] if solver[0].endswith("++") else "dpmsolver++", *solver[1:])
        options |= {"use_flow_sigmas": True, "flow_shift": shift}
    elif spaced:
        options |= {spaced: True}
    config = combined(*solver, **options)
    if ends_twice(config) and steps > 1:
        config |= {"euler_at_final": True}  # see test_a_last_step_of_no_length
    if spacing == "trailing":
        steps = max(s for s in range(1, steps + 1) if total % s == 0)  # else rounding may give one step more
    theirs = diffusers_map(config, steps, double=True)
    if np.isnan(theirs.samples).any():  # see test_an_sde_does_not_step_up_to_sigma_min
        with pytest.raises(DexportError, match="no step up"):
            compile_table(config, steps)
        return
    # Spaced timesteps that lie between two of float32 are cut to whole ones by their last digit.
    assert not theirs.differs(table_map(compile_table(config, steps)), 1e-8, 1.0 if spaced else 0.0)


def test_an_sde_does_not_step_up_to_sigma_min() -> None:
    """sigma_min is that of the betas, and may be above the last sigmas of a flow; diffusers then makes NaN of noise."""
    for algorithm in ("sde-dpmsolver++", "sde-dpmsolver"):
        config = combined(algorithm, 2, "midpoint", **LATENT, **LOW, use_flow_sigmas=True)
        assert np.isnan(diffusers_map(config, 40, double=True).samples).any()
        with pytest.raises(DexportError, match="no step up in noise") as caught:
            compile_table(config, 40)
        assert "\n" not in str(caught.value)
        assert not different(config, 20)
        # Both ways out that the error names: without noise it is a step like any.
        assert not different(config | {"algorithm_type": "dpmsolver++"}, 40)
        assert not different(config | {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}, 40)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_a_last_step_of_no_length(order: int, solver: str) -> None:
    """Spaced sigmas that end at sigma_min reach it twice, and the sample stays; diffusers divides 0 by 0 there."""
    for algorithm in ALGORITHMS:
        if (algorithm, order) == ("sde-dpmsolver", 3):
            continue
        config = combined(algorithm, order, solver, **LATENT, **LOW, use_karras_sigmas=True)
        samples = table_map(compile_table(config, 20)).samples
        np.testing.assert_allclose(samples[-1], samples[-2], rtol=1e-12, atol=1e-12)
        theirs = diffusers_map(config, 20, double=True).samples
        np.testing.assert_allclose(theirs[:-1], samples[:-1], rtol=1e-8, atol=1e-8)
        assert np.isnan(theirs[-1]).any() == (solver == "heun" or order == 3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_thresholded_trajectory_is_that_of_diffusers(algorithm: str, order: int) -> None:
    options = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    config = combined(algorithm, order, "midpoint", **LATENT, **options)
    if order == 3 and algorithm != "dpmsolver++" and algorithm != "sde-dpmsolver++":
        with pytest.raises(DexportError, match="third order" if algorithm.startswith("sde") else "keeps one past eps"):
            compile_table(config, 10)
        return
    for steps, kind in itertools.product((1, 3, 10, 20), ("epsilon", "v_prediction")):
        compare_trajectories({**config, "prediction_type": kind}, steps)


def compare_trajectories(config: dict[str, Any], steps: int, limit: float = 1e-9) -> None:
    """Run diffusers' scheduler and our table on the same random outputs, from which thresholding takes some."""
    random = np.random.default_rng(steps)
    start, *values = random.standard_normal((1 + 2 * steps, 2, 3, 4, 4))
    outputs, draws = values[:steps], values[steps:]
    scheduler = diffusers_scheduler(getattr(diffusers, config["_class_name"]), config, steps, True)
    theirs, sample = [], torch.from_numpy(start) * scheduler.init_noise_sigma
    with Float64():
        for t, output, draw in zip(scheduler.timesteps, outputs, draws, strict=True):
            with diffusers_noise(scheduler, lambda draw=draw: draw):
                sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
            theirs.append(sample.numpy())
    assert np.abs(trajectory(config, start, outputs, draws) - theirs).max() < limit
    loose = trajectory({**config, "thresholding": False}, start, outputs, draws)
    assert np.abs(loose[-1] - theirs[-1]).max() > 1e-2


def trajectory(config: dict[str, Any], start: np.ndarray, outputs: list[np.ndarray], draws: list[np.ndarray]) -> Any:
    """What our table makes of the outputs."""
    calls: list[int] = []

    def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
        calls.append(len(calls))
        return outputs[calls[-1]]

    table = compile_table(config, len(outputs))
    return np.stack([step.sample for step in loop.sample(table, start, model, lambda: draws[calls[-1]])])


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_a_learned_variance_is_left_out(kind: str) -> None:
    config = {"_class_name": KIND, **LATENT, "variance_type": kind}
    random = np.random.default_rng(3)
    start = random.standard_normal((1, 3, 4, 4))
    outputs = [*random.standard_normal((5, 1, 6, 4, 4))]
    scheduler = diffusers_scheduler(diffusers.DPMSolverMultistepScheduler, config, 5, True)
    sample = torch.from_numpy(start)
    with Float64():
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
    np.testing.assert_allclose(trajectory(config, start, outputs, [])[-1], sample.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_given_timesteps_as_in_diffusers(algorithm: str, order: int, solver: str) -> None:
    for times in ([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [999, 0]):
        config = combined(algorithm, order, solver, **LATENT)
        if times[-1] == 0 and not algorithm.endswith("++"):
            continue  # from sigma_min to sigma_min
        assert not different(config, len(times), timesteps=times)


@pytest.mark.parametrize("case", ["sample", "karras", "flow", "flow-shifted", "zero-snr"])
@pytest.mark.parametrize(("algorithm", "order", "solver"), [s for s in SOLVERS if s[0].endswith("++")])
def test_beginning_later_is_as_in_diffusers(case: str, algorithm: str, order: int, solver: str) -> None:
    options, asked = CASES[case]
    config = combined(algorithm, order, solver, **options)
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        assert not different(config, steps, begin=begin, **asked)
        scheduler = diffusers_scheduler(diffusers.DPMSolverMultistepScheduler, config, steps, True, begin, **asked)
        image, noise = torch.ones(1).double(), torch.zeros(1).double()
        first = scheduler.timesteps[begin : begin + 1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
        assert compile_table(config, steps, begin=begin, **asked).mix == pytest.approx(mix, rel=1e-9)


def test_mu_stays_in_the_config_of_diffusers() -> None:
    """Each table has its own shift; diffusers keeps the last mu for the runs after it."""
    config = {"_class_name": KIND, **FLOW, "use_dynamic_shifting": True, "flow_shift": 2.0}
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(5)
    first = scheduler.timesteps.tolist()
    assert [row.t for row in compile_table(config, 5).rows] == first
    scheduler.set_timesteps(5, mu=0.3)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() != first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm_type": "dpmsolver"}, "no step to sigma = 0"),
        ({"algorithm_type": "sde-dpmsolver"}, "no step to sigma = 0"),
        ({"algorithm_type": "deis"}, "no step to sigma = 0"),
        ({"final_sigmas_type": "none"}, "final_sigmas_type='none'"),
        ({"algorithm_type": "unipc"}, "algorithm_type='unipc'"),
        ({"solver_type": "rk4"}, "solver_type='rk4'"),
        ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "exclude each other"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even'"),
        ({"prediction_type": "score"}, "prediction_type='score'"),
        ({**LOW, "algorithm_type": "dpmsolver", **FLOW}, "knows no flow_prediction"),
        ({**LOW, "algorithm_type": "sde-dpmsolver", "solver_order": 3}, "no third order"),
    ],
)
def test_what_diffusers_refuses_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({"_class_name": KIND, **options}, 5)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, NotImplementedError, UnboundLocalError)):
        diffusers_map({"_class_name": KIND, **options}, 5, double=False)


@pytest.mark.parametrize(
    ("options", "asked", "words"),
    [
        ({"solver_order": 4}, {}, "solver_order=4"),  # diffusers makes steps of order 3
        (
            {"prediction_type": "flow_prediction"},
            {},
            "needs use_flow_sigmas",
        ),  # diffusers takes sigma / alpha for sigma
        ({**FLOW, "use_karras_sigmas": True}, {}, "exclude each other"),  # NaN in diffusers
        ({"use_lu_lambdas": True, "use_karras_sigmas": True}, {}, "exclude each other"),  # diffusers takes Karras'
        (FLOW, {"timesteps": [900, 500, 100, 50, 20]}, "exclude each other"),
        (FLOW, {"mu": 1.0}, "leave mu out"),
        ({}, {"timesteps": [900, 900, 100, 50, 20]}, "do not fall"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({"_class_name": KIND, **options}, 5, **asked)
    assert "\n" not in str(caught.value)


def test_the_third_order_sde_turns_a_sign_in_diffusers() -> None:
    """With outputs that are quadratic in lambda the weight of D2 would be z phi_3(z); diffusers' is 1 more."""
    config = combined("sde-dpmsolver++", 3, "midpoint", **LATENT)
    assert not different(config, 20)
    turned = [row.x_h[2] for row in compile_table(config, 20).rows[2:-1]]
    ordinary = [row.x_h[2] for row in compile_table({**config, "algorithm_type": "dpmsolver++"}, 20).rows[2:-1]]
    assert all(a < 0 < b for a, b in zip(turned, ordinary, strict=True))


@pytest.mark.parametrize(("order", "slope"), [(1, 1.0), (2, 2.0), (3, 2.15)])
def test_how_errors_fall_with_the_step(order: int, slope: float) -> None:
    """Where x_0 = sin(lambda): x = sigma (1 + int e^u sin u du). diffusers' order 3 halves D2, and so has order 2."""

    def exact(here: float) -> float:
        values = [math.exp(u) * (math.sin(u) - math.cos(u)) / 2 for u in (-1.0, here)]
        return levels_at(here)[1] * (1 + values[1] - values[0])

    def levels_at(here: float) -> tuple[float, float]:
        alpha = 1 / math.sqrt(1 + math.exp(-2 * here))
        return alpha, math.exp(-here) * alpha

    def error(steps: int) -> float:
        lambdas = np.linspace(-1, 1, steps + 1).tolist()
        levels = [levels_at(value) for value in lambdas]
        config = {"algorithm_type": "dpmsolver++", "solver_type": "heun"}
        x = exact(lambdas[2])
        for index in range(2, steps):
            weights = dpm.advance(config, levels, index, order, [H0, H1, H2]).weights
            x = float(np.dot(weights[:1] + weights[3:6], [x, *(math.sin(lambdas[index - k]) for k in range(3))]))
        return abs(x - exact(1.0))

    assert math.log2(error(80) / error(160)) == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_a_wrong_row_is_detected(algorithm: str) -> None:
    config = combined(algorithm, 3, "midpoint", **LATENT)
    table, theirs = compile_table(config, 10), diffusers_map(config, 10, double=True)
    for index, field in itertools.product((0, 5), ("t", "x_x", "x_z", "h_m", "h_x")):
        right = table.rows[index]
        if getattr(right, field):
            changed = dataclasses.replace(right, **{field: getattr(right, field) * (1 + 1e-6)})
            rows = (*table.rows[:index], changed, *table.rows[index + 1 :])
            assert theirs.differs(table_map(dataclasses.replace(table, rows=rows)), DOUBLE_LIMIT)


INVERSE = {"_class_name": "DPMSolverMultistepInverseScheduler"}
INVERSE_CASES: dict[str, dict[str, Any]] = {
    "latent": LATENT,
    "leading": {**LATENT, "timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing", "euler_at_final": True},
    "v": {**OWN, "prediction_type": "v_prediction", "lower_order_final": False},
    "sample": {**LATENT, "prediction_type": "sample"},
    "lambda-clipped": {**COSINE, "lambda_min_clipped": -5.1},
    "exponential": {**LATENT, "use_exponential_sigmas": True},
    "karras": {**LATENT, "use_karras_sigmas": True},
    "beta": {**LATENT, "use_beta_sigmas": True},
}
INVERSE_SOLVERS = [solver for solver in SOLVERS if not solver[0].startswith("sde")]


@pytest.mark.parametrize("case", INVERSE_CASES)
@pytest.mark.parametrize(("algorithm", "order", "solver"), INVERSE_SOLVERS)
def test_the_inverse_is_that_of_diffusers(case: str, algorithm: str, order: int, solver: str) -> None:
    config = combined(algorithm, order, solver, **INVERSE_CASES[case]) | INVERSE
    spaced = case in ("exponential", "karras", "beta")
    for steps in (1, 2, 4, 10, 14) if spaced else STEPS:
        # Spaced timesteps that lie between two of float32 are cut to whole ones by their last digit.
        ours = table_map(compile_table(config, steps))
        assert not diffusers_map(config, steps, double=True).differs(ours, 1e-8, float(spaced)), f"{steps} steps"
        # As it is, diffusers takes e^h - 1 and differences of lambda in float32, and divides by both for order 3.
        limit = 1e-4 if order == 3 else 1e-5
        assert case != "latent" or not diffusers_map(config, steps, double=False).differs(ours, limit)


@settings(max_examples=40, deadline=None)
@given(
    solver=st.sampled_from(INVERSE_SOLVERS),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(SPACINGS),
    final=st.booleans(),
    euler=st.booleans(),
    total=st.integers(100, 1200),
    last=st.floats(2e-3, 0.05),
    steps=st.integers(1, 50),
)
def test_the_inverse_for_any_options(
    solver: tuple[str, int, str],
    kind: str,
    spacing: str,
    final: bool,
    euler: bool,
    total: int,
    last: float,
    steps: int,
) -> None:
    options = {"timestep_spacing": spacing, "num_train_timesteps": total, "beta_end": last, "prediction_type": kind}
    config = combined(*solver, **options, lower_order_final=final, euler_at_final=euler) | INVERSE
    if spacing == "trailing":
        steps = max(s for s in range(1, steps + 1) if total % s == 0)  # else rounding may give one step more
        config["euler_at_final"] = True  # its last step has no length: see test_a_last_step_of_no_length
    assert not diffusers_map(config, steps, double=True).differs(table_map(compile_table(config, steps)), 1e-8)


def test_the_inverse_loses_steps_in_diffusers() -> None:
    """Where rounded timesteps repeat, diffusers leaves them out, but not their sigmas: it stops short of the noise."""
    config = {**INVERSE, **LATENT, "use_karras_sigmas": True}
    scheduler = diffusers_scheduler(diffusers.DPMSolverMultistepInverseScheduler, config, 50, True)
    table = compile_table(config, 50)
    assert len(scheduler.timesteps) < len(scheduler.sigmas) - 1 == len(table.rows)
    assert [row.t for row in table.rows][-1] == scheduler.timesteps[-1] == 999


def test_the_inverse_undoes_the_way_from_noise() -> None:
    """With a model that predicts the one eps there is, an image comes back from its noise."""
    forth, back = {**LATENT, **INVERSE}, {**LATENT, **LOW, "_class_name": KIND}
    image, eps = np.full((1, 1, 1, 1), 0.5), np.full((1, 1, 1, 1), -0.8)
    noisy = compile_table(forth, 20)
    start = noisy.mix[0] * image + noisy.mix[1] * eps
    *_, there = loop.sample(noisy, start, lambda *_: eps, lambda: eps)
    *_, again = loop.sample(compile_table(back, 20), there.sample, lambda *_: eps, lambda: eps)
    np.testing.assert_allclose(again.sample, start, rtol=1e-6)


@pytest.mark.parametrize("thresholded", ["dpmsolver++", "dpmsolver"])
def test_the_thresholded_inverse_is_that_of_diffusers(thresholded: str) -> None:
    options = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    for steps in (3, 10, 20):
        compare_trajectories(combined(thresholded, 2, "midpoint", **LATENT, **options) | INVERSE, steps)


@pytest.mark.parametrize("begin", [1, 4, 9])
def test_the_inverse_begins_later_as_in_diffusers(begin: int) -> None:
    config = {**INVERSE, **LATENT, "solver_order": 3}
    assert not different(config, 10, begin=begin)
    scheduler = diffusers_scheduler(diffusers.DPMSolverMultistepInverseScheduler, config, 10, True)
    image, noise = torch.ones(1).double(), torch.zeros(1).double()
    first = scheduler.timesteps[begin : begin + 1]
    mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
    assert compile_table(config, 10, begin=begin).mix == pytest.approx(mix, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm_type": "sde-dpmsolver++"}, "has no steps"),  # NaN in diffusers
        ({"algorithm_type": "sde-dpmsolver"}, "has no steps"),
        (FLOW, "no way to noise for a flow"),
        ({"use_flow_sigmas": True}, "no way to noise for a flow"),
        ({"prediction_type": "flow_prediction"}, "no way to noise for a flow"),
        ({"algorithm_type": "unipc"}, "algorithm_type='unipc'"),
    ],
)
def test_what_makes_no_inverse_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({**INVERSE, **options}, 5)
    assert "\n" not in str(caught.value)
    if options.get("algorithm_type", "").startswith("sde"):
        assert np.isnan(diffusers_map({**INVERSE, **options}, 5, double=False).samples).any()
    with pytest.raises(DexportError, match="take fewer"):
        compile_table(INVERSE, 1001)


def test_the_sigmas_of_the_inverse_of_a_flow_fall_in_diffusers() -> None:
    scheduler = diffusers.DPMSolverMultistepInverseScheduler(use_flow_sigmas=True)
    scheduler.set_timesteps(5)
    assert (scheduler.sigmas.diff() <= 0).all()
