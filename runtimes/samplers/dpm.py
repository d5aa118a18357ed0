"""DPM-Solver and its kin: exponential integrators in lambda = log(alpha / sigma), over the outputs of several steps.

x_0 (of DPM-Solver++) or eps (of DPM-Solver) is a polynomial in lambda; what it adds to the sample over a step is a sum
of its coefficients, weighted by the functions phi_k of exponential integrators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import (
    COMMON,
    FINAL_SIGMA,
    SIGMA_SPACING,
    SPACED_SIGMAS,
    THRESHOLDING,
    OneOf,
    Sampler,
)  # fmt: skip
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, H1, H2, Form, Row, S, Table, X, Z, row

FEW_STEPS = 15  # below which diffusers' DPM-Solver takes lower_order_final to heart
OF_DATA = ("dpmsolver++", "sde-dpmsolver++", "deis")  # which integrate x_0, the others eps
Level = tuple[float, float]  # alpha and sigma


def multistep(config: Config, ask: Ask) -> Table:
    """DPM-Solver and DPM-Solver++ over past steps, also as SDEs, of orders 1 to 3: see ``follow``."""
    ends(config)
    check(config)
    times, sigmas = schedule.dpm_sigmas(config, ask)
    levels = [schedule.level(config, float(sigma)) for sigma in sigmas]
    return Table(follow(config, times, levels, ask), 1.0)


def inverse(config: Config, ask: Ask) -> Table:
    """The same steps from an image to noise, as DDIM's inverse: https://arxiv.org/abs/2105.05233, appendix F."""
    if config["algorithm_type"].startswith("sde-"):
        raise DexportError(
            f"DPMSolverMultistepInverseScheduler with algorithm_type={config['algorithm_type']!r} has no steps: the "
            "variance of its noise is below 0 on the way to noise; take dpmsolver++"
        )
    if config["use_flow_sigmas"] or config["prediction_type"] == "flow_prediction":
        raise DexportError(
            "DPMSolverMultistepInverseScheduler has no way to noise for a flow (use_flow_sigmas, flow_prediction): "
            "its sigmas fall, in diffusers too; take it with a diffusion model only"
        )
    check(config)
    times, sigmas = _rising(config, ask)
    levels = [schedule.level(config, float(sigma)) for sigma in sigmas]
    return Table(follow(config, times, levels, ask), 1.0)


def ends(config: Config) -> None:
    """Raise DexportError where the solver has no step to the last sigma."""
    if config["algorithm_type"] not in ("dpmsolver++", "sde-dpmsolver++") and config["final_sigmas_type"] == "zero":
        raise DexportError(
            f"algorithm_type={config['algorithm_type']!r} has no step to sigma = 0; "
            "set final_sigmas_type to 'sigma_min', or take dpmsolver++"
        )


def check(config: Config) -> None:
    """Raise DexportError for options that give no steps together."""
    spaced = next((option for option in schedule.RESPACINGS if config.get(option)), None)
    if spaced and config["use_flow_sigmas"]:
        raise DexportError(f"{spaced} and use_flow_sigmas exclude each other here: sigma would pass 1; set one of them")
    if config["prediction_type"] == "flow_prediction":
        if not config["use_flow_sigmas"]:
            raise DexportError("prediction_type='flow_prediction' needs use_flow_sigmas=True; set it in the config")
        if config["algorithm_type"] not in OF_DATA:
            raise DexportError(
                f"algorithm_type={config['algorithm_type']!r} knows no flow_prediction; take dpmsolver++ for it"
            )
    if config["algorithm_type"] == "sde-dpmsolver" and config["solver_order"] > 2:
        raise DexportError("algorithm_type='sde-dpmsolver' has no third order; take solver_order=2")


def follow(config: Config, times: Floats, levels: Sequence[Level], ask: Ask) -> tuple[Row, ...]:
    """The steps from one level of noise to the next; H0 .. H2 are x_0 or eps of this step and of those before."""
    of_data, kind = config["algorithm_type"] in OF_DATA, config["prediction_type"]
    bounds = threshold(config)
    if bounds and not of_data and config["solver_order"] > 2:
        raise DexportError(
            "DPM-Solver with thresholding keeps one past eps here: take solver_order=2, or algorithm_type='dpmsolver++'"
        )
    rows = []
    for index in range(ask.begin, len(times)):
        alpha, sigma = levels[index]
        x0, eps = predict(kind, alpha, sigma)
        past: list[Form] = [H0, H1, H2]
        kept: dict[str, Any] = {"h": x0 if of_data else eps, "shift": True}
        if bounds and of_data:
            kept |= bounds
        elif bounds:  # of x_0: then eps is made of what is left, and the one before kept in S
            now = (X - alpha * H0) / sigma
            past, kept = [now, S], {"h": x0, "s": now, **bounds}
        x = advance(config, levels, index, order(config, times, index, ask), past)
        rows.append(row(times[index], x, level=levels[index], **kept))
    return tuple(rows)


def order(config: Config, times: Floats, index: int, ask: Ask) -> int:
    """Of the step ``index``: lower while the history is short, and at the end as the config says."""
    left, few = len(times) - index, config["lower_order_final"] and len(times) < FEW_STEPS
    if left == 1 and (few or config["euler_at_final"] or config.get("final_sigmas_type") == "zero"):
        return 1
    highest: int = config["solver_order"]
    return min(highest, index - ask.begin + 1, 2 if left == 2 and few else 3)


def advance(config: Config, levels: Sequence[Level], index: int, order: int, past: Sequence[Form]) -> Form:
    """The sample after a step: https://arxiv.org/abs/2211.01095, algorithm 2 and appendix B, with divided differences.

    D1 and D2 are h and h^2 times the first derivative and the second divided difference of the outputs at lambda.
    """
    here, to = levels[index : index + 2]
    h = lambda_(to) - lambda_(here)
    before = [lambda_(levels[index - k]) for k in range(order)]
    base, noise, z, scale = integral(config, here, to)
    x = base * X + noise * Z - scale * phi(1, z) * past[0]
    if order == 1:
        return x
    slope = h / (before[0] - before[1]) * (past[0] - past[1])
    if order == 2:
        return x - scale * (phi(2, z) if config["solver_type"] == "heun" else phi(1, z) / 2) * slope
    slope_before = h / (before[1] - before[2]) * (past[1] - past[2])
    # As in diffusers; with all of the second difference, twice D2, the step would be of the third order.
    share = 1 / (before[0] - before[2]) * (slope - slope_before)
    d1, d2 = slope + (before[0] - before[1]) * share, h * share
    return x - scale * phi(2, z) * d1 - scale * third(config, z) * d2


def integral(config: Config, here: Level, to: Level) -> tuple[float, float, float, float]:
    """Of the exact solution from one level to another: the factors of sample and noise, z of the phis, and their scale.

    Of eps: https://arxiv.org/abs/2206.00927, formula 3.4; of x_0: https://arxiv.org/abs/2211.01095, formula 8; of the
    SDEs: its appendix B.
    """
    (alpha, sigma), (alpha_to, sigma_to) = here, to
    h = lambda_(to) - lambda_(here)
    if config["algorithm_type"] == "dpmsolver":
        return alpha_to / alpha, 0.0, h, sigma_to
    if config["algorithm_type"].startswith("sde-") and h < 0:
        raise DexportError(
            f"algorithm_type={config['algorithm_type']!r} has no step up in noise, and sigma_min is above the "
            "last sigmas of these steps; take dpmsolver++, or sde-dpmsolver++ and set final_sigmas_type to 'zero'"
        )
    if config["algorithm_type"] == "sde-dpmsolver":
        return alpha_to / alpha, sigma_to * math.sqrt(math.expm1(2 * h)), h, 2 * sigma_to
    if config["algorithm_type"] == "sde-dpmsolver++":
        noise = sigma_to * math.sqrt(-math.expm1(-2 * h))
        return sigma_to / sigma * math.exp(-h), noise, -2 * h, alpha_to
    return sigma_to / sigma, 0.0, -h, alpha_to


def third(config: Config, z: float) -> float:
    """The weight of D2: z phi_3(z), and with sde-dpmsolver++ 1 more, as in diffusers.

    The sign of one half is turned there, so that the step is of the first order only.
    """
    return phi(3, z) + (1 if config["algorithm_type"] == "sde-dpmsolver++" else 0)


def phi(k: int, z: float) -> float:
    """z phi_k(z), https://arxiv.org/abs/2206.00927, appendix B: sum over n from 0 of z^(n + 1) / (n + k)!."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + k - 1) for n in range(1, 22))
    return math.expm1(z) if k == 1 else phi(k - 1, z) / z - 1 / math.factorial(k - 1)


def lambda_(level: Level) -> float:
    """Half the log of signal to noise; infinite without noise."""
    alpha, sigma = level
    return math.log(alpha) - math.log(sigma) if sigma else math.inf


def threshold(config: Config) -> dict[str, Any]:
    """How far x_0 may go, as the config says."""
    if not config["thresholding"]:
        return {}
    return {"clip": config["sample_max_value"], "threshold": config["dynamic_thresholding_ratio"]}


def _rising(config: Config, ask: Ask) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1] of the inverse, which ends at the noisiest timestep, or repeats its end.

    Spaced timesteps may repeat; each still goes with its sigma.
    """
    table, total = schedule.sigma_table(config), config["num_train_timesteps"]
    respaced = schedule.respace(config, table, ask)
    if respaced is not None:
        times = schedule.times_of(respaced, table)
        times = np.trunc(times.round() if config["use_karras_sigmas"] else times)
        return times, schedule.rounded(np.append(respaced, respaced[-1]))
    last, points = int(np.count_nonzero(-np.log(table) >= config["lambda_min_clipped"])), ask.steps + 1
    if config["timestep_spacing"] == "linspace":
        times = np.linspace(0, last - 1, points).round()[:-1]
    elif config["timestep_spacing"] == "leading":
        times = np.arange(points, dtype=np.float64)[:-1] * (last // points) + config["steps_offset"]
    else:
        times = np.arange(last, 0, -total / ask.steps)[: ask.steps].round()[::-1] - 1
    if ask.steps > total or not ((times >= 0) & (times < total)).all() or (np.diff(times) <= 0).any():
        raise DexportError(f"{ask.steps} steps are too many for {total} timesteps; take fewer")
    return times, schedule.rounded(np.append(np.interp(times, np.arange(total), table), table[last - 1]))


LEVELS: Mapping[str, Any] = {
    **COMMON,
    **SPACED_SIGMAS,
    **THRESHOLDING,
    "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction", "sample", "flow_prediction")),
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "lambda_min_clipped": -math.inf,
    # DDPM's fixed variances may carry over, and mean nothing here; a learned one is left out of the model's output.
    "variance_type": OneOf(
        None,
        (None, "learned", "learned_range", "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    ),
}
"""The options of the levels of noise that all of DPM-Solver's classes but the EDM's have."""

SHIFTING: Mapping[str, Any] = {
    "use_dynamic_shifting": False,
    "time_shift_type": OneOf("exponential", ("exponential",)),
}
# diffusers takes the names of other schedulers' forms for dpmsolver++ and midpoint.
ALGORITHM = OneOf("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"))
SOLVER_TYPE = OneOf("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2"))
MULTISTEP: Mapping[str, Any] = {
    **LEVELS,
    "timestep_spacing": SIGMA_SPACING,
    "solver_order": OneOf(2, (1, 2, 3)),
    "algorithm_type": ALGORITHM,
    "solver_type": SOLVER_TYPE,
    "lower_order_final": True,
    "euler_at_final": False,
}
CLASSES: Mapping[str, Sampler] = {
    "DPMSolverMultistepScheduler": Sampler(
        multistep,
        {
            **MULTISTEP,
            **SHIFTING,
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": FINAL_SIGMA,
            "use_lu_lambdas": False,
        },
        ("timesteps", "mu"),
    ),
    "DPMSolverMultistepInverseScheduler": Sampler(inverse, MULTISTEP, counts_down=False),
}
