"""The loop around a model whose best prediction is known: pixels that are normal with mean MU and deviation SPREAD.

There x_0 has a closed form, and so has the path of the sampling ODE from noise to data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from runtimes import loop, schedule
from runtimes.errors import DexportError
from runtimes.samplers import NAMES, Table, compile_table
from runtimes.table import M, X, Z, row

MU, SPREAD = 0.3, 0.5
SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SIGMAS = schedule.sigma_table(SCHEDULE)
SHAPE = (4, 6, 6)
DETERMINISTIC = ("ddim", "pndm", "euler", "dpmpp_2m")

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def level(t: float) -> tuple[float, float]:
    """The factors alpha and sigma of signal and noise at t."""
    ratio = np.interp(t, np.arange(len(SIGMAS)), SIGMAS)
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return float(alpha), float(ratio * alpha)


def gaussian(prediction: str = "epsilon") -> Callable[..., Any]:
    """The best possible model: its x_0 is the mean of x_0 given x = alpha x_0 + sigma eps."""

    def model(x: Any, t: float, row: object = None) -> Any:
        alpha, sigma = level(t)
        x0 = MU + SPREAD**2 * alpha / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * MU)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction]

    return model


def never() -> np.ndarray:
    raise AssertionError("this sampler takes no noise")


def run(
    name: str, steps: int, start: np.ndarray, noise: Callable[[], np.ndarray] = never, **options: Any
) -> np.ndarray:
    prediction = options.get("prediction_type", "epsilon")
    table = compile_table({**SCHEDULE, **options}, steps, sampler=name)
    *_, last = loop.sample(table, start, gaussian(prediction), noise)
    return last.sample


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
# dpmpp_sde's noise is a path of its own, and is compared in samplers/test_sigmas.py.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpmpp_sde"])
def test_result_is_that_of_a_plain_diffusers_loop(name: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SCHEDULE, "prediction_type": prediction}
    kind = getattr(diffusers, NAMES[name][0])
    scheduler = kind.from_config({**options, **NAMES[name][1]})
    scheduler.set_timesteps(20)
    start, *draws = normal(60, 2, *SHAPE)
    drawn = 0  # the call of the model at which a draw is made: diffusers draws where its noise has no weight, too
    monkeypatch.setattr(
        inspect.getmodule(kind), "randn_tensor", lambda shape, **_: torch.from_numpy(draws[drawn]), raising=False
    )
    model, sample = gaussian(prediction), torch.from_numpy(start) * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # which flows have no use for
    for t in scheduler.timesteps:
        output = model(scaled(sample, t), float(t))
        sample = scheduler.step(output, t, sample).prev_sample
        drawn += 1
    table = compile_table(options, 20, sampler=name)
    calls: list[float] = []

    def counted(x: Any, t: float, row: object) -> Any:
        calls.append(t)
        return model(x, t)

    *_, last = loop.sample(table, start, counted, lambda: draws[len(calls) - 1])
    result = last.sample
    # diffusers' float32 inside, and the model's float32 input in our loop.
    np.testing.assert_allclose(result, sample.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"])
def test_what_the_model_predicts_does_not_matter(name: str) -> None:
    # PNDM is not among them: it blends the outputs of several steps before it reads them.
    start, *draws = normal(30, 2, *SHAPE)
    results = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        ours = iter(draws)
        results.append(run(name, 12, start, lambda ours=ours: next(ours), prediction_type=prediction))
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=0, atol=2e-6)


def path_error(name: str, steps: int) -> float:
    """How far a solver of the ODE is from the exact path, at t = 99 and coming from t = 999 in ``steps`` steps."""
    start = normal(1, *SHAPE)
    times = np.linspace(999, 99, steps + 1).round().tolist()
    table = compile_table({**SCHEDULE, "timestep_spacing": "trailing"}, steps + 1, sampler=name, timesteps=times)
    samples = [step.sample for step in loop.sample(table, start, gaussian(), never)]
    (alpha0, sigma0), (alpha1, sigma1) = level(999), level(99)
    # Euler's X is x / alpha.
    unit0, unit1 = (alpha0, alpha1) if name == "euler" else (1.0, 1.0)
    # Along the path x keeps its distance from the mean, counted in deviations at t.
    stretch = np.hypot(alpha1 * SPREAD, sigma1) / np.hypot(alpha0 * SPREAD, sigma0)
    exact = alpha1 * MU + stretch * (unit0 * table.init_scale * start - alpha0 * MU)
    return float(np.abs(unit1 * samples[-2] - exact).max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_the_exact_path_is_approached_with_the_solvers_order(name: str, order: int) -> None:
    coarse, fine = path_error(name, 25), path_error(name, 100)
    assert coarse / fine > 0.7 * 4**order
    assert fine < 0.02


def test_pndm_comes_closer_than_ddim() -> None:
    # Its order is higher, but its first steps and float32 hide by how much.
    assert path_error("pndm", 25) < path_error("ddim", 25) / 30


STOCHASTIC = (
    "ddpm", "euler_ancestral", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "sa_solver",
)  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_have_the_datas_distribution(name: str) -> None:
    noise = loop.noise_source([7], (1, 100, 100))
    result = run(name, 250, noise(), noise, timestep_spacing="trailing")
    # 10,000 samples: the standard errors are 0.005 and 0.0035; the step's length adds a little.
    assert abs(result.mean() - MU) < 0.02
    assert abs(result.std() - SPREAD) < 0.02


def test_third_order_sde_is_too_wide_as_in_diffusers() -> None:
    """Its weight of the slope's slope has a wrong sign there: -1/2 where +1/2 belongs, so noise is added up.

    https://arxiv.org/abs/2211.01095 has no such method; in its terms the weight is (1 - e^-2h - 2h) / (2h)^2 + 1/2.
    """
    noise = loop.noise_source([7], (1, 100, 100))
    assert run("dpmpp_3m_sde", 250, noise(), noise, timestep_spacing="trailing").std() > SPREAD + 0.1


def test_loop_is_a_generator_that_does_no_more_than_is_asked() -> None:
    calls: list[float] = []

    def model(x: np.ndarray, t: float, row: object) -> np.ndarray:
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        calls.append(t)
        return np.zeros_like(x)

    table = compile_table(SCHEDULE, 10)
    steps = loop.sample(table, normal(2, *SHAPE), model, never)
    assert inspect.isgenerator(steps)
    assert calls == []
    first, second = next(steps), next(steps)
    steps.close()
    assert calls == [first.t, second.t] == [901.0, 801.0]
    assert (second.index, second.total) == (1, 10)
    assert second.sample.shape == second.output.shape == (2, *SHAPE)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_state_is_float64(name: str) -> None:
    # Without noise predicted, x keeps its share of the signal: x / alpha does not change.
    start = normal(1, *SHAPE)
    table = compile_table({**SCHEDULE, "set_alpha_to_one": True}, 50, sampler=name)
    *_, last = loop.sample(table, start, lambda x, t, row: np.zeros_like(x), never)
    assert last.sample.dtype == np.float64
    alpha, _ = level(table.rows[0].t)
    exact = table.init_scale * start if name == "euler" else start / alpha
    # alpha_bar is rounded to float32, sigma once more; the path between is not.
    np.testing.assert_allclose(last.sample, exact, rtol=1e-13 if name in ("euler", "ddim", "pndm") else 1e-6)


def test_earlier_steps_are_not_written_to() -> None:
    steps, copies = [], []
    for step in loop.sample(compile_table(SCHEDULE, 8, sampler="pndm"), normal(1, *SHAPE), gaussian(), never):
        steps.append(step)
        copies.append((step.sample.copy(), step.output.copy()))
    for step, (sample, output) in zip(steps, copies, strict=True):
        assert (step.sample == sample).all()
        assert (step.output == output).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    def images(seeds: list[int]) -> np.ndarray:
        noise = loop.noise_source(seeds, SHAPE)
        return run(name, 5, noise(), noise)

    together = images([11, 12, 13])
    for index, seed in enumerate([11, 12, 13]):
        assert (images([seed])[0] == together[index]).all()


def test_noise_is_a_philox_stream_of_standard_normals() -> None:
    noise = loop.noise_source([5, 6], (3, 50, 50))
    first, second = noise(), noise()
    own = np.random.Generator(np.random.Philox(6))
    assert (own.standard_normal((3, 50, 50)) == first[1]).all()
    assert (own.standard_normal((3, 50, 50)) == second[1]).all()
    everything = np.stack([first, second])
    assert everything.dtype == np.float64
    assert abs(everything.mean()) < 5 / np.sqrt(everything.size)
    assert abs(everything.std() - 1) < 5 / np.sqrt(2 * everything.size)
    # No draw is like another.
    assert np.abs(np.corrcoef(everything.reshape(4, -1)) - np.eye(4)).max() < 5 / np.sqrt(7500)


@pytest.mark.parametrize("seed", [-1, 1.5, "7", True])
def test_wrong_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(DexportError, match="seed"):
        loop.noise_source([0, seed], SHAPE)


@pytest.mark.parametrize(
    ("start", "model", "noise", "words"),
    [
        (normal(6), gaussian(), never, r"the start has the shape \[6\]"),
        (normal(1, *SHAPE), lambda x, t, row: x[:, :2], never, r"model's output .* \[1, 2, 6, 6\].* \[1, 4, 6, 6\]"),
        (normal(1, *SHAPE), lambda x, t, row: x * np.float32("nan"), never, "model's output at timestep 667 holds NaN"),
        (normal(1, *SHAPE) * np.inf, gaussian(), never, "the start holds NaN or infinity"),
        (normal(1, *SHAPE), gaussian(), lambda: normal(2, *SHAPE), r"the noise has the shape \[2, 4, 6, 6\]"),
    ],
)
def test_wrong_arrays_give_clear_errors(start: np.ndarray, model: Any, noise: Any, words: str) -> None:
    table = compile_table(SCHEDULE, 3, sampler="euler_ancestral")
    with pytest.raises(DexportError, match=words):
        list(loop.sample(table, start, model, noise))


def test_a_learned_variance_scales_the_noise_of_each_element() -> None:
    start, learned = normal(2, *SHAPE), np.abs(normal(2, *SHAPE, seed=1))

    def model(x: np.ndarray, t: float, row: object) -> np.ndarray:
        return np.concatenate([3 * start, learned], axis=1)

    for deviation, expected in (
        ((0.25, -0.5, 0.0), np.exp(0.25 - 0.5 * learned)),
        ((0.0, 0.0, 0.5), np.sqrt(learned)),
        ((), 1.0),  # what the model learned is left out
    ):
        table = Table((row(5, M + 2 * Z, deviation=deviation),), 1.0)
        (step,) = loop.sample(table, start, model, lambda: np.ones_like(start))
        assert step.output.shape == start.shape
        np.testing.assert_allclose(step.sample, 3 * start + 2 * expected, rtol=1e-15)


def test_a_row_may_leave_the_model_out() -> None:
    start = normal(1, *SHAPE)
    table = Table((row(5, 2 * X + M, calls=False), row(4, X + M)), 1.0)
    calls: list[float] = []

    def model(x: np.ndarray, t: float, row: object) -> np.ndarray:
        calls.append(t)
        return np.ones_like(x)

    first, second = loop.sample(table, start, model, never)
    assert calls == [4.0]
    assert (first.sample == 2 * start).all()
    assert (first.output == 0).all()
    assert (second.sample == 2 * start + 1).all()


def test_a_known_part_is_put_back_as_noisy_as_the_row_says() -> None:
    start, image, draw = normal(1, *SHAPE), normal(1, *SHAPE, seed=1), normal(1, *SHAPE, seed=2)
    mask = np.zeros((1, 1, 6, 6))
    mask[..., :3] = 1
    table = Table((row(5, X - M, known=(0.6, 0.8)),), 1.0)
    model = lambda x, t, row: x.astype(np.float64)  # noqa: E731
    (step,) = loop.sample(table, start, model, lambda: draw, (image, mask))
    np.testing.assert_allclose(step.sample[..., :3], (0.6 * image + 0.8 * draw)[..., :3], rtol=1e-15)
    assert np.abs(step.sample[..., 3:]).max() < 1e-6  # the model's input is float32
    (step,) = loop.sample(table, start, model, never)  # nothing known: no noise either
    assert np.abs(step.sample).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "image", "mask", "words"),
    [
        ("ddim", normal(1, *SHAPE), np.ones((1, 1, 6, 6)), "take RePaintScheduler, or leave the mask out"),
        ("RePaintScheduler", normal(1, 3, 6, 6), np.ones((1, 1, 6, 6)), "the known image has the shape"),
        ("RePaintScheduler", normal(1, *SHAPE), np.ones((6, 6)), r"the mask has the shape \[6, 6\]"),
        ("RePaintScheduler", normal(1, *SHAPE), np.ones((1, 1, 3, 6)), r"the mask has the shape \[1, 1, 3, 6\]"),
        ("RePaintScheduler", normal(1, *SHAPE), np.full((1, 1, 6, 6), 255.0), "numbers from 0"),
        ("RePaintScheduler", normal(1, *SHAPE), np.full((1, 1, 6, 6), np.nan), "numbers from 0"),
    ],
)
def test_a_wrong_known_part_gives_a_clear_error(name: str, image: np.ndarray, mask: np.ndarray, words: str) -> None:
    table = compile_table(SCHEDULE, 3, sampler=name)
    with pytest.raises(DexportError, match=words):
        list(loop.sample(table, normal(1, *SHAPE), gaussian(), lambda: normal(1, *SHAPE), (image, mask)))


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 5), (2, 4, 3, 6, 6)], ids=["embedding", "sound", "video"])
def test_samples_of_any_rank_are_made_alike(shape: tuple[int, ...]) -> None:
    """Each number goes its own way, whatever the shape it stands in; thresholding looks at whole samples."""
    table = compile_table({**SCHEDULE, "thresholding": True, "sample_max_value": 2.0}, 5)
    start = normal(*shape)
    *_, last = loop.sample(table, start, gaussian(), never)
    *_, flat = loop.sample(table, start.reshape(shape[0], -1, 1, 1), gaussian(), never)
    np.testing.assert_array_equal(last.sample, flat.sample.reshape(shape))
