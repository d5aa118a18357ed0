"""DPM-Solver++ on the levels of noise of EDM, https://arxiv.org/abs/2206.00364: x = x_0 + sigma eps.

The network is preconditioned (section 5): its input is scaled to unit variance, its output added to a part of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.dpm import SOLVER_TYPE, advance, order, threshold
from runtimes.samplers.sampler import FINAL_SIGMA, THRESHOLDING, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, H1, H2, Form, M, Table, X, row


def edm(config: Config, ask: Ask) -> Table:
    """DPM-Solver++ and its SDE, https://arxiv.org/abs/2211.01095, algorithm 2; t is log(sigma) / 4."""
    if config["algorithm_type"] == "deis" and config["final_sigmas_type"] == "zero":
        raise DexportError("algorithm_type='deis' has no step to sigma = 0; take dpmsolver++")
    if config["algorithm_type"] == "sde-dpmsolver++" and config["solver_order"] > 2:
        raise DexportError(
            "EDMDPMSolverMultistepScheduler has no third order of algorithm_type='sde-dpmsolver++'; take solver_order=2"
        )
    return _table(config, ask, lambda sigmas: np.log(sigmas) / 4)


def cosine(config: Config, ask: Ask) -> Table:
    """SDE-DPM-Solver++, as of Stable Audio; t is the angle between signal and noise, 1 where all is noise."""
    config = {**config, "algorithm_type": "sde-dpmsolver++", "thresholding": False}
    return _table(config, ask, lambda sigmas: np.arctan(sigmas) * 2 / math.pi)


def _table(config: Config, ask: Ask, times_of: Callable[[Floats], Floats]) -> Table:
    low, high = config["sigma_min"], config["sigma_max"]
    if config["sigma_schedule"] == "karras":
        sigmas = schedule.karras(low, high, ask.steps, config["rho"])
    else:
        sigmas = schedule.exponential(low, high, ask.steps)
    times = times_of(sigmas)
    ends = schedule.rounded(np.append(sigmas, low if config["final_sigmas_type"] == "sigma_min" else 0.0))
    levels = [(1.0, float(sigma)) for sigma in ends]
    rows = []
    for index in range(ask.begin, len(times)):
        sigma = levels[index][1]
        x = advance(config, levels, index, order(config, times, index, ask), [H0, H1, H2])
        scale = 1 / math.hypot(sigma, config["sigma_data"])
        kept: dict[str, Any] = {"h": x0(config, sigma), "shift": True, **threshold(config)}
        rows.append(row(times[index], x, scale=scale, level=levels[index], **kept))
    return Table(tuple(rows), math.hypot(high, 1))


def x0(config: Config, sigma: float) -> Form:
    """https://arxiv.org/abs/2206.00364, formula 7 with the factors of table 1; where v is predicted, -v counts."""
    data = float(config["sigma_data"])
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
    return skip * X + (out if config["prediction_type"] == "epsilon" else -out) * M


EDM: Mapping[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": OneOf("karras", ("karras", "exponential")),
    "num_train_timesteps": 1000,
    "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction")),
    "rho": 7.0,
    "final_sigmas_type": FINAL_SIGMA,
}
"""The options of noise and preconditioning."""

SOLVER: Mapping[str, Any] = {
    "solver_order": OneOf(2, (1, 2)),
    "solver_type": SOLVER_TYPE,
    "lower_order_final": True,
    "euler_at_final": False,
}
CLASSES: Mapping[str, Sampler] = {
    "EDMDPMSolverMultistepScheduler": Sampler(
        edm,
        {
            **EDM,
            **SOLVER,
            **THRESHOLDING,
            "solver_order": OneOf(2, (1, 2, 3)),
            "algorithm_type": OneOf("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis")),
        },
        counts_down=False,
    ),
    "CosineDPMSolverMultistepScheduler": Sampler(
        cosine,
        {
            **EDM,
            **SOLVER,
            "sigma_min": 0.3,
            "sigma_max": 500.0,
            "sigma_data": 1.0,
            "sigma_schedule": OneOf("exponential", ("karras", "exponential")),
            "prediction_type": OneOf("v_prediction", ("epsilon", "v_prediction")),
        },
        counts_down=False,
    ),
}
