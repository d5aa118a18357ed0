"""DEIS: an exponential integrator whose past outputs are interpolated over log rho, rho the ratio sigma / alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.dpm import threshold
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import OneOf, Sampler
from runtimes.samplers.unipc import LEVELS, levels
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, H1, H2, Form, S, Table, X, row

FEW_STEPS = 15  # below which diffusers takes lower_order_final to heart
ORDERS = (1, 2, 3)


def deis(config: Config, ask: Ask) -> Table:
    """DEIS, https://arxiv.org/abs/2204.13902, formulas 13 to 15, as tAB over log rho: H0 .. H2 are eps."""
    if config["solver_order"] not in ORDERS:
        raise DexportError(f"solver_order must be 1 to 3 for DEIS, not {config['solver_order']}")
    if config["thresholding"] and config["solver_order"] > 2:
        raise DexportError("DEIS with thresholding keeps one past output here: take solver_order=2")
    times, sigmas = low_levels(config, ask)
    count, rows = len(times), []
    for index in range(ask.begin, count):
        (alpha, sigma), (alpha_to, sigma_to) = (schedule.level(config, sigmas[index + i]) for i in (0, 1))
        data, eps = predict(config["prediction_type"], alpha, sigma)
        past: list[Form] = [H0, H1, H2]
        kept: dict[str, Any] = {"h": eps, "shift": True}
        if config["thresholding"]:  # of x_0: then eps is made of what is left, and the one before kept in S
            now = (X - alpha * H0) / sigma
            past, kept = [now, S], {"h": data, "s": now, **threshold(config)}
        final = config["lower_order_final"] and count < FEW_STEPS
        order = min(config["solver_order"], index - ask.begin + 1, count - index if final else 3)
        rhos = [schedule.level(config, sigmas[index - j]) for j in range(order)]
        weights = _weights([s / a for a, s in rhos], sigma_to / alpha_to)
        x = alpha_to / alpha * X
        for weight, form in zip(weights, past, strict=False):
            x = x + alpha_to * weight * form
        rows.append(row(times[index], x, level=(alpha, sigma), **kept))
    return Table(tuple(rows), 1.0)


def _weights(nodes: Sequence[float], to: float) -> Sequence[float]:
    """The integrals over rho, from nodes[0] to ``to``, of the Lagrange polynomials in log rho through ``nodes``."""
    logs = [math.log(node / nodes[0]) for node in nodes]
    end = math.log(to / nodes[0])
    # Of v^k e^v from 0 to end, by parts.
    powers = [math.expm1(end)]
    for k in range(1, len(nodes)):
        powers.append(end**k * math.exp(end) - k * powers[-1])
    weights = []
    for j, node in enumerate(logs):
        others = [other for i, other in enumerate(logs) if i != j]
        polynomial = np.atleast_1d(np.poly(others))[::-1] / math.prod(node - other for other in others)
        weights.append(nodes[0] * float(np.dot(polynomial, powers)))
    return weights


def low_levels(config: Config, ask: Ask) -> tuple[Floats, Floats]:
    """As UniPC's; but the last sigma is the lowest that the model knows, and the ends of a flow are left out."""
    config = {**config, "final_sigmas_type": "sigma_min"}
    if not config["use_flow_sigmas"]:
        return levels(config, ask)
    if schedule.respace(config, np.ones(2), ask) is not None:
        raise DexportError("spaced sigmas and use_flow_sigmas exclude each other here; set one of them")
    total = config["num_train_timesteps"]
    sigmas = 1 - np.linspace(1, 1 / total, ask.steps + 1)
    sigmas = schedule.shifted(sigmas, schedule.flow_shift(config, ask))[:0:-1]
    return np.trunc(sigmas * total), schedule.rounded(np.append(sigmas, sigmas[-1]))


CLASSES: Mapping[str, Sampler] = {
    "DEISMultistepScheduler": Sampler(
        deis,
        {
            **LEVELS,
            "solver_order": 2,
            # diffusers takes the names of other schedulers' forms for its own.
            "algorithm_type": OneOf("deis", ("deis", "dpmsolver", "dpmsolver++")),
            "solver_type": OneOf("logrho", ("logrho", "midpoint", "heun", "bh1", "bh2")),
            "lower_order_final": True,
        },
        ("mu",),
    ),
}
