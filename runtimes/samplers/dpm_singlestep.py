"""DPM-Solver within groups of steps: each group starts anew, and raises the order from its start to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.dpm import (
    LEVELS,
    OF_DATA,
    SHIFTING,
    SOLVER_TYPE,
    Level,
    check,
    ends,
    integral,
    lambda_,
    phi,
    third,
    threshold,
)
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import FINAL_SIGMA, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, H1, H2, Form, S, Table, X, Z, row


def singlestep(config: Config, ask: Ask) -> Table:
    """DPM-Solver-2 and -3, https://arxiv.org/abs/2206.00927, algorithms 1 and 2; DPM-Solver++ likewise, also as SDE.

    Their inner points are the timesteps themselves, so that every row is a step with one call. S keeps the start of the
    group, and H0 .. H2 are x_0 or eps, the latest first.
    """
    ends(config)
    check(config)
    of_data = config["algorithm_type"] in OF_DATA
    if config["thresholding"] and not of_data:
        raise DexportError(
            "DPMSolverSinglestepScheduler with algorithm_type='dpmsolver' has no thresholding (diffusers fails there); "
            "take dpmsolver++"
        )
    # Karras' timesteps are rounded with every schedule here; so the betas come as a list.
    betas = schedule.betas_of(config).tolist()
    fixed = {"trained_betas": betas, "beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 0}
    times, sigmas = schedule.dpm_sigmas({**config, **fixed}, ask)
    levels = [schedule.level(config, float(sigma)) for sigma in sigmas]
    rows = []
    for index, order in list(enumerate(_orders(config, len(times))))[ask.begin :]:
        order = min(order, index - ask.begin + 1)
        x0, eps = predict(config["prediction_type"], *levels[index])
        start = X if order == 1 else S
        x = _advance(config, levels[index - order + 1 : index + 2], start)
        kept: dict[str, Any] = {"h": x0 if of_data else eps, "s": start, "shift": True, **threshold(config)}
        rows.append(row(times[index], x, level=levels[index], **kept))
    return Table(tuple(rows), 1.0)


def _orders(config: Config, steps: int) -> Sequence[int]:
    """The order of each step: 1, 2, 3 in every whole group; lower at the end where the config, or sigma = 0, asks."""
    highest = config["solver_order"]
    orders = [1 + index % highest for index in range(steps)]
    if config["final_sigmas_type"] == "zero" or (config["lower_order_final"] and steps % highest == 0):
        orders[-1] = 1
    return orders


def _advance(config: Config, levels: Sequence[Level], start: Form) -> Form:
    """The sample at the last of ``levels``, from that at the first; at all between them the model has been called."""
    base, noise, z, scale = integral(config, levels[0], levels[-1])
    zero, *inner = [lambda_(level) for level in levels[:-1]]
    outputs = [H0, H1, H2][len(inner) :: -1]  # from the start of the group on
    x = base * start + noise * Z - scale * phi(1, z) * outputs[0]
    if not inner:
        return x
    h = lambda_(levels[-1]) - zero
    ratios = [(value - zero) / h for value in inner]
    slopes = [(output - outputs[0]) / ratio for output, ratio in zip(outputs[1:], ratios, strict=True)]
    if len(inner) == 1:
        return x - scale * (phi(2, z) if config["solver_type"] == "heun" else phi(1, z) / 2) * slopes[0]
    if config["solver_type"] != "heun":
        return x - scale * phi(2, z) * slopes[1]
    (r1, r2), (d1_1, d1_2) = ratios, slopes
    d1, d2 = (r2 * d1_1 - r1 * d1_2) / (r2 - r1), 2 * (d1_2 - d1_1) / (r2 - r1)
    return x - scale * phi(2, z) * d1 - scale * third(config, z) * d2


SINGLESTEP: Mapping[str, Any] = {
    **{name: option for name, option in LEVELS.items() if name not in ("timestep_spacing", "steps_offset")},
    **SHIFTING,
    "solver_order": OneOf(2, (1, 2, 3)),
    # diffusers takes the name of another scheduler's form for dpmsolver++.
    "algorithm_type": OneOf("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis")),
    "solver_type": SOLVER_TYPE,
    "lower_order_final": False,
    "final_sigmas_type": FINAL_SIGMA,
}
CLASSES: Mapping[str, Sampler] = {
    "DPMSolverSinglestepScheduler": Sampler(singlestep, SINGLESTEP, ("timesteps", "mu")),
}
