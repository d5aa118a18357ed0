"""Linear multistep methods: the slopes of past steps make a polynomial, which is integrated over the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import sqrt

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.euler import initial
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, SIGMA_SPACING, SPACED_SIGMAS, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, H1, H2, H3, Form, Table, X, row

HISTORY = (H0, H1, H2, H3)
ALMOST_ZERO = 1e-8  # by which diffusers' iPNDM divides where alpha is 0


def lms(config: Config, ask: Ask) -> Table:
    """Adams-Bashforth of order 4 on dx/dsigma = eps with steps of any length; H0 .. H3 are eps, X is x / alpha."""
    times, sigmas = schedule.euler_sigmas(config, ask)
    rows = []
    for index in range(ask.begin, len(times)):
        sigma = sigmas[index]
        alpha = 1 / sqrt(sigma**2 + 1)
        _, eps = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
        order = min(index - ask.begin + 1, len(HISTORY))
        nodes = sigmas[index - np.arange(order)]
        x = X
        for j, output in zip(range(order), HISTORY, strict=False):
            others = np.delete(nodes, j) - sigma
            # The Lagrange polynomial that is 1 at this node and 0 at the others, around the step's start.
            polynomial = np.poly1d(others, r=True) / float(np.prod(nodes[j] - sigma - others))
            x = x + float(np.polyval(np.polyint(polynomial), sigmas[index + 1] - sigma)) * output
        rows.append(row(times[index], x, scale=alpha, h=eps, shift=True, level=(1.0, sigma)))
    return Table(tuple(rows), initial(config, sigmas))


def ipndm(config: Config, ask: Ask) -> Table:
    """Improved PNDM, https://arxiv.org/abs/2202.09778: PLMS from its first step on, of a model that predicts v."""
    levels = _levels(config, ask.steps)
    blends: list[Form] = [
        H0,
        (3 * H0 - H1) / 2,
        (23 * H0 - 16 * H1 + 5 * H2) / 12,
        (55 * H0 - 59 * H1 + 37 * H2 - 9 * H3) / 24,
    ]
    rows = []
    for index in range(ask.begin, ask.steps):
        (alpha, sigma), (alpha_to, sigma_to) = levels[index], levels[index + 1]
        _, eps = predict("v_prediction", alpha, sigma)
        blend = blends[min(index - ask.begin, 3)]
        x = alpha_to / max(alpha, ALMOST_ZERO) * (X - sigma * blend) + sigma_to * blend
        rows.append(row(math.atan2(sigma, alpha) / math.pi * 2, x, h=eps, shift=True, level=levels[index]))
    return Table(tuple(rows), 1.0)


def _levels(config: Config, steps: int) -> list[tuple[float, float]]:
    """alpha and sigma at each step and at the end: sigma falls as the square of a sine, or is what the config lists."""
    if config["trained_betas"] is None:
        sigmas = np.sin(np.append(np.linspace(1, 0, steps + 1)[:-1], 0.0) * math.pi / 2) ** 2
    elif len(config["trained_betas"]) != steps + 1:
        count = len(config["trained_betas"]) - 1
        raise DexportError(f"iPNDM's trained_betas fix the steps at {count}, not {steps}; ask for {count}")
    else:
        sigmas = np.asarray(config["trained_betas"], np.float64)
    return [(sqrt(1 - sigma**2), sigma) for sigma in schedule.rounded(sigmas).tolist()]


CLASSES: Mapping[str, Sampler] = {
    "LMSDiscreteScheduler": Sampler(lms, {**COMMON, **SPACED_SIGMAS, "timestep_spacing": SIGMA_SPACING}),
    "IPNDMScheduler": Sampler(ipndm, {"num_train_timesteps": 1000, "trained_betas": None}, counts_down=False),
}
