"""The order of each solver, on data whose score is known: x_0 normal with mean MU and deviation SPREAD.

There the sampling ODE has a closed form: x = alpha MU + sqrt(alpha^2 SPREAD^2 + sigma^2) z, with one z for all of its
way. So each step can be started from the very path, with the history that the path gives, and what it misses is its
local error. A solver of order p misses by h^(p + 1): with steps of half the length, 2^(p + 1) times less.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtimes import samplers, schedule
from runtimes.samplers import NAMES
from runtimes.table import HISTORY, Row, Table

MU, SPREAD, PATH = 0.3, 0.5, 1.2  # PATH: the z of the path that is followed
FINE: dict[str, Any] = {  # so fine that whole timesteps do not show
    "num_train_timesteps": 100_000, "beta_start": 0.1e-4, "beta_end": 0.02e-2, "beta_schedule": "linear",
    "timestep_spacing": "leading", "clip_sample": False,
}  # fmt: skip
SIGMAS = schedule.sigma_table({**FINE, "trained_betas": None})

ORDERS: dict[str, int] = {
    "ddim": 1,
    "euler": 1,
    "pndm": 2,  # a blend of order 4, but DDIM's transfer of it is exact for a constant eps alone
    "ipndm": 2,  # likewise
    "heun": 2,
    "dpm_2": 2,
    "lms": 4,
    "dpmpp_2m": 2,
    "dpm_2m": 2,
    # Their slope of the slope, as diffusers and the authors have it, is half of what it should be, so the third order
    # that their name promises is not reached.
    "dpmpp_3m": 2,
    "dpm_3m": 2,
    "dpmpp_2s": 2,
    "dpm_2s": 2,
    "dpmpp_3s": 3,
    "dpm_3s": 3,
    "deis": 2,
    "unipc": 3,  # the corrector adds one to the predictor's 2
    "sa_solver": 2,
    "flow_euler": 1,
    "flow_heun": 2,
}
GROUPS = {"dpmpp_2s": 2, "dpm_2s": 2, "dpmpp_3s": 3, "dpm_3s": 3}  # only each n-th step is of the full order
CORRECTED = ("unipc", "sa_solver")  # which go on from their own corrected sample, in S: errors add up over the way
# Which have a closed form of something else than the ODE: noise (test_loop.py), or a model that was distilled.
OTHERS = {
    "ddpm", "euler_ancestral", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde",
    "lcm", "tcd", "flow_lcm",
}  # fmt: skip


def level(name: str, t: float) -> tuple[float, float]:
    """The factors alpha and sigma of signal and noise that the model expects at t."""
    if name.startswith("flow_"):
        return 1 - t / 1000, t / 1000
    if name == "ipndm":
        sigma = math.sin(t * math.pi / 2)
        return math.sqrt(1 - sigma**2), sigma
    ratio = float(np.interp(t, np.arange(len(SIGMAS)), SIGMAS))
    alpha = 1 / math.sqrt(ratio**2 + 1)
    return alpha, ratio * alpha


def model(name: str, x: float, t: float) -> float:
    """The best model's prediction: eps, a flow's velocity or v."""
    alpha, sigma = level(name, t)
    beyond = (x - alpha * MU) / (alpha**2 * SPREAD**2 + sigma**2)
    eps, x0 = sigma * beyond, MU + SPREAD**2 * alpha * beyond
    if name.startswith("flow_"):
        return eps - x0
    return alpha * eps - sigma * x0 if name == "ipndm" else eps


def step(name: str, row: Row, x: float, saved: float, history: list[float]) -> tuple[float, float, list[float]]:
    """One row in float64 with the model in float64: the loop rounds what it gives to the model to float32."""
    output = model(name, row.scale * x, row.t)
    if row.h_x or row.h_m:
        history = [row.h_x * x + row.h_m * output, *history[1:]]
    registers = np.array([x, saved, output, *history])
    new = float(np.dot((row.x_x, row.x_s, row.x_m, *row.x_h), registers))
    kept = float(np.dot((row.s_x, row.s_s, row.s_m, *row.s_h), registers))
    return new, kept, [history[0], *history[:-1]] if row.shift else history


def local_errors(name: str, steps: int) -> np.ndarray:
    """What each step misses of the path, [steps - 1]; the last one has no level to end at."""
    config = {} if name.startswith("flow_") or name == "ipndm" else FINE
    tables = [samplers.compile_table(config, steps, sampler=name, begin=begin) for begin in range(steps)]
    on_path = [signal * MU + math.hypot(signal * SPREAD, noise) * PATH for signal, noise in (t.mix for t in tables)]
    calls = 2 if len(tables[0].rows) == 2 * steps - 1 else 1
    begins = [max(calls * index, len(tables[0].rows) - len(tables[index].rows)) for index in range(steps)]
    saved, history, errors = on_path[0], [0.0] * HISTORY, []
    for begin, end, x, goal in zip(begins, begins[1:], on_path, on_path[1:], strict=False):
        for row in tables[0].rows[begin:end]:
            x, saved, history = step(name, row, x, saved, history)
        errors.append(abs(x - goal) / goal)
    return np.array(errors)


def order(name: str) -> float:
    """The order that the errors in the middle of the way show."""
    few, many = 96, 192
    middle = []
    for steps in (few, many):
        group = GROUPS.get(name, 1)
        errors = local_errors(name, steps)[group - 1 :: group]
        middle.append(float(np.median(errors[int(0.4 * len(errors)) : int(0.6 * len(errors))])))
    return math.log2(middle[0] / middle[1]) - (0 if name in CORRECTED else 1)


@pytest.mark.parametrize("name", ORDERS)
def test_order_is_that_of_theory(name: str) -> None:
    assert order(name) == pytest.approx(ORDERS[name], abs=0.3)


def test_every_name_is_looked_at() -> None:
    assert set(NAMES) == {*ORDERS, *OTHERS}


def test_a_wrong_slope_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the slope of DPM-Solver++ a tenth off, it would not be of order 2."""

    right = samplers.compile_table

    def spoiled(*arguments: Any, **options: Any) -> Table:
        table = right(*arguments, **options)
        rows = [replace(r, x_h=(r.x_h[0] - 0.1 * r.x_h[1], 1.1 * r.x_h[1], *r.x_h[2:])) for r in table.rows]
        return replace(table, rows=tuple(rows))

    monkeypatch.setattr(samplers, "compile_table", spoiled)
    assert order("dpmpp_2m") < 1.3
