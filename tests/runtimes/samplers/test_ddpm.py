"""DDPM and its kin against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop, schedule
from runtimes.errors import DexportError
from runtimes.samplers import choose, compile_table, ddim, ddpm, pndm, repaint, score_sde
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    PREDICTIONS,
    SPACINGS,
    ZERO_SNR,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

COUNTS = (1, 2, 5, 20, 50)
LEARNED = ("learned", "learned_range")


class UnCLIP:
    """Called as UnCLIPPipeline calls it: with the timestep that the step goes to."""

    def __init__(self, scheduler: Any, double: bool) -> None:
        if double:
            scheduler.betas, scheduler.alphas = scheduler.betas.double(), scheduler.alphas.double()
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.init_noise_sigma, self.scale_model_input = scheduler.init_noise_sigma, scheduler.scale_model_input
        self.following = dict(itertools.pairwise(self.timesteps.tolist()))

    def step(self, output: Any, t: Any, sample: Any) -> Any:
        return self.scheduler.step(output, t, sample, prev_timestep=self.following.get(int(t)))


class Wuerstchen:
    """Called as WuerstchenPriorPipeline calls it: its last timestep, 0, is the end of a step only."""

    def __init__(self, scheduler: Any, double: bool) -> None:
        if double:
            scheduler.s = torch.tensor([scheduler.config.s], dtype=torch.float64)
            scheduler._init_alpha_cumprod = torch.cos(scheduler.s / (1 + scheduler.s) * torch.pi * 0.5) ** 2
            scheduler.timesteps = scheduler.timesteps.double()
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps[:-1]
        self.init_noise_sigma, self.scale_model_input = scheduler.init_noise_sigma, scheduler.scale_model_input

    def step(self, output: Any, t: Any, sample: Any) -> Any:
        return self.scheduler.step(output, t[None], sample)


def adapt(scheduler: Any, double: bool = True) -> Any:
    wrap = {"UnCLIPScheduler": UnCLIP, "DDPMWuerstchenScheduler": Wuerstchen}.get(type(scheduler).__name__)
    return wrap(scheduler, double) if wrap else scheduler


def same(
    config: dict[str, Any], steps: int, *, begin: int = 0, exact: float = DOUBLE_LIMIT, rounded: float = 1e-5
) -> None:
    """The maps agree: to ``exact`` with diffusers in float64, and to ``rounded`` with it as it is."""
    ours = table_map(compile_table(config, steps, begin=begin))
    for double, limit in ((True, exact), (False, rounded)):
        wrap = functools.partial(adapt, double=double)
        theirs = diffusers_map(config, steps, double=double, begin=begin, adapt=wrap)
        assert not theirs.differs(ours, limit), (config, steps, begin, double, theirs.differs(ours, limit))


SCHEDULES: dict[str, tuple[dict[str, Any], float, float]] = {
    # options, and the limits: of diffusers in float64, and as it is
    "laplace": ({"beta_schedule": "laplace"}, DOUBLE_LIMIT, 1e-4),  # its beta is 1 - a / b in float32
    "sigmoid": ({"beta_schedule": "sigmoid"}, 1e-6, 1e-5),  # torch's float32 sigmoid is not rounded to nearest
    "own": (OWN, DOUBLE_LIMIT, 1e-5),
    "zero-snr": (ZERO_SNR, DOUBLE_LIMIT, 1e-4),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("case", SCHEDULES)
def test_ddpm_is_that_of_diffusers(case: str, variance: str, prediction: str) -> None:
    options, exact, rounded = SCHEDULES[case]
    options = {**options, "variance_type": variance, "prediction_type": prediction, "clip_sample": False}
    kinds = ("DDPMScheduler", "DDPMParallelScheduler")
    for index, (spacing, steps) in enumerate(itertools.product(SPACINGS, COUNTS)):
        if case == "zero-snr" and prediction == "epsilon" and spacing != "leading":
            continue  # x_0 is undefined at its first step
        config = {"_class_name": kinds[index % 2], **options, "timestep_spacing": spacing}
        same(config, steps, exact=exact, rounded=rounded)
        if steps > 3:
            same(config, steps, begin=steps // 2, exact=exact, rounded=rounded)


def test_fixed_large_log_is_fixed_large() -> None:
    # diffusers takes the root of the logarithm of the variance, which is NaN.
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 1, 1, 1)
    assert scheduler.step(sample, scheduler.timesteps[0], sample).prev_sample.isnan().all()
    config = {"_class_name": "DDPMScheduler", "clip_sample": False}
    tables = [compile_table({**config, "variance_type": f"fixed_large{end}"}, 10) for end in ("", "_log")]
    assert tables[0] == tables[1]


UNCLIP = {"_class_name": "UnCLIPScheduler", "clip_sample": False}


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("total", [1000, 30])
def test_unclip_is_that_of_diffusers(total: int, prediction: str) -> None:
    for steps in (2, 3, 5, 7, 25, 30):  # with 30 of 30, each step goes to the next timestep
        config = {**UNCLIP, "num_train_timesteps": total, "prediction_type": prediction}
        same(config, steps, rounded=5e-4)  # its beta is 1 - a / b in float32
        same(config, steps, begin=steps // 2, rounded=5e-4)


def test_unclip_takes_one_step() -> None:
    with pytest.raises(ZeroDivisionError):
        diffusers.UnCLIPScheduler().set_timesteps(1)
    table = compile_table(UNCLIP, 1)
    assert [row.t for row in table.rows] == [999.0]
    with pytest.raises(DexportError, match="at most 1000"):
        compile_table(UNCLIP, 1001)


WUERSTCHEN = {"_class_name": "DDPMWuerstchenScheduler"}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 50),
    scaler=st.sampled_from([0.3, 1.0, 2.0]) | st.floats(0.2, 3),
    s=st.sampled_from([0.008]) | st.floats(0, 0.1),
    share=st.floats(0, 1),
)
def test_wuerstchen_is_that_of_diffusers(steps: int, scaler: float, s: float, share: float) -> None:
    # Its alpha_bar of up to 0.9999 is in float32, which leaves three digits of 1 - alpha_bar.
    same({**WUERSTCHEN, "scaler": scaler, "s": s}, steps, begin=int(share * (steps - 1)), rounded=5e-3)


def test_wuerstchen_takes_timesteps() -> None:
    times = [1.0, 0.9, 0.75, 0.66, 0.4, 0.1]
    theirs = diffusers_map(WUERSTCHEN, 6, double=True, adapt=adapt, timesteps=[*times, 0.0])
    assert not theirs.differs(table_map(compile_table(WUERSTCHEN, 6, timesteps=times)), DOUBLE_LIMIT)
    for wrong in ([1.0, 0.0], [1.1, 0.5], [0.5, 0.5]):
        with pytest.raises(DexportError, match="must fall from at most 1"):
            compile_table(WUERSTCHEN, 2, timesteps=wrong)


@pytest.mark.parametrize("kind", ["UnCLIPScheduler", "DDPMWuerstchenScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("begin", [0, 3, 9])
def test_an_image_is_noised_as_in_diffusers(kind: str, begin: int) -> None:
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(10)
    image, noise = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    first = scheduler.timesteps[begin : begin + 1]
    mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
    assert compile_table({"_class_name": kind}, 10, begin=begin).mix == pytest.approx(mix, rel=1e-3, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["DDPMScheduler", "DDPMParallelScheduler"]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(SPACINGS),
    variance=st.sampled_from(["fixed_small", "fixed_large"]),
    total=st.integers(100, 1200),
    first=st.floats(1e-5, 1e-3),
    last=st.floats(2e-3, 0.05),
    steps=st.integers(1, 50),
)
def test_any_schedule(**drawn: Any) -> None:
    config = {
        "_class_name": drawn["kind"],
        "prediction_type": drawn["prediction"],
        "timestep_spacing": drawn["spacing"],
        "variance_type": drawn["variance"],
        "num_train_timesteps": drawn["total"],
        "beta_start": drawn["first"],
        "beta_end": drawn["last"],
        "clip_sample": False,
    }
    theirs = diffusers_map(config, drawn["steps"], double=True)
    if len(theirs.times) == drawn["steps"]:  # see test_trailing_never_runs_past_the_end
        assert not theirs.differs(table_map(compile_table(config, drawn["steps"])), DOUBLE_LIMIT)


def trajectories(config: dict[str, Any], steps: int, channels: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The samples of diffusers in float64 and ours, for a model that gives random outputs of 2 * ``channels``."""
    random = np.random.default_rng(steps)
    start, *draws = random.standard_normal((1 + steps, 2, channels, 4, 4))
    outputs = random.standard_normal((steps, 2, channels, 4, 4))
    learned = random.uniform(*((0.01, 2) if config["variance_type"] == "learned" else (-1.2, 1.2)), outputs.shape)
    outputs = np.concatenate([outputs, learned], axis=2)
    scheduler = diffusers_scheduler(getattr(diffusers, config["_class_name"]), config, steps, True)
    wrapped, theirs, sample = adapt(scheduler), [], torch.from_numpy(start)
    for t, output, draw in zip(wrapped.timesteps, outputs, draws, strict=True):
        with diffusers_noise(scheduler, lambda draw=draw: draw):
            sample = wrapped.step(torch.from_numpy(output), t, sample).prev_sample
        theirs.append(sample.numpy())
    at, noise = iter(outputs), iter(draws)
    steps_ = loop.sample(compile_table(config, steps), start, lambda *_: next(at), lambda: next(noise))
    return theirs, [step.sample for step in steps_]


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDPMScheduler", **COSINE, "variance_type": "learned_range"},  # DeepFloyd IF
        {"_class_name": "DDPMScheduler", "thresholding": True, "variance_type": "learned_range"},
        {"_class_name": "DDPMScheduler", **LATENT, "clip_sample": False, "variance_type": "learned"},
        {"_class_name": "DDPMParallelScheduler", "variance_type": "learned_range", "prediction_type": "v_prediction"},
        {"_class_name": "UnCLIPScheduler", "variance_type": "learned_range"},
        {"_class_name": "UnCLIPScheduler", "variance_type": "learned_range", "prediction_type": "sample"},
        {"_class_name": "UnCLIPScheduler", **UNCLIP, "variance_type": "learned_range", "num_train_timesteps": 20},
    ],
)
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_learned_variance_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    theirs, ours = trajectories(config, steps)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variance", LEARNED)
def test_a_learned_variance_must_be_there(variance: str) -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": variance}
    start = np.ones((1, 3, 4, 4))
    with pytest.raises(DexportError, match="set variance_type to 'fixed_small'"):
        list(loop.sample(compile_table(config, 3), start, lambda x, t, row: x, lambda: start))


def test_a_learned_variance_cannot_be_negative() -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned"}
    start = np.ones((1, 3, 4, 4))
    with pytest.raises(DexportError, match="below 0 at timestep 666"):
        list(loop.sample(compile_table(config, 3), start, lambda x, t, row: -np.tile(x, (1, 2, 1, 1)), lambda: start))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("UnCLIPScheduler", {"beta_schedule": "linear"}, "beta_schedule='linear'"),
        ("UnCLIPScheduler", {"variance_type": "fixed_small"}, "variance_type='fixed_small'"),
        ("UnCLIPScheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("DDPMScheduler", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ("DDPMWuerstchenScheduler", {"scaler": 0.0}, "scaler=0.0"),
        ("DDPMWuerstchenScheduler", {"s": -0.1}, "s=-0.1"),
    ],
)
def test_what_diffusers_has_not_is_refused(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError) as caught:
        compile_table({"_class_name": kind, **options}, 5)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_deviation_is_detected() -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    table = compile_table(config, 5)
    start, slope, power = table.rows[0].deviation
    first = dataclasses.replace(table.rows[0], deviation=(start + 1e-6, slope, power))
    changed = (first, *table.rows[1:])
    noise, output = np.ones((1, 3, 2, 2)), np.ones((1, 6, 2, 2))
    results = []
    for rows in (table.rows, changed):
        *_, last = loop.sample(dataclasses.replace(table, rows=rows), noise, lambda *_: output, lambda: noise)
        results.append(last.sample)
    assert np.abs(results[0] - results[1]).max() > 1e-9


MODULES = (ddim, ddpm, pndm, repaint, score_sde)


@pytest.mark.parametrize("kind", [kind for module in MODULES for kind in module.CLASSES if "SdeVe" not in kind])
def test_what_a_class_saves_is_read(kind: str) -> None:
    saved = json.loads(getattr(diffusers.schedulers, kind)().to_json_string())
    assert compile_table(saved, 7) == compile_table({"_class_name": kind}, 7)
    assert choose(saved, None) == saved


@pytest.mark.parametrize("count", [1, 2, 3, 10, 999, 1000])
def test_linspace_is_that_of_torch(count: int) -> None:
    for start, end in ((1e-4, 0.02), (1, 1e-3), (-6, 6)):
        assert (schedule.linspace(start, end, count) == torch.linspace(start, end, count).numpy()).all()
