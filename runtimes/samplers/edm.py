"""EDM: Euler's method on a model with EDM's preconditioning; X is x_0 + sigma eps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from runtimes import schedule
from runtimes.samplers.dpm_edm import EDM, x0
from runtimes.samplers.sampler import Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import Table, X, row


def euler(config: Config, ask: Ask) -> Table:
    """Euler's method, https://arxiv.org/abs/2206.00364, algorithm 1, with table 1's c_skip, c_out, c_in and c_noise."""
    sigmas = _sigmas(config, ask.steps)
    rows = []
    for sigma, to in list(pairwise(sigmas.tolist()))[ask.begin :]:
        x = X + (to - sigma) / sigma * (X - x0(config, sigma))
        scale = 1 / math.hypot(sigma, config["sigma_data"])
        rows.append(row(math.log(sigma) / 4, x, scale=scale, level=(1.0, sigma)))
    return Table(tuple(rows), math.hypot(config["sigma_max"], 1))


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
        EDM,
        counts_down=False,
    ),
}
