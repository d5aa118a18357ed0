"""Euler's method in sigma, with and without fresh noise; X is x / alpha, so that x = x_0 + sigma eps in every step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import sqrt

from runtimes import schedule
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, FINAL_SIGMA, SIGMA_SPACING, SPACED_SIGMAS, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import Table, X, Z, row


def euler(config: Config, ask: Ask) -> Table:
    """Euler's method on dx/dsigma = eps, https://arxiv.org/abs/2206.00364, algorithm 1 up to line 5; X is x / alpha."""
    times, sigmas = schedule.euler_sigmas(config, ask)
    rows = []
    for t, (sigma, to) in list(zip(times, pairwise(sigmas), strict=True))[ask.begin :]:
        alpha = 1 / sqrt(sigma**2 + 1)
        _, eps = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
        rows.append(row(t, X + (to - sigma) * eps, scale=alpha, level=(1.0, sigma)))
    return Table(tuple(rows), initial(config, sigmas))


def euler_ancestral(config: Config, ask: Ask) -> Table:
    """Euler's method to a lower sigma, and noise up again; DDPM's step in the terms of https://arxiv.org/abs/2206.00364."""
    times, sigmas = schedule.euler_sigmas(config, ask)
    rows = []
    for t, (sigma, to) in list(zip(times, pairwise(sigmas), strict=True))[ask.begin :]:
        alpha = 1 / sqrt(sigma**2 + 1)
        _, eps = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
        up = to * sqrt(sigma**2 - to**2) / sigma
        down = to**2 / sigma  # sqrt(to^2 - up^2)
        rows.append(row(t, X + (down - sigma) * eps + up * Z, scale=alpha, level=(1.0, sigma)))
    return Table(tuple(rows), initial(config, sigmas))


def initial(config: Config, sigmas: schedule.Floats) -> float:
    """The deviation of X at the start, as diffusers has it: with "leading" the signal's unit variance is added."""
    top = float(max(sigmas))
    return sqrt(top**2 + 1) if config["timestep_spacing"] == "leading" else top


CLASSES: Mapping[str, Sampler] = {
    "EulerDiscreteScheduler": Sampler(
        euler,
        {
            **COMMON,
            **SPACED_SIGMAS,
            "timestep_spacing": SIGMA_SPACING,
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": FINAL_SIGMA,
            "interpolation_type": OneOf("linear", ("linear", "log_linear")),
            "timestep_type": OneOf("discrete", ("discrete", "continuous")),
            "sigma_min": None,
            "sigma_max": None,
        },
        ("timesteps", "sigmas"),
    ),
    "EulerAncestralDiscreteScheduler": Sampler(
        euler_ancestral,
        {**COMMON, "timestep_spacing": SIGMA_SPACING, "rescale_betas_zero_snr": False},
        ("timesteps",),
    ),
}
