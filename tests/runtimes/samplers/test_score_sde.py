"""The SDEs of score models against diffusers: see oracle.py."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from tests.runtimes.samplers.oracle import DOUBLE_LIMIT, diffusers_map, table_map

VE = {"_class_name": "ScoreSdeVeScheduler", "correct_steps": 0}
VP = {"_class_name": "ScoreSdeVpScheduler"}


class VarianceExploding:
    """Called as ScoreSdeVePipeline calls it: the model is told sigma, and the last step gives its mean."""

    def __init__(self, scheduler: Any, double: bool, begin: int) -> None:
        scheduler.set_sigmas(len(scheduler.timesteps))
        low, high, dtype = scheduler.config.sigma_min, scheduler.config.sigma_max, torch.float64
        self.timesteps, self.times = scheduler.sigmas, iter(scheduler.timesteps[begin:])
        if double:
            ends = math.log(low), math.log(high)
            scheduler.discrete_sigmas = torch.exp(torch.linspace(*ends, len(scheduler.timesteps), dtype=dtype))
            self.timesteps = low * (high / low) ** scheduler.timesteps.double()
        self.scheduler, self.left = scheduler, len(scheduler.timesteps) - begin
        self.init_noise_sigma, self.scale_model_input = scheduler.init_noise_sigma, scheduler.scale_model_input

    def step(self, output: Any, t: Any, sample: Any) -> Any:
        result = self.scheduler.step_pred(output, next(self.times), sample)
        self.left -= 1
        return result if self.left else SimpleNamespace(prev_sample=result.prev_sample_mean)


class VariancePreserving:
    """Likewise; it has no pipeline."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, double: bool, begin: int) -> None:
        if double:
            scheduler.timesteps = scheduler.timesteps.double()
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.left = len(self.timesteps) - begin

    def scale_model_input(self, sample: Any, t: Any) -> Any:
        return sample

    def step(self, output: Any, t: Any, sample: Any) -> Any:
        self.left -= 1
        following, mean = self.scheduler.step_pred(output, sample, t)
        return SimpleNamespace(prev_sample=following if self.left else mean)


def same(config: dict[str, Any], steps: int, begin: int, rounded: float) -> None:
    """The maps agree: to 1e-10 with diffusers in float64, and to ``rounded`` with it as it is."""
    table = compile_table(config, steps, begin=begin)
    wrap = VarianceExploding if config["_class_name"] == VE["_class_name"] else VariancePreserving
    ours = table_map(table if begin == 0 else type(table)(table.rows, 1.0))
    for double, limit in ((True, DOUBLE_LIMIT), (False, rounded)):
        adapt = functools.partial(wrap, double=double, begin=begin)
        theirs = diffusers_map(config, steps, double=double, begin=begin, adapt=adapt)
        different = theirs.differs(ours, limit, 1e-6 * float(theirs.times.max()))
        assert not different, (config, steps, begin, double, different)


@settings(max_examples=40, deadline=None)
@given(
    low=st.sampled_from([0.01]) | st.floats(1e-3, 0.1),
    high=st.sampled_from([50.0, 1348.0]) | st.floats(1, 2000),
    eps=st.sampled_from([1e-5]) | st.floats(1e-6, 0.3),
    steps=st.integers(1, 50),
    share=st.floats(0, 1),
)
def test_ve_is_that_of_diffusers(low: float, high: float, eps: float, steps: int, share: float) -> None:
    # As it is, its sigmas are float32, and a step is the difference of the squares of two near ones.
    config = {**VE, "sigma_min": low, "sigma_max": high, "sampling_eps": eps}
    same(config, steps, int(share * (steps - 1)), 1e-4)


def test_ve_in_as_many_steps_as_its_pipeline() -> None:
    same(VE, 500, 0, 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    low=st.sampled_from([0.1]) | st.floats(0.01, 1),
    high=st.sampled_from([20]) | st.floats(2, 30),
    eps=st.sampled_from([1e-3]) | st.floats(1e-4, 0.1),
    steps=st.integers(1, 50),
    share=st.floats(0, 1),
)
def test_vp_is_that_of_diffusers(low: float, high: float, eps: float, steps: int, share: float) -> None:
    # As it is, its 1 - exp(...) near t = 0 keeps a few digits of float32.
    config = {**VP, "beta_min": low, "beta_max": high, "sampling_eps": eps}
    same(config, steps, int(share * (steps - 1)), 1e-2)


@pytest.mark.parametrize("begin", [0, 3, 9])
def test_ve_noises_an_image_as_diffusers(begin: int) -> None:
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_sigmas(10)
    image, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    sigma = float(scheduler.add_noise(image, noise, torch.tensor([9 - begin])))
    assert compile_table(VE, 10, begin=begin).mix == pytest.approx((1.0, sigma), rel=1e-5)


def test_vp_noises_an_image_to_the_variance_that_it_keeps() -> None:
    signal, noise = compile_table(VP, 10, begin=4).mix
    assert signal**2 + noise**2 == pytest.approx(1)
    t = compile_table(VP, 10, begin=4).rows[0].t
    integral = sum(0.1 + t * (i + 0.5) / 1e4 * 19.9 for i in range(10_000)) * t / 1e4  # of beta from 0 to t
    assert signal == pytest.approx(math.exp(-integral / 2), rel=1e-6)


def test_the_corrector_is_refused_with_its_reason() -> None:
    with pytest.raises(DexportError, match=r"correct_steps=1 .* norms .*; set correct_steps to 0") as caught:
        compile_table({"_class_name": "ScoreSdeVeScheduler"}, 10)
    assert "\n" not in str(caught.value)


def test_karras_ve_is_refused_with_its_reason() -> None:
    with pytest.raises(DexportError, match="KarrasVeScheduler is not supported: its model reads") as caught:
        compile_table({"_class_name": "KarrasVeScheduler"}, 10)
    assert "\n" not in str(caught.value)
