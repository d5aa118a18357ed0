"""UniPC: a predictor and a corrector of one form, and the noise levels that it shares with DEIS and SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.dpm import lambda_, phi, threshold
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
from runtimes.table import H0, H1, H2, H3, Form, S, Table, X, row

HISTORY = (H0, H1, H2, H3)
ALMOST_ONE = 1e-6  # a flow that starts this near to pure noise starts this far from it: its lambda must be finite
LARGEST_ORDER = len(HISTORY) - 1  # the corrector needs one output more than its order
LEVELS: Mapping[str, Any] = {
    **COMMON,
    **SPACED_SIGMAS,
    **THRESHOLDING,
    "timestep_spacing": SIGMA_SPACING,
    "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction", "sample", "flow_prediction")),
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": OneOf("exponential", ("exponential",)),
}
"""The options of schedules that may be a rectified flow's."""


def unipc(config: Config, ask: Ask) -> Table:
    """UniPC, https://arxiv.org/abs/2302.04867, algorithms 5 to 8: UniC at the sample just predicted, then UniP.

    H0 .. H3 are x_0 or eps, the latest first, and S the corrected sample of the step before. So one row does both:
    its model call corrects the sample, and from there predicts the next one.
    """
    order, x0 = config["solver_order"], config["predict_x0"]
    if not 1 <= order <= LARGEST_ORDER:
        raise DexportError(f"solver_order must be 1 to {LARGEST_ORDER} for UniPC here, not {order}")
    if not x0 and config["prediction_type"] == "flow_prediction":
        raise DexportError("UniPC with predict_x0=False knows no flow_prediction; leave predict_x0 out")
    uncorrected = _steps(config["disable_corrector"])
    times, sigmas = levels(config, ask)
    count, rows, used = len(times), [], 0
    for index in range(ask.begin, count):
        alpha, sigma = schedule.level(config, sigmas[index])
        data, eps = predict(config["prediction_type"], alpha, sigma)
        x = X
        if index > ask.begin and index - 1 not in uncorrected:
            x = _advance(config, sigmas, index - 1, S, H1, [H2, H3][: used - 1], H0)
        left = count - index if config["lower_order_final"] else order
        used = min(order, left, index - ask.begin + 1)
        following = _advance(config, sigmas, index, x, H0, [H1, H2][: used - 1], None)
        bounds = threshold(config) if x0 else {}
        bounds |= {"h": data if x0 else eps, "s": x, "shift": True, "level": (alpha, sigma)}
        rows.append(row(times[index], following, **bounds))
    return Table(tuple(rows), 1.0)


def _advance(
    config: Config, sigmas: Floats, index: int, x: Form, m: Form, past: Sequence[Form], at_end: Form | None
) -> Form:
    """The step from sigmas[index] to the next: of UniP, or of UniC where the output at its end is known.

    x, m: sample and output where it starts; past: outputs before that one. In terms of h, the step of lambda.
    """
    start, end = (schedule.level(config, sigmas[index + i]) for i in (0, 1))
    (alpha, sigma), (alpha_to, sigma_to) = start, end
    here = lambda_(start)
    h = lambda_(end) - here
    hh = -h if config["predict_x0"] else h
    if config["predict_x0"]:
        base, scale = sigma_to / sigma * x - alpha_to * math.expm1(hh) * m, alpha_to
    else:
        base, scale = alpha_to / alpha * x - sigma_to * math.expm1(hh) * m, sigma_to
    before = [lambda_(schedule.level(config, sigmas[index - i])) for i in range(1, len(past) + 1)]
    ratios = [(value - here) / h for value in before]
    slopes = [(form - m) / ratio for form, ratio in zip(past, ratios, strict=True)]
    if at_end is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, at_end - m]
    if not slopes:
        return base
    b_h = hh if config["solver_type"] == "bh1" else math.expm1(hh)
    for weight, slope in zip(_weights(hh, b_h, ratios), slopes, strict=True):
        base = base - scale * b_h * weight * slope
    return base


def _weights(hh: float, b_h: float, ratios: Sequence[float]) -> Sequence[float]:
    """The a_m of https://arxiv.org/abs/2302.04867, formula 5; for one ratio 1/2 is enough (section 3.4)."""
    if len(ratios) == 1:
        return [0.5]
    wanted = [phi(k + 1, hh) * math.factorial(k) / b_h for k in range(1, len(ratios) + 1)]
    solved: Sequence[float] = np.linalg.solve(np.vander(ratios, increasing=True).T, wanted).tolist()
    return solved


def levels(config: Config, ask: Ask) -> tuple[Floats, Floats]:
    """Return timesteps [n], whole ones, and sigmas [n + 1].

    With ``use_flow_sigmas`` sigma is the share of noise in x = (1 - sigma) x_0 + sigma eps, else the ratio of noise to
    signal. Where the sigmas are spaced by themselves, ``final_sigmas_type`` "sigma_min" stands for the last of them.
    """
    table, total = schedule.sigma_table(config), config["num_train_timesteps"]
    flow = config["use_flow_sigmas"]
    if config["prediction_type"] == "flow_prediction" and not flow:
        raise DexportError("prediction_type='flow_prediction' needs use_flow_sigmas=True; set it in the config")
    if ask.sigmas is not None and not flow:
        raise DexportError("own sigmas need use_flow_sigmas=True here; leave them out")
    sigmas = schedule.respace(config, table[::-1], ask)
    if sigmas is not None and flow:
        if not config["use_karras_sigmas"]:
            raise DexportError("of spaced sigmas only use_karras_sigmas goes with use_flow_sigmas; set one of them")
        sigmas = sigmas / (sigmas + 1)
        times = sigmas * total
    elif sigmas is not None:
        times = schedule.times_of(sigmas, table)
        times = times.round() if config["use_karras_sigmas"] else times
    elif flow:
        sigmas = _flow(config, ask)
        times = sigmas * total
    else:
        last = int(np.count_nonzero(-np.log(table) >= config.get("lambda_min_clipped", -math.inf)))
        times = schedule.spaced(config, ask.steps, points=ask.steps + 1, last=last).round()
        sigmas = np.interp(times, np.arange(total), table)
        return times, schedule.rounded(np.append(sigmas, table[0] if ends_low(config) else 0.0))
    return np.trunc(times), schedule.rounded(np.append(sigmas, sigmas[-1] if ends_low(config) else 0.0))


def ends_low(config: Config) -> bool:
    """Whether the last sigma is the lowest that the model knows, rather than 0."""
    return bool(config["final_sigmas_type"] == "sigma_min")


def _flow(config: Config, ask: Ask) -> Floats:
    total = config["num_train_timesteps"]
    spread = np.linspace(1, 1 / total, ask.steps + 1) if ask.sigmas is None else schedule.falling(ask.sigmas)
    if config["use_dynamic_shifting"] and ask.mu is None:
        raise DexportError("use_dynamic_shifting=True needs mu, the shift by resolution; give one or switch it off")
    sigmas = schedule.shifted(spread[:-1], schedule.flow_shift(config, ask))
    if config["shift_terminal"] and sigmas[-1] < 1:  # a single step from pure noise has no end to stretch to
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - config["shift_terminal"]))
    if abs(sigmas[0] - 1) < ALMOST_ONE:
        sigmas[0] -= ALMOST_ONE
    return sigmas


def _steps(value: Any) -> set[int]:
    if not isinstance(value, list | tuple) or not all(type(step) is int for step in value):
        raise DexportError(f"disable_corrector={value!r:.60} must be a list of steps")
    return set(value)


CLASSES: Mapping[str, Sampler] = {
    "UniPCMultistepScheduler": Sampler(
        unipc,
        {
            **LEVELS,
            "solver_order": 2,
            "predict_x0": True,
            # diffusers takes the names of other schedulers' forms for bh2.
            "solver_type": OneOf("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
            "lower_order_final": True,
            "disable_corrector": [],
            "solver_p": OneOf(None, (None,)),
            "final_sigmas_type": FINAL_SIGMA,
            "rescale_betas_zero_snr": False,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
        ("sigmas", "mu"),
    ),
}
