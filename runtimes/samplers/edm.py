"""EDM: Euler's method on a model with EDM's preconditioning; X is x_0 + sigma eps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from math import sqrt

import numpy as np

from runtimes import schedule
from runtimes.samplers.sampler import FINAL_SIGMA, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import M, Table, X, row


def euler(config: Config, ask: Ask) -> Table:
    """Euler's method, https://arxiv.org/abs/2206.00364, algorithm 1, with table 1's c_skip, c_out, c_in and c_noise."""
    data = config["sigma_data"]
    sigmas = _sigmas(config, ask.steps)
    rows = []
    for sigma, to in list(pairwise(sigmas.tolist()))[ask.begin :]:
        size = sqrt(sigma**2 + data**2)
        c_out = sigma * data / size * (1 if config["prediction_type"] == "epsilon" else -1)
        x0 = data**2 / size**2 * X + c_out * M
        rows.append(row(math.log(sigma) / 4, X + (to - sigma) / sigma * (X - x0), scale=1 / size))
    return Table(tuple(rows), sqrt(config["sigma_max"] ** 2 + 1), (1.0, float(sigmas[ask.begin])))


def _sigmas(config: Config, steps: int) -> Floats:
    low, high = config["sigma_min"], config["sigma_max"]
    if config["sigma_schedule"] == "karras":
        sigmas = schedule.karras(low, high, steps, config["rho"])
    else:
        sigmas = schedule.exponential(low, high, steps)
    return schedule.rounded(np.append(sigmas, sigmas[-1] if config["final_sigmas_type"] == "sigma_min" else 0.0))


CLASSES: Mapping[str, Sampler] = {
    "EDMEulerScheduler": Sampler(
        euler,
        {
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "sigma_schedule": OneOf("karras", ("karras", "exponential")),
            "num_train_timesteps": 1000,
            "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction")),
            "rho": 7.0,
            "final_sigmas_type": FINAL_SIGMA,
        },
        counts_down=False,
    ),
}
