"""Samplers of rectified flows against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import diffusers
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from runtimes.samplers.flow import mu_of
from tests.runtimes.samplers.oracle import DOUBLE_LIMIT, STEPS, diffusers_map, diffusers_scheduler, table_map

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SCHEDULED = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
DYNAMIC = {"use_dynamic_shifting": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "sd3": ({"shift": 3.0}, {}),
    "shift-below-1": ({"shift": 0.37, "num_train_timesteps": 777}, {}),
    "flux": ({**DYNAMIC, "shift": 3.0}, {"mu": 1.15}),
    "negative-mu": (DYNAMIC, {"mu": -0.4}),
    "linear-mu": ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": 2.5}),
    "mochi": ({"invert_sigmas": True}, {}),
    "karras": ({"use_karras_sigmas": True}, {}),
    "exponential": ({"shift": 2.0, "use_exponential_sigmas": True}, {}),
    "beta": ({**DYNAMIC, "use_beta_sigmas": True}, {"mu": 0.7}),
}
LIMIT = 1e-6  # diffusers as it is keeps the sample in float32


@functools.cache
def beta_quantile(p: float, a: float, b: float) -> float:
    """The quantile of the beta distribution, for p up to 1/2 in the power of x in which it is nearly linear."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, b, a)
    share = lambda u: mpmath.betainc(a, b, 0, u ** (1 / a), regularized=True) - p  # noqa: E731
    return float(mpmath.findroot(share, (0, 1), solver="anderson")) ** (1 / a) if p else 0.0


@pytest.fixture(autouse=True, scope="module")
def scipy_in_diffusers() -> Iterator[None]:
    """diffusers takes the quantiles of the beta distribution from scipy; here they come from mpmath."""
    stats = types.SimpleNamespace(beta=types.SimpleNamespace(ppf=beta_quantile))
    with pytest.MonkeyPatch.context() as patch:
        for kind in SCHEDULED:
            module = sys.modules[getattr(diffusers.schedulers, kind).__module__]
            patch.setattr(module, "is_scipy_available", lambda: True)
            patch.setattr(module, "scipy", types.SimpleNamespace(stats=stats), raising=False)
        yield


@pytest.mark.parametrize("kind", SCHEDULED)
@pytest.mark.parametrize("case", CASES)
def test_map_is_that_of_diffusers(kind: str, case: str) -> None:
    options, asked = CASES[case]
    config = {"_class_name": kind, **options}
    for steps in STEPS:
        ours = table_map(compile_table(config, steps, **asked))
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            different = diffusers_map(config, steps, double=double, **asked).differs(ours, limit)
            assert not different, f"{steps} steps: {different}"


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.6])
def test_heun_is_that_of_diffusers(shift: float) -> None:
    config = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": shift}
    for steps in STEPS:
        ours = table_map(compile_table(config, steps))
        assert len(ours.times) == 2 * steps - 1
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            different = diffusers_map(config, steps, double=double).differs(ours, limit)
            assert not different, f"{steps} steps: {different}"


def test_stochastic_sampling_is_that_of_diffusers() -> None:
    for case, steps in itertools.product(("sd3", "flux", "mochi", "karras"), STEPS):
        options, asked = CASES[case]
        config = {"_class_name": SCHEDULED[0], **options, "stochastic_sampling": True}
        ours = table_map(compile_table(config, steps, **asked))
        assert any(row.x_z for row in compile_table(config, steps, **asked).rows) == (steps > 1 or case == "mochi")
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            assert not diffusers_map(config, steps, double=double, **asked).differs(ours, limit)


@pytest.mark.parametrize("kind", SCHEDULED)
@pytest.mark.parametrize("terminal", [0.1, 0.02])
def test_shift_terminal_is_that_of_diffusers(kind: str, terminal: float) -> None:
    config = {"_class_name": kind, **DYNAMIC, "shift_terminal": terminal}
    for steps in (2, 3, 5, 10, 20, 50):
        table = compile_table(config, steps, mu=2.05)
        assert table.rows[-1].t == pytest.approx(1000 * terminal)
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            assert not diffusers_map(config, steps, double=double, mu=2.05).differs(table_map(table), limit)


def test_a_single_step_is_not_stretched() -> None:
    # It starts from pure noise, so that nothing can be stretched; diffusers divides 0 by 0.
    options = {**DYNAMIC, "shift_terminal": 0.1}
    table = compile_table({"_class_name": SCHEDULED[0], **options}, 1, mu=1.0)
    assert [row.t for row in table.rows] == [1000]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(1, mu=1.0)
    assert scheduler.timesteps.isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(SCHEDULED),
    total=st.integers(50, 2000),
    shift=st.floats(0.1, 20.0),
    spacing=st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]),
    invert=st.booleans(),
    terminal=st.one_of(st.none(), st.floats(0.001, 0.5)),
    dynamic=st.sampled_from([None, "exponential", "linear"]),
    mu=st.floats(0.05, 3.0),
    stochastic=st.booleans(),
    steps=st.integers(2, 50),
)
def test_map_for_any_options(
    kind: str,
    total: int,
    shift: float,
    spacing: str | None,
    invert: bool,
    terminal: float | None,
    dynamic: str | None,
    mu: float,
    stochastic: bool,
    steps: int,
) -> None:
    config: dict[str, Any] = {"_class_name": kind, "num_train_timesteps": total, "shift": shift}
    config |= {"invert_sigmas": invert, "shift_terminal": terminal, "use_dynamic_shifting": dynamic is not None}
    config |= ({spacing: True} if spacing else {}) | ({"time_shift_type": dynamic} if dynamic else {})
    config |= {"stochastic_sampling": stochastic} if kind == SCHEDULED[0] else {}
    asked = {"mu": mu} if dynamic else {}
    ours = table_map(compile_table(config, steps, **asked))
    # Where a float64 lies just between two of float32, its last digit decides.
    assert not diffusers_map(config, steps, double=True, **asked).differs(ours, 1e-6, 1e-4)


LISTS: list[dict[str, Any]] = [
    {"sigmas": [1.0, 0.75, 0.5, 0.25]},
    {"sigmas": [0.9, 0.1]},
    {"timesteps": [1000.0, 731.5, 20.25]},
    {"timesteps": [400]},
    {"sigmas": [1.0, 0.6], "timesteps": [999.0, 500.0]},
]


@pytest.mark.parametrize("kind", SCHEDULED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lists", LISTS)
def test_lists_as_in_diffusers(kind: str, case: str, lists: dict[str, Any]) -> None:
    options, asked = CASES[case]
    config = {"_class_name": kind, **options, "num_train_timesteps": 1000}
    ours = {**lists, "sigmas": [*lists["sigmas"], 0.0]} if "sigmas" in lists else lists
    steps = len(next(iter(lists.values())))
    table = compile_table(config, steps, **asked, **ours)
    # The lists are in float32 in diffusers, and so is what it makes of them.
    theirs = diffusers_map(config, steps, double=True, **asked, **lists)
    assert not theirs.differs(table_map(table), DOUBLE_LIMIT)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", [*SCHEDULED, "FlowMatchHeunDiscreteScheduler"])
def test_beginning_later_is_as_in_diffusers(kind: str, case: str) -> None:
    options, asked = CASES[case]
    if "Heun" in kind and case not in ("default", "sd3"):
        return
    config = {"_class_name": kind, **options}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin, **asked)
        theirs = diffusers_map(config, steps, double=True, begin=begin, **asked)
        assert not theirs.differs(table_map(table), DOUBLE_LIMIT)
        scheduler = diffusers_scheduler(getattr(diffusers, kind), config, steps, False, begin, **asked)
        image, noise = torch.ones(1).double(), torch.zeros(1).double()
        first = scheduler.timesteps[begin * scheduler.order :][:1]
        mix = [float(scheduler.scale_noise(*pair)) for pair in ((image, first, noise), (noise, first, image))]
        assert table.mix == pytest.approx(mix, rel=1e-6, abs=1e-7)


def test_a_list_that_is_spaced_changes_nothing() -> None:
    config = {"_class_name": SCHEDULED[0]}
    table = compile_table(config, 20)
    given = compile_table(config, 20, timesteps=[row.t for row in table.rows])
    assert not table_map(table).differs(table_map(given), 1e-6)


def test_a_shared_way_counts_the_given_sigmas() -> None:
    config = {"_class_name": SCHEDULED[0]}
    table = compile_table(config, 4, sigmas=[1.0, 0.9, 0.8, 0.1, 0.0], start=0.15)
    assert [row.t for row in table.rows] == pytest.approx([800, 100], rel=1e-6)


def test_mu_is_that_of_the_pipelines() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    for tokens in (64, 256, 1024, 4096, 9216):
        assert mu_of(config, tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "asked", "words"),
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "exclude each other"),
        ({"time_shift_type": "cubic"}, {}, "time_shift_type='cubic'"),
        (DYNAMIC, {}, "needs mu"),
        ({}, {"mu": 1.0}, "leave mu out"),
        ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": -1.0}, "mu must be above 0"),
        ({"shift": 0.0}, {}, "shift=0.0"),
        ({"shift_terminal": 1.0}, {}, "shift_terminal=1.0"),
        ({}, {"timesteps": [500.0, 900.0]}, "must fall"),
        ({}, {"timesteps": [1001.0, 900.0]}, "at most 1000"),
        ({}, {"sigmas": [1.0, 0.5, 0.1]}, "end with 0"),
        ({}, {"sigmas": [1.5, 0.5, 0.0]}, "at most 1"),
        ({}, {"sigmas": [1.0, 0.5]}, "2 sigmas for 2 steps"),
    ],
)
def test_what_makes_no_schedule_is_refused(options: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    for kind in SCHEDULED:
        with pytest.raises(DexportError, match=words) as caught:
            compile_table({"_class_name": kind, **options}, 2, **asked)
        assert "\n" not in str(caught.value)


def test_latents_that_grow_are_refused() -> None:
    config = {"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1.0], "upscale_mode": "bicubic"}
    with pytest.raises(DexportError, match="scale_factors"):
        compile_table(config, 3)
    plain = {**config, "scale_factors": []}
    assert compile_table(plain, 3) == compile_table({**config, "scale_factors": None}, 3)


@pytest.mark.parametrize("kind", [*SCHEDULED, "FlowMatchHeunDiscreteScheduler"])
def test_a_wrong_row_is_detected(kind: str) -> None:
    config = {"_class_name": kind, "shift": 3.0}
    table, theirs = compile_table(config, 10), diffusers_map({**config}, 10, double=True)
    assert not theirs.differs(table_map(table), DOUBLE_LIMIT)
    for index, field in itertools.product((0, 5), ("t", "x_x", "x_s", "x_m", "x_z")):
        right = table.rows[index]
        if getattr(right, field):
            changed = dataclasses.replace(right, **{field: getattr(right, field) * (1 + 1e-6)})
            rows = (*table.rows[:index], changed, *table.rows[index + 1 :])
            assert theirs.differs(table_map(dataclasses.replace(table, rows=rows)), DOUBLE_LIMIT)
