"""DPM-Solver++ (SDE) of two calls a step, on one Brownian path; X is x / alpha."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.samplers.euler import initial
from runtimes.samplers.heun import EPS_OR_V, OPTIONS, split
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, H1, Form, Row, S, Table, X, Z, row


def dpm_sde(config: Config, ask: Ask) -> Table:
    """DPM-Solver++ as an SDE, https://arxiv.org/abs/2211.01095, section 6, with a call half-way in log sigma.

    Both calls of a step add the noise of one Brownian path in sigma: the second one's, over the whole step, is the
    first one's and what comes after. The first one's is not kept, but read off: it is what the half-way sample X has
    beyond the step's start S and its x_0.
    """
    table = schedule.sigma_table(config)
    times, sigmas = schedule.euler_sigmas(config, ask, exact_times=True)
    rows: list[Row] = []
    for index in range(ask.begin, len(times)):
        sigma, to = float(sigmas[index]), float(sigmas[index + 1])
        if not to:
            rows.append(_row(config, times[index], sigma, H0, level=(1.0, sigma)))
            continue
        mid = sqrt(sigma * to)
        half, up = _towards(X, H0, sigma, mid)
        rows.append(_row(config, times[index], sigma, half + up * Z, s=X, shift=True, level=(1.0, sigma)))
        first = (X - _towards(S, H1, sigma, mid)[0]) / up
        whole, up = _towards(S, H0, sigma, to)
        path = (sqrt(sigma - mid) * first + sqrt(mid - to) * Z) / sqrt(sigma - to)
        t = float(schedule.times_of(np.array([mid]), table)[0])
        rows.append(_row(config, t, mid, whole + up * path))
    return Table(tuple(rows), initial(config, sigmas))


def _towards(x: Form, x0: Form, sigma: float, to: float) -> tuple[Form, float]:
    """The sample on its way from ``sigma`` to ``to`` before the noise, and the deviation of the noise."""
    up, down = split(sigma, to)
    return down / sigma * x + (1 - down / sigma) * x0, up


def _row(config: Config, t: float, sigma: float, x: Form, **others: Any) -> Row:
    alpha = 1 / sqrt(sigma**2 + 1)
    x0, _ = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
    return row(t, x, scale=alpha, h=x0, **others)


CLASSES: Mapping[str, Sampler] = {
    "DPMSolverSDEScheduler": Sampler(
        # The seed of diffusers' own noise; ours is the loop's.
        dpm_sde,
        {**OPTIONS, "prediction_type": EPS_OR_V, "noise_sampler_seed": None},
    ),
}
