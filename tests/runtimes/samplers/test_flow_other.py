"""The rarer samplers of flows against diffusers, and the classes that are refused: see oracle.py."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import CLASSES, REFUSED, choose, compile_table
from tests.runtimes.samplers.oracle import DOUBLE_LIMIT, STEPS, diffusers_map, diffusers_scheduler, table_map

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LTX, MAP, MINIMAX = "LTXEulerAncestralRFScheduler", "FlowMapEulerDiscreteScheduler", "MiniMaxH3Scheduler"
HELIOS, DISTILLED = "HeliosScheduler", "HeliosDMDScheduler"
LIMIT = 1e-6  # diffusers as it is keeps the sample in float32


def ltx(scheduler: Any) -> Any:
    """eta as the oracle gives it, to the step; and no call after the end, where its step leaves the sample alone."""

    def step(*args: Any, eta: float = 1.0) -> Any:
        scheduler.register_to_config(eta=eta)
        return scheduler.step(*args)

    count = len(scheduler.sigmas) - 1
    return types.SimpleNamespace(timesteps=scheduler.timesteps[:count], step=step)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, {}),
        ({"s_noise": 0.9, "shift": 3.0}, {}),
        ({"s_noise": 0.0}, {}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 2.05}),  # LTX's flow schedule
        ({"num_train_timesteps": 500, "use_karras_sigmas": True}, {}),
    ],
)
def test_ltx_is_that_of_diffusers(eta: float, options: dict[str, Any], asked: dict[str, Any]) -> None:
    config = {"_class_name": LTX, **options, "eta": eta}
    for steps in (2, 3, 5, 10, 20, 50):
        ours = table_map(compile_table(config, steps, **asked))
        # 2e-5: the noise is the root of a difference in float32, and near sigma = 1 little is left of 1 - sigma.
        for double, limit in ((True, DOUBLE_LIMIT), (False, 2e-5)):
            different = diffusers_map(config, steps, double=double, adapt=ltx, **asked).differs(ours, limit)
            assert not different, f"{steps} steps: {different}"


@settings(max_examples=40, deadline=None)
@given(
    eta=st.floats(0.0, 1.0),
    noise=st.floats(0.0, 2.0),
    shift=st.floats(0.2, 12.0),
    total=st.integers(50, 2000),
    steps=st.integers(1, 50),
)
def test_ltx_for_any_options(eta: float, noise: float, shift: float, total: int, steps: int) -> None:
    config = {"_class_name": LTX, "eta": eta, "s_noise": noise, "shift": shift, "num_train_timesteps": total}
    theirs = diffusers_map(config, steps, double=True, adapt=ltx)
    # 1e-7: what is left of sigma' squared is the root of a difference, which is nearly 0 for a small eta.
    assert not theirs.differs(table_map(compile_table(config, steps)), 1e-7)


def test_ltx_takes_sigmas() -> None:
    for sigmas in ([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0], [0.5, 0.0]):
        config = {"_class_name": LTX, "shift": 3.0}  # which does not act on a list
        theirs = diffusers_map(config, len(sigmas) - 1, double=True, adapt=ltx, sigmas=sigmas)
        ours = compile_table(config, len(sigmas) - 1, sigmas=sigmas)
        assert not theirs.differs(table_map(ours), DOUBLE_LIMIT)


@pytest.mark.parametrize("options", [{}, {"shift": 5.0}, {"shift": 0.4, "num_train_timesteps": 300}])
def test_flow_map_is_that_of_diffusers(options: dict[str, Any]) -> None:
    config = {"_class_name": MAP, **options}
    for steps in STEPS:
        ours = table_map(compile_table(config, steps))
        for double in (True, False):  # it computes in float64
            assert not diffusers_map(config, steps, double=double).differs(ours, DOUBLE_LIMIT, 1e-9)
    total = options.get("num_train_timesteps", 1000)
    for times in ([total, total / 2], [0.3 * total]):
        theirs = diffusers_map(config, len(times), double=True, timesteps=times)
        ours = table_map(compile_table(config, len(times), timesteps=times))
        assert not theirs.differs(ours, DOUBLE_LIMIT, 1e-9)
    for sigmas in ([1.0, 0.7, 0.2], [0.8]):
        theirs = diffusers_map(config, len(sigmas), double=True, sigmas=sigmas)
        ours = table_map(compile_table(config, len(sigmas), sigmas=[*sigmas, 0.0]))
        assert not theirs.differs(ours, DOUBLE_LIMIT, 1e-9)


@pytest.mark.parametrize("shift", [12.0, 1.0, 0.5, 3.3])
def test_minimax_is_that_of_diffusers(shift: float) -> None:
    config = {"_class_name": MINIMAX, "shift": shift}
    for steps in STEPS:
        ours = table_map(compile_table(config, steps))
        assert len(ours.times) == steps
        # diffusers counts the points, of which there is one more than calls.
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            assert not diffusers_map(config, steps + 1, double=double).differs(ours, limit)
    theirs = diffusers_map(config, 2, double=True, sigmas=[1.0, 0.6, 0.0])
    assert not theirs.differs(table_map(compile_table(config, 2, sigmas=[1.0, 0.6, 0.0])), DOUBLE_LIMIT)


HELIOS_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"shift": 1.3}, {}),
    ({"shift": 2.0, "time_shift_type": "linear"}, {}),
    ({"use_dynamic_shifting": True, "time_shift_type": "exponential"}, {"mu": 1.1}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 3.0}),
]


@pytest.mark.parametrize(("options", "asked"), HELIOS_CASES)
def test_helios_in_one_stage_is_that_of_diffusers(options: dict[str, Any], asked: dict[str, Any]) -> None:
    config = {"_class_name": HELIOS, "stages": 1, "scheduler_type": "euler", **options}
    for steps in STEPS:
        ours = table_map(compile_table(config, steps, **asked))
        # torch and numpy may round the float32 arithmetic of the schedule differently.
        theirs = diffusers_map(config, steps, double=True, **asked)
        assert not theirs.differs(ours, 1e-6, 1e-3)


def distilled(scheduler: Any) -> Any:
    """HeliosDMD as its pipeline calls it, which hands over the start's noise in every step."""
    start: list[torch.Tensor] = []

    def step(output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor) -> Any:
        if not start:
            start.append(sample)
        made = scheduler.step(
            output,
            t,
            sample,
            cur_sampling_step=scheduler.timesteps.tolist().index(float(t)),
            dmd_noisy_tensor=start[0],
            dmd_sigmas=scheduler.sigmas,
            dmd_timesteps=scheduler.timesteps,
            all_timesteps=scheduler.timesteps,
        )
        return types.SimpleNamespace(prev_sample=made.prev_sample.reshape(sample.shape))

    return types.SimpleNamespace(timesteps=scheduler.timesteps, step=step)


@pytest.mark.parametrize(("options", "asked"), HELIOS_CASES)
def test_helios_distilled_is_that_of_diffusers(options: dict[str, Any], asked: dict[str, Any]) -> None:
    config = {"_class_name": DISTILLED, "stages": 1, **options}
    for steps in (1, 2, 3, 5, 10, 20):
        ours = table_map(compile_table(config, steps, **asked))
        theirs = diffusers_map(config, steps, double=True, adapt=distilled, **asked)
        assert not theirs.differs(ours, 1e-6, 1e-3), steps


def test_helios_distilled_steps_from_its_own_sigma() -> None:
    # diffusers cuts t to a whole number and looks for the nearest: past 500 steps that is another step's sigma.
    scheduler = diffusers.HeliosDMDScheduler(stages=1)
    scheduler.set_timesteps(900)
    nearest = (scheduler.timesteps[None] - scheduler.timesteps.long()[:, None]).abs().argmin(dim=1)
    assert (nearest != torch.arange(900)).any()
    table = compile_table({"_class_name": DISTILLED, "stages": 1}, 900)
    np.testing.assert_allclose([-row.x_m / row.x_x for row in table.rows[:-1]], scheduler.sigmas[:-2], rtol=1e-6)


@pytest.mark.parametrize("kind", [LTX, MAP, MINIMAX])
def test_beginning_later_is_as_in_diffusers(kind: str) -> None:
    config = {"_class_name": kind}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        counted = steps + 1 if kind == MINIMAX else steps
        adapt = ltx if kind == LTX else (lambda scheduler: scheduler)
        theirs = diffusers_map(config, counted, double=True, begin=begin, adapt=adapt)
        assert not theirs.differs(table_map(table), DOUBLE_LIMIT, 1e-9)
        if kind == LTX:  # it cannot add noise
            sigma = table.rows[0].t / 1000
            assert table.mix == pytest.approx((1 - sigma, sigma))
            continue
        scheduler = diffusers_scheduler(getattr(diffusers, kind), config, counted, False, begin)
        image, noise, first = torch.ones(1).double(), torch.zeros(1).double(), scheduler.timesteps[begin]
        mix = [float(scheduler.scale_noise(*pair)) for pair in ((image, first, noise), (noise, first, image))]
        assert table.mix == pytest.approx(mix, rel=1e-6, abs=1e-7)


def test_helios_begins_later_at_its_own_sigma() -> None:
    # diffusers takes no account there of the step that it begins at.
    config = {"_class_name": HELIOS, "stages": 1, "scheduler_type": "euler"}
    table, whole = compile_table(config, 10, begin=4), compile_table(config, 10)
    assert table.rows == whole.rows[4:]
    assert table.mix == pytest.approx((1 - whole.rows[4].t / 1000, whole.rows[4].t / 1000))
    with pytest.raises(DexportError, match="begin at the first step"):
        compile_table({"_class_name": DISTILLED, "stages": 1}, 10, begin=4)


@pytest.mark.parametrize(
    ("kind", "options", "asked", "words"),
    [
        (LTX, {"eta": 1.5}, {}, "eta must lie between 0 and 1"),
        (LTX, {"invert_sigmas": True}, {}, "invert_sigmas=True"),
        (LTX, {"use_dynamic_shifting": True}, {}, "needs mu"),
        (LTX, {}, {"timesteps": [900.0, 400.0]}, "takes no timesteps"),
        (MAP, {}, {"timesteps": [900.0, 400.0], "sigmas": [0.9, 0.4, 0.0]}, "leave one out"),
        (MAP, {}, {"sigmas": [0.4, 0.9, 0.0]}, "must fall"),
        (MINIMAX, {"shift": -1.0}, {}, "shift=-1.0"),
        (MINIMAX, {}, {"sigmas": [1.0, 0.6, 0.1]}, "end with 0"),
        (MINIMAX, {}, {"end": 0.5}, "leave start and end out"),
        (HELIOS, {}, {}, "stages=3"),
        (HELIOS, {"stages": 1}, {}, "scheduler_type='unipc'"),
        (DISTILLED, {"stages": 3}, {}, "stages=3"),
        (DISTILLED, {"stages": 1}, {"mu": 1.0}, "mu goes with use_dynamic_shifting"),
        (DISTILLED, {"stages": 1, "use_dynamic_shifting": True, "shift": 2.0}, {"mu": 1.0}, "set shift to 1"),
        (DISTILLED, {"stages": 1, "use_dynamic_shifting": True}, {"mu": -1.0}, "mu must be above 0"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {"start": 0.5}, "leave start and end out"),
        ("SCMScheduler", {}, {"start": 0.5}, "leave start and end out"),
    ],
)
def test_what_makes_no_schedule_is_refused(
    kind: str, options: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({"_class_name": kind, **options}, 2, **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_classes_say_why(kind: str) -> None:
    assert hasattr(diffusers.schedulers, kind)
    assert kind not in CLASSES
    for refuse in (lambda: compile_table({"_class_name": kind}, 2), lambda: choose({}, kind)):
        with pytest.raises(DexportError) as caught:
            refuse()
        assert str(caught.value) == f"{kind} is not supported: {REFUSED[kind]}"


def test_a_schedule_by_resolution_can_be_chosen() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift_terminal": 0.1}
    assert choose(config, None) == config


@pytest.mark.parametrize("kind", [LTX, MAP, MINIMAX])
def test_a_wrong_row_is_detected(kind: str) -> None:
    config = {"_class_name": kind}
    table = compile_table(config, 10)
    adapt = ltx if kind == LTX else (lambda scheduler: scheduler)
    theirs = diffusers_map(config, 11 if kind == MINIMAX else 10, double=True, adapt=adapt)
    for field in ("t", "x_x", "x_m", "x_z"):
        right = table.rows[5]
        if getattr(right, field):
            changed = dataclasses.replace(right, **{field: getattr(right, field) * (1 + 1e-6)})
            rows = (*table.rows[:5], changed, *table.rows[6:])
            assert theirs.differs(table_map(dataclasses.replace(table, rows=rows)), DOUBLE_LIMIT, 1e-9)
