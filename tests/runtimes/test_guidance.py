"""Guidance against diffusers' own: the rescaled sum, the guided part of the steps, and schedules in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from runtimes.errors import DexportError
from runtimes.guidance import guide, plan
from runtimes.samplers import compile_table

SHAPE = (3, 4, 8, 8)


@pytest.mark.parametrize("scale", [1.5, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guide_is_that_of_diffusers(scale: float, rescale: float) -> None:
    without, with_prompt = np.random.default_rng(0).standard_normal((2, *SHAPE)) * [[[[[1.0]]]], [[[[3.0]]]]]
    u, c = torch.from_numpy(without), torch.from_numpy(with_prompt)
    theirs = u + scale * (c - u)
    if rescale:
        theirs = rescale_noise_cfg(theirs, c, guidance_rescale=rescale)
    np.testing.assert_allclose(guide(without, with_prompt, scale, rescale), theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.5, 1.0), (0.0, 0.35)])
def test_interval_is_that_of_diffusers(steps: int, interval: tuple[float, float]) -> None:
    table = compile_table({"_class_name": "DDIMScheduler"}, steps)
    guider = ClassifierFreeGuidance(guidance_scale=5.0, start=interval[0], stop=interval[1])
    theirs = []
    for index, row in enumerate(table.rows):
        guider.set_state(index, steps, torch.tensor(row.t))
        theirs.append(guider.num_conditions == 2)
    if any(theirs):
        assert [row.guidance > 1 for row in plan(table, 5.0, interval).rows] == theirs
    else:
        with pytest.raises(DexportError, match=f"holds none of {steps} calls; widen it"):
            plan(table, 5.0, interval)


def test_a_share_that_is_a_whole_number_of_calls_is_that_number() -> None:
    table = plan(compile_table({"_class_name": "DDIMScheduler"}, 50), 5.0, (0.0, 0.58))
    assert sum(row.guidance > 1 for row in table.rows) == 29  # and 0.58 * 50 is 28.999999999999996


def test_rows_without_a_call_take_no_part() -> None:
    table = plan(compile_table({"_class_name": "RePaintScheduler"}, 15), [9.0, 2.0])
    called = [row.guidance for row in table.rows if row.calls]
    assert 0 < len(called) < len(table.rows) and called[0] == 9 and called[-1] == 2
    np.testing.assert_allclose(np.diff(called), -7 / (len(called) - 1))


def test_scales_are_spread_over_the_steps() -> None:
    table = compile_table({"_class_name": "DDIMScheduler"}, 5)
    assert [row.guidance for row in plan(table, 4.0).rows] == [4.0] * 5
    assert [row.guidance for row in plan(table, [9, 1]).rows] == [9, 7, 5, 3, 1]
    assert [row.guidance for row in plan(table, [1, 5, 3]).rows] == [1, 3, 5, 4, 3]
    assert [row.guidance for row in plan(table, [9, 1], (0.2, 0.6)).rows] == [1, 7, 5, 1, 1]


@pytest.mark.parametrize(
    ("scale", "interval"),
    [
        (-1.0, (0.0, 1.0)),
        ([], (0.0, 1.0)),
        ([1.0, float("nan")], (0.0, 1.0)),
        (1e4, (0.0, 1.0)),
        (2.0, (0.5, 0.5)),
        ("abc", (0.0, 1.0)),
        ([9, "x"], (0.0, 1.0)),
        ([[1], [2, 3]], (0.0, 1.0)),
        (2.0, 0.5),
        (2.0, (0,)),
        (2.0, ("0", "1")),
    ],
)
def test_what_is_no_scale_is_refused(scale: Any, interval: Any) -> None:
    with pytest.raises(DexportError, match="guidance"):
        plan(compile_table({"_class_name": "DDIMScheduler"}, 5), scale, interval)
