"""SA-Solver: stochastic Adams methods, a predictor and a corrector that share a step's noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.ddim import noised
from runtimes.samplers.deis import low_levels
from runtimes.samplers.dpm import lambda_, threshold
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import OneOf, Sampler
from runtimes.samplers.unipc import HISTORY, LEVELS
from runtimes.schedule import Ask, Config
from runtimes.table import Form, S, Table, X, Z, row

NOISY = (200, 800)  # the timesteps from and to which the default tau is 1, else 0
NO_SHIFT = ("use_dynamic_shifting", "time_shift_type")


def sa(config: Config, ask: Ask) -> Table:
    """SA-Solver, https://arxiv.org/abs/2309.05019, algorithm 1; H0 .. H3 are x_0 or eps, the latest first.

    Predictor and corrector take the step's start by the same factor and add the same noise: S keeps that sum.
    """
    _check(config)
    x0 = config["algorithm_type"] == "data_prediction"
    predictor, corrector = config["predictor_order"], config["corrector_order"]
    times, sigmas = low_levels(config, ask)
    ladder = [schedule.level(config, sigma) for sigma in sigmas]
    bars = schedule.alpha_bars(config)
    count, rows, tau, corrected = len(times), [], 0.0, 0  # tau and the corrector's order of the step before
    for index in range(ask.begin, count):
        behind = ladder[max(index - len(HISTORY), 0) : index + 1][::-1]  # alpha and sigma here, and at the steps before
        data, eps = predict(config["prediction_type"], *behind[0])
        x = X
        if index > ask.begin:
            x = _sum(S, _gradient(x0, tau, behind, corrected, True))
        tau, made, left = _tau(config, times[index]), index - ask.begin, count - index
        order = min(predictor, left if config["lower_order_final"] else predictor, made + 1)
        corrected = min(corrector, left + 1 if config["lower_order_final"] else corrector, made + 2)
        (alpha_to, sigma_to), (alpha, sigma) = ladder[index + 1], behind[0]
        h = lambda_(ladder[index + 1]) - lambda_(behind[0])
        if x0:
            shared = math.exp(-(tau**2) * h) * sigma_to / sigma * x
            deviation = sigma_to * math.sqrt(-math.expm1(-2 * tau**2 * h))
        else:
            shared, deviation = alpha_to / alpha * x, tau * sigma_to * math.sqrt(math.expm1(2 * h))
        shared = shared + deviation * Z
        following = _sum(shared, _gradient(x0, tau, [ladder[index + 1], *behind], order, False))
        bounds = threshold(config) if x0 else {}
        bounds |= {"h": data if x0 else eps, "s": shared, "shift": True, "level": noised(bars[int(times[index])])}
        rows.append(row(times[index], following, **bounds))
    return Table(tuple(rows), 1.0)


def _sum(form: Form, weights: Sequence[float]) -> Form:
    """``form`` and the outputs, the latest first, with their weights."""
    for weight, output in zip(weights, HISTORY, strict=False):
        form = form + weight * output
    return form


def _gradient(
    x0: bool, tau: float, levels: Sequence[tuple[float, float]], order: int, corrects: bool
) -> Sequence[float]:
    """The weights of the outputs, the latest first: formulas 14 and 17.

    levels: alpha and sigma at the step's end, its start, and before. The corrector interpolates through the end too.
    Of order 2 with x_0, the slope is taken as in DPM-Solver++: at half the step.
    """
    lambdas = [lambda_(level) for level in levels]
    (alpha_to, sigma_to), end = levels[0], lambdas[0]
    h, c = end - lambdas[1], 1 + tau**2
    nodes = [value - end for value in (lambdas[:order] if corrects else lambdas[1 : order + 1])]
    rate = c if x0 else -1.0
    powers = [-math.expm1(-rate * h) / rate]  # the integrals of v^k e^(rate v) from -h to 0, by parts
    for k in range(1, order):
        powers.append((-((-h) ** k) * math.exp(-rate * h) - k * powers[-1]) / rate)
    weights = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        polynomial = np.atleast_1d(np.poly(others))[::-1] / math.prod(node - other for other in others)
        weights.append(float(np.dot(polynomial, powers)))
    if x0 and order == 2:
        rest = (h * c + math.expm1(-c * h)) / c**2
        slope = h / 2 - rest / h if corrects else (h**2 / 2 - rest) / (nodes[0] - nodes[1])
        weights = [weights[0] + slope, weights[1] - slope]
    scale = c * alpha_to if x0 else -c * sigma_to
    return [scale * weight for weight in weights]


def _tau(config: Config, t: float) -> float:
    """How stochastic the step at ``t`` is: 0 follows the ODE, 1 the reverse SDE."""
    if config["tau"] is not None:
        return float(config["tau"])
    return 1.0 if NOISY[0] <= t <= NOISY[1] else 0.0


def _check(config: Config) -> None:
    for name, most in (("predictor_order", len(HISTORY)), ("corrector_order", len(HISTORY))):
        if not 1 <= config[name] <= most:
            raise DexportError(f"{name} must be 1 to {most} for SA-Solver here, not {config[name]}")
    if config["algorithm_type"] == "noise_prediction":
        for what in ("thresholding", "use_flow_sigmas"):
            if config[what]:
                raise DexportError(f"SA-Solver with noise_prediction knows no {what}; take data_prediction")
    if config["tau"] is not None and not (isinstance(config["tau"], int | float) and 0 <= config["tau"] <= 1):
        raise DexportError(f"tau must be a number from 0 to 1, not {config['tau']!r:.60}")


CLASSES: Mapping[str, Sampler] = {
    "SASolverScheduler": Sampler(
        sa,
        {
            **{name: option for name, option in LEVELS.items() if name not in NO_SHIFT},
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": OneOf(None, (None,)),  # a function of Python's, which no config can hold
            "tau": None,  # ours, not diffusers': one number in its place
            "algorithm_type": OneOf("data_prediction", ("data_prediction", "noise_prediction")),
            "lower_order_final": True,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,  # a learned one is left out, as the model's further outputs are
        },
    ),
}
