"""The SDEs of score models, https://arxiv.org/abs/2011.13456, whose noise grows (VE) or keeps the variance (VP).

Both end with the mean of their last step: as the pipeline of the VE sampler does, no noise is left in the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import sqrt

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.sampler import Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import NOTHING, M, Row, Table, X, Z, row


def variance_exploding(config: Config, ask: Ask) -> Table:
    """The predictor of algorithm 2; the model is told sigma, and its output is the score."""
    if config["correct_steps"]:
        raise DexportError(
            f"ScoreSdeVeScheduler with correct_steps={config['correct_steps']} is not supported: the length of the "
            "corrector's step depends on the norms of the noise and of the model's output; set correct_steps to 0"
        )
    low, high, count = config["sigma_min"], config["sigma_max"], ask.steps
    times = schedule.linspace(1, config["sampling_eps"], count)
    sigmas = np.append(schedule.exponential(high, low, count), 0.0)  # rising; the 0 at the end is that of index -1
    places = np.trunc(times * np.float32(count - 1)).astype(int)
    rows = []
    for index in range(ask.begin, count):
        sigma, to = sigmas[places[index]], sigmas[places[index] - 1]
        noise = sqrt(sigma**2 - to**2) * Z if index < count - 1 else NOTHING
        x = X + (sigma**2 - to**2) * M + noise
        rows.append(row(low * (high / low) ** float(times[index]), x, level=(1.0, sigma)))
    return Table(tuple(rows), high)


def variance_preserving(config: Config, ask: Ask) -> Table:
    """The reverse SDE, formula 6, in steps of Euler and Maruyama; the model is told t from 1 to 0 and predicts eps."""
    low, high, step = config["beta_min"], config["beta_max"], 1 / ask.steps
    times = schedule.linspace(1, config["sampling_eps"], ask.steps).astype(np.float64)[ask.begin :]
    # The log of the signal's factor, formula 33.
    logs = [-(t**2) * (high - low) / 4 - t * low / 2 for t in times.tolist()]
    rows: list[Row] = []
    for t, log in zip(times.tolist(), logs, strict=True):
        deviation = sqrt(1 - math.exp(2 * log))
        beta = low + t * (high - low)
        x = (1 + beta * step / 2) * X - beta * step / deviation * M
        noise = sqrt(beta * step) * Z if len(rows) < len(times) - 1 else NOTHING
        rows.append(row(t, x + noise, level=(math.exp(log), deviation)))
    return Table(tuple(rows), 1.0)


CLASSES: Mapping[str, Sampler] = {
    "ScoreSdeVeScheduler": Sampler(
        variance_exploding,
        {
            "num_train_timesteps": 2000,
            "snr": 0.15,  # of the corrector
            "sigma_min": 0.01,
            "sigma_max": 1348.0,
            "sampling_eps": 1e-5,
            "correct_steps": 1,
        },
        counts_down=False,
    ),
    "ScoreSdeVpScheduler": Sampler(
        variance_preserving,
        {"num_train_timesteps": 2000, "beta_min": 0.1, "beta_max": 20.0, "sampling_eps": 1e-3},
        counts_down=False,
    ),
}
