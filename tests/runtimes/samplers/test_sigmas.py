"""The samplers of k-diffusion's family against diffusers: the whole linear map, noise included; see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
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
)

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

EULER, ANCESTRAL, HEUN = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
KDPM2, KDPM2A, LMS = "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler"
SDE, EDM, IPNDM = "DPMSolverSDEScheduler", "EDMEulerScheduler", "IPNDMScheduler"
KINDS = (EULER, ANCESTRAL, HEUN, KDPM2, KDPM2A, LMS, SDE)
STEPS = (1, 2, 3, 5, 10, 20, 50)
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler-exponential": (EULER, {**LATENT, "use_exponential_sigmas": True}),
    "euler-beta": (EULER, {**LATENT, "use_beta_sigmas": True, "sigma_min": 0.05}),
    "euler-log": (EULER, {**LATENT, **V, "interpolation_type": "log_linear"}),
    "euler-log-karras": (EULER, {**LATENT, "interpolation_type": "log_linear", "use_karras_sigmas": True}),
    "euler-continuous": (EULER, {**LATENT, **V, "timestep_type": "continuous", "use_karras_sigmas": True}),
    "euler-continuous-eps": (EULER, {**LATENT, "timestep_type": "continuous"}),
    "heun": (HEUN, LATENT),
    "heun-v": (HEUN, {**COSINE, **V}),
    "heun-sample": (HEUN, {**OWN, **SAMPLE}),
    "heun-exp": (HEUN, {"beta_schedule": "exp"}),
    "heun-karras": (HEUN, {**LATENT, "use_karras_sigmas": True}),
    "heun-exponential": (HEUN, {**LATENT, "use_exponential_sigmas": True}),
    "heun-beta": (HEUN, {**LATENT, "use_beta_sigmas": True}),
    "kdpm2": (KDPM2, LATENT),
    "kdpm2-v": (KDPM2, {**OWN, **V}),
    "kdpm2-karras": (KDPM2, {**LATENT, "use_karras_sigmas": True}),
    "kdpm2-exponential": (KDPM2, {**LATENT, "use_exponential_sigmas": True}),
    "kdpm2a": (KDPM2A, LATENT),
    "kdpm2a-v": (KDPM2A, {**OWN, **V}),
    "kdpm2a-karras": (KDPM2A, {**LATENT, "use_karras_sigmas": True}),
    "kdpm2a-beta": (KDPM2A, {**LATENT, "use_beta_sigmas": True}),
    "lms": (LMS, LATENT),
    "lms-v": (LMS, {**COSINE, **V}),
    "lms-sample": (LMS, {**OWN, **SAMPLE}),
    "lms-karras": (LMS, {**LATENT, "use_karras_sigmas": True}),
    "lms-beta": (LMS, {**LATENT, "use_beta_sigmas": True}),
    "sde": (SDE, LATENT),
    "sde-v": (SDE, {**OWN, **V}),
    "sde-karras": (SDE, {**LATENT, "use_karras_sigmas": True}),
    "sde-exponential": (SDE, {**LATENT, "use_exponential_sigmas": True}),
    "edm": (EDM, {}),
    "edm-v": (EDM, {**V, "sigma_data": 1.0, "sigma_max": 20.0, "rho": 5.0}),
    "edm-low": (EDM, {"final_sigmas_type": "sigma_min"}),
    "edm-exponential": (EDM, {"sigma_schedule": "exponential"}),
    "ipndm": (IPNDM, {}),
}
# In float64 diffusers agrees to 1e-10, but where it makes the sigmas themselves in float32; most for KDPM2's ancestral
# form, whose sigma_down is a difference of near squares: 2e-4 at two steps, below 1e-5 from five.
DOUBLE_LIMITS = {
    "euler-log": 1e-6, "euler-log-karras": 1e-6, "kdpm2": 1e-6, "kdpm2-v": 1e-6, "kdpm2-karras": 1e-6,
    "kdpm2-exponential": 1e-6, "kdpm2a": 1e-3, "kdpm2a-v": 1e-3, "kdpm2a-karras": 1e-3, "kdpm2a-beta": 1e-3,
    "edm-exponential": 1e-5, "ipndm": 1e-5,
}  # fmt: skip
# As it is: 1e-5, since its arithmetic is float32; more where x0 is a difference of large numbers.
LIMITS = {"heun-v": 1e-3} | {name: 1e-3 for name, limit in DOUBLE_LIMITS.items() if limit == 1e-3}
TIME_LIMIT = 1e-3  # interpolated in float32
TIME_LIMITS = {"kdpm2a": 1e-2, "kdpm2a-v": 1e-2, "kdpm2a-karras": 1e-2, "kdpm2a-beta": 1e-2}
# See test_a_single_step.
FEWEST = {"edm-exponential": 2, "ipndm": 2}


class Path:
    """A Brownian motion in sigma in place of diffusers' random one: of the draws that the oracle makes at each call."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.start, self.middle, self.first = 0.0, 0.0, None

    def __call__(self, sigma: Any, to: Any) -> Any:
        """The increment from ``sigma`` to ``to``, of unit variance."""
        start, end = float(sigma), float(to)
        fresh = self.module.randn_tensor(None)
        if self.first is None:
            self.start, self.middle, self.first = start, end, fresh
            return fresh
        # From the same start on, further than before.
        before, after = self.start - self.middle, self.middle - end
        whole = (np.sqrt(before) * self.first + np.sqrt(after) * fresh) / np.sqrt(before + after)
        self.first = None
        return whole


def adapt(scheduler: Any) -> Any:
    if type(scheduler).__name__ == SDE:
        scheduler.noise_sampler = Path(sys.modules[type(scheduler).__module__])
    return scheduler


def spaced(case: str) -> list[dict[str, Any]]:
    """The configs of a case: one for each spacing that its class has."""
    kind, options = CASES[case]
    config = {"_class_name": kind, **options}
    return [config] if kind in (EDM, IPNDM) else [{**config, "timestep_spacing": spacing} for spacing in SPACINGS]


@pytest.mark.parametrize("case", CASES)
def test_map_is_that_of_diffusers(case: str) -> None:
    for config, steps in itertools.product(spaced(case), STEPS):
        if steps < FEWEST.get(case, 1):
            continue
        ours, times = table_map(compile_table(config, steps)), TIME_LIMITS.get(case, TIME_LIMIT)
        theirs = diffusers_map(config, steps, double=True, adapt=adapt)
        exact = theirs.differs(ours, DOUBLE_LIMITS.get(case, DOUBLE_LIMIT), times)
        assert not exact, f"{config}, {steps} steps, in float64: {exact}"
        theirs = diffusers_map(config, steps, double=False, adapt=adapt)
        rounded = theirs.differs(ours, LIMITS.get(case, 1e-5), times)
        assert not rounded, f"{config}, {steps} steps: {rounded}"
        if case.startswith("kdpm2a") and steps >= 5:
            assert not theirs.differs(ours, 1e-5, times)


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind != LMS])
def test_beginning_later_is_as_in_diffusers(case: str) -> None:
    kind, options = CASES[case]
    config = {"_class_name": kind, **options}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        theirs = diffusers_map(config, steps, double=True, begin=begin, adapt=adapt)
        ours = table_map(dataclasses.replace(table, init_scale=1.0))
        limits = DOUBLE_LIMITS.get(case, DOUBLE_LIMIT), TIME_LIMITS.get(case, TIME_LIMIT)
        different = theirs.differs(ours, *limits)
        assert not different, f"{begin} of {steps}: {different}"
        if kind == IPNDM:
            continue  # its class adds no noise to images
        scheduler = diffusers_scheduler(getattr(diffusers, kind), config, steps, False, begin)
        one, none = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
        first = scheduler.timesteps[begin * scheduler.order :][:1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((one, none), (none, one))]
        assert table.mix == pytest.approx(mix, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(SPACINGS),
    spread=st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]),
    steps=st.integers(1, 50),
    total=st.integers(400, 1200),
    last=st.floats(5e-3, 0.03),
)
def test_map_for_any_options(
    kind: str, prediction: str, spacing: str, spread: str | None, steps: int, total: int, last: float
) -> None:
    config = {
        "_class_name": kind, "prediction_type": prediction, "timestep_spacing": spacing, "num_train_timesteps": total,
        "beta_end": last, **({spread: True} if spread else {}),
    }  # fmt: skip
    if spacing == "trailing":  # rounding gives diffusers one timestep too many for some counts: one below 0
        assume(len(np.arange(total, 0, -total / steps)) == steps)
    ours = table_map(compile_table(config, steps))
    theirs = diffusers_map(config, steps, double=True, adapt=adapt)
    if theirs.times.shape == ours.times.shape:  # and others one too many at the end
        limit = {KDPM2: 1e-5, KDPM2A: 1e-3}.get(kind, 1e-8)
        different = theirs.differs(ours, limit, 1e-2)
        assert not different, different


@pytest.mark.parametrize("steps", [2, 9, 20])
@pytest.mark.parametrize("options", [{}, {"clip_sample_range": 0.5, "prediction_type": "v_prediction"}])
def test_clipped_heun_is_that_of_diffusers(steps: int, options: dict[str, Any]) -> None:
    config = {"_class_name": HEUN, **LATENT, "clip_sample": True, **options}
    start, *outputs = np.random.default_rng(steps).standard_normal((2 * steps, 2, 3, 4, 4))

    def ours(config: dict[str, Any]) -> list[np.ndarray]:
        calls, table = iter(outputs), compile_table(config, steps)
        return [step.sample for step in loop.sample(table, start, lambda *_: next(calls), lambda: start)]

    scheduler = diffusers_scheduler(diffusers.HeunDiscreteScheduler, config, steps, True)
    theirs, sample = [], torch.from_numpy(start) * scheduler.init_noise_sigma
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
        theirs.append(sample.numpy())
    for mine, its in zip(ours(config), theirs, strict=True):
        assert np.abs(mine - its).max() <= 1e-6 * np.abs(its).max()
    assert np.abs(ours({**config, "clip_sample": False})[-1] - theirs[-1]).max() > 1e-2


def test_heun_takes_a_list_of_timesteps() -> None:
    config, times = {"_class_name": HEUN, **LATENT}, [999, 850, 545, 233, 24]
    theirs = diffusers_map(config, 5, double=True, timesteps=times)
    different = theirs.differs(table_map(compile_table(config, 5, timesteps=times)), DOUBLE_LIMIT)
    assert not different, different


def test_euler_takes_a_list_of_sigmas() -> None:
    config = {"_class_name": EULER, **LATENT}
    sigmas = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]  # AYS, of SD 1.5
    theirs = diffusers_map(config, 10, double=True, sigmas=sigmas)
    different = theirs.differs(table_map(compile_table(config, 10, sigmas=sigmas)), DOUBLE_LIMIT, TIME_LIMIT)
    assert not different, different


def test_lms_begins_with_what_it_has() -> None:
    """Beginning later, diffusers takes the weights of order 4 with the slopes that are there, which sum to less."""
    config = {"_class_name": LMS, **LATENT}
    ours = compile_table(config, 10, begin=4)
    theirs = diffusers_map(config, 10, double=True, begin=4)
    assert theirs.differs(table_map(dataclasses.replace(ours, init_scale=1.0)), 1e-2)
    euler = compile_table({"_class_name": EULER, **LATENT}, 10, begin=4).rows[0]
    assert (ours.rows[0].x_h[0], ours.rows[0].x_x) == pytest.approx((euler.x_m, euler.x_x), rel=1e-12)


def test_a_single_step() -> None:
    """Of EDM's exponential sigmas diffusers takes the lowest for one step; ours, like with Karras', the highest."""
    config = {"_class_name": EDM, "sigma_schedule": "exponential"}
    assert diffusers_map(config, 1, double=False).times[0] == pytest.approx(np.log(0.002) / 4, rel=1e-5)
    assert compile_table(config, 1).rows[0].t == pytest.approx(np.log(80) / 4, rel=1e-6)
    # iPNDM's first step keeps nothing of a sample that is all noise, so one step ends at 0 with diffusers as with us.
    for map_ in (
        diffusers_map({"_class_name": IPNDM}, 1, double=False),
        table_map(compile_table({"_class_name": IPNDM}, 1)),
    ):
        assert not map_.samples.any()


def test_ipndm_takes_the_steps_of_its_betas() -> None:
    config = {"_class_name": IPNDM, "trained_betas": [0.95, 0.7, 0.4, 0.2, 0.01]}
    theirs = diffusers_map(config, 4, double=False)
    assert not theirs.differs(table_map(compile_table(config, 4)), 1e-5, TIME_LIMIT)
    with pytest.raises(DexportError, match="fix the steps at 4, not 5"):
        compile_table(config, 5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (EULER, {"interpolation_type": "cubic"}, "interpolation_type='cubic'"),
        (EULER, {"timestep_type": "none"}, "timestep_type='none'"),
        (KDPM2, SAMPLE, "prediction_type='sample'"),
        (KDPM2A, SAMPLE, "prediction_type='sample'"),
        (SDE, SAMPLE, "prediction_type='sample'"),
        (LMS, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
        (EDM, {"sigma_schedule": "linear"}, "sigma_schedule='linear'"),
        (EDM, SAMPLE, "prediction_type='sample'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError) as caught:
        compile_table({"_class_name": kind, **options}, 4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_exclude_what_spaces_by_itself() -> None:
    continuous = {"_class_name": EULER, **V, "timestep_type": "continuous"}
    for config in (continuous, {"_class_name": HEUN, "use_exponential_sigmas": True}):
        with pytest.raises(DexportError, match="exclude each other"):
            compile_table(config, 2, timesteps=[900, 1])


def test_zero_snr_is_refused_by_none_of_them() -> None:
    for kind in (EULER, ANCESTRAL):
        assert compile_table({"_class_name": kind, **ZERO_SNR, **V}, 5).rows[0].scale == pytest.approx(2**-12, rel=1e-6)


@pytest.mark.parametrize("kind", [EULER, EDM, "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"])
def test_a_range_of_sigmas_that_does_not_fall_is_refused(kind: str) -> None:
    for low, high in ((5.0, 1.0), (1.0, 1.0)):
        config = {"_class_name": kind, "sigma_min": low, "sigma_max": high}
        with pytest.raises(DexportError, match=f"sigma_min must be below sigma_max, not {low:g} and {high:g}"):
            compile_table(config, 5)


@pytest.mark.parametrize("kind", [EULER, "UniPCMultistepScheduler"])
def test_an_end_beyond_the_schedules_other_end_is_refused(kind: str) -> None:
    for end in ({"sigma_min": 500.0}, {"sigma_max": 1e-4}):
        with pytest.raises(DexportError, match="sigma_min must be below sigma_max"):
            compile_table({"_class_name": kind, "use_karras_sigmas": True, **end}, 5)


def test_more_steps_than_any_model_needs_are_refused() -> None:
    with pytest.raises(DexportError, match="100000 steps are too many"):
        compile_table({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 100_000)
