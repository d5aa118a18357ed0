"""Two calls of the model a step: Heun's method, and DPM-Solver-2 with and without fresh noise; X is x / alpha.

S keeps the sample at the step's start. The last step, to sigma = 0, is Euler's and makes one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.samplers.euler import initial
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, SIGMA_SPACING, SPACED_SIGMAS, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, H1, Form, Row, S, Table, X, Z, row


def heun(config: Config, ask: Ask) -> Table:
    """Heun's method on dx/dsigma = (x - x_0) / sigma, https://arxiv.org/abs/2206.00364, algorithm 1; H0, H1 are x_0."""
    times, sigmas = schedule.euler_sigmas(config, ask)
    clip = float(config["clip_sample_range"]) if config["clip_sample"] else math.inf
    rows: list[Row] = []
    for index in range(ask.begin, len(times)):
        sigma, to = sigmas[index], sigmas[index + 1]
        slope = (X - H0) / sigma
        rows.append(
            _row(config, times[index], sigma, X + (to - sigma) * slope, clip=clip, s=X, shift=True, level=(1.0, sigma))
        )
        if to:
            mean = ((S - H1) / sigma + (X - H0) / to) / 2
            rows.append(_row(config, times[index + 1], to, S + (to - sigma) * mean, clip=clip))
    return _table(config, sigmas, rows, ask)


def kdpm2(config: Config, ask: Ask, *, ancestral: bool = False) -> Table:
    """DPM-Solver-2, https://arxiv.org/abs/2206.00927, algorithm 1, as steps in sigma rather than in lambda.

    ancestral: to a lower sigma, and noise up again, as Euler's ancestral method does.
    """
    times, sigmas, middle = _through_the_middle(config, ask, ancestral=ancestral)
    rows: list[Row] = []
    for index in range(ask.begin, len(times)):
        sigma, to = sigmas[index], sigmas[index + 1]
        mid, t = middle[index]
        rows.append(_row(config, times[index], sigma, X + (mid - sigma) / sigma * (X - H0), s=X, level=(1.0, sigma)))
        if to:
            up, down = split(sigma, to) if ancestral else (0.0, to)
            rows.append(_row(config, t, mid, S + (down - sigma) / mid * (X - H0) + up * Z))
    return _table(config, sigmas, rows, ask)


def split(sigma: float, to: float) -> tuple[float, float]:
    """The noise that is added at ``to``, and the sigma that is stepped to before: up^2 + down^2 = to^2."""
    return to * sqrt(sigma**2 - to**2) / sigma, to**2 / sigma


def _row(config: Config, t: float, sigma: float, x: Form, **others: Any) -> Row:
    """A call at ``sigma``; H0 is x_0 there."""
    alpha = 1 / sqrt(sigma**2 + 1)
    x0, _ = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
    return row(t, x, scale=alpha, h=x0, **others)


def _through_the_middle(
    config: Config, ask: Ask, *, ancestral: bool
) -> tuple[Floats, Floats, list[tuple[float, float]]]:
    """Timesteps, sigmas, and for each step the sigma and timestep half-way in log sigma; 0 where the step ends at 0."""
    table = schedule.sigma_table(config)
    times, sigmas = schedule.euler_sigmas(config, ask)
    if config["use_karras_sigmas"]:
        times = times.round()
    middle = []
    for sigma, to in pairwise(sigmas.tolist()):
        mid = sqrt(sigma * (split(sigma, to)[1] if ancestral else to))
        middle.append((mid, float(schedule.times_of(np.array([mid]), table)[0]) if mid else 0.0))
    return times, sigmas, middle


def _table(config: Config, sigmas: Floats, rows: list[Row], ask: Ask) -> Table:
    return Table(tuple(rows), initial(config, sigmas))


OPTIONS: Mapping[str, Any] = {
    **COMMON,
    **SPACED_SIGMAS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": SIGMA_SPACING,
}
EPS_OR_V = OneOf("epsilon", ("epsilon", "v_prediction"))

CLASSES: Mapping[str, Sampler] = {
    "HeunDiscreteScheduler": Sampler(
        heun,
        {
            **OPTIONS,
            "beta_schedule": OneOf("linear", ("linear", "scaled_linear", "squaredcos_cap_v2", "exp")),
            "clip_sample": False,
            "clip_sample_range": 1.0,
        },
        ("timesteps",),
    ),
    "KDPM2DiscreteScheduler": Sampler(kdpm2, {**OPTIONS, "prediction_type": EPS_OR_V}),
    "KDPM2AncestralDiscreteScheduler": Sampler(
        partial(kdpm2, ancestral=True), {**OPTIONS, "prediction_type": EPS_OR_V}
    ),
}
