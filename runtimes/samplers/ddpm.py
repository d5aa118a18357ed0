"""DDPM and its kin: a step to a lower timestep with fresh noise, of a fixed or of a learned variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.ddim import bounds, noised
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import CLIPPING, COMMON, THRESHOLDING, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, M, Row, Table, X, Z, row

MINIMAL_VARIANCE = 1e-20  # below which diffusers' DDPM does not let the variance fall
LARGEST_BAR = 0.9999  # of Wuerstchen's alpha_bar; the smallest is 1 less that


def ddpm(config: Config, ask: Ask) -> Table:
    """DDPM between the timesteps of the config's spacing, or of the user's list."""
    bars, rows = schedule.alpha_bars(config), []
    for t, to in pairwise([*schedule.whole(config, ask).tolist()[ask.begin :], -1]):
        a, b = bars[t], bars[to] if to >= 0 else 1.0
        rows.append(_posterior(config, t, a, b, a / b, 1 - a / b))
    return Table(tuple(rows), 1.0)


def unclip(config: Config, ask: Ask) -> Table:
    """DDPM between evenly spaced timesteps, from the last to 0; a step of one timestep takes the beta of training."""
    config = {**config, "trained_betas": None, "beta_start": 0.0, "beta_end": 0.0, "timestep_spacing": "linspace"}
    bars, betas = schedule.alpha_bars(config), schedule.betas_of(config)
    # diffusers divides by 0 for one step.
    times = schedule.whole(config, ask).tolist() if ask.steps > 1 else [len(bars) - 1]
    rows = []
    for t, to in pairwise([*times[ask.begin :], -1]):
        a, b = bars[t], bars[to] if to >= 0 else 1.0
        alpha, beta = a / b, 1 - a / b
        if to == t - 1:
            alpha, beta = float(np.float32(1) - betas[t]), float(betas[t])
        rows.append(_posterior(config, t, a, b, alpha, beta))
    return Table(tuple(rows), 1.0)


def _posterior(config: Config, t: int, a: float, b: float, alpha: float, beta: float) -> Row:
    """A step of https://arxiv.org/abs/2006.11239, formulas 6 and 7; a and b are their alpha_bar_t and alpha_bar_t-1.

    "learned_range" is https://arxiv.org/abs/2102.09672, formula 15, with (V + 1) / 2 for its v.
    """
    x0, _ = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
    kept: dict[str, Any] = {"h": x0, "level": noised(a), **bounds(config)}
    x = sqrt(b) * beta / (1 - a) * H0 + sqrt(alpha) * (1 - b) / (1 - a) * X
    if t == 0:
        return row(t, x, **kept)
    smallest, kind = max((1 - b) / (1 - a) * beta, MINIMAL_VARIANCE), config["variance_type"]
    if kind == "learned":
        return row(t, x + Z, deviation=(0.0, 0.0, 0.5), **kept)
    if kind == "learned_range":
        low, high = math.log(smallest), math.log(beta)
        return row(t, x + Z, deviation=((high + low) / 4, (high - low) / 4, 0.0), **kept)
    variance = beta if kind in ("fixed_large", "fixed_large_log") else smallest
    return row(t, x + sqrt(variance) * Z, **kept)


def wuerstchen(config: Config, ask: Ask) -> Table:
    """DDPM, https://arxiv.org/abs/2006.11239, algorithm 2, in a continuous time from 1 to 0; the model predicts eps."""
    if ask.timesteps is None:
        times = schedule.linspace(1, 0, ask.steps + 1).astype(np.float64)
    else:
        times = np.append(np.asarray(ask.timesteps, np.float32).astype(np.float64), 0)
        if not (np.diff(times) < 0).all() or times[0] > 1:
            raise DexportError("the list of timesteps must fall from at most 1 and end above 0, the end of the last")
    rows: list[Row] = []
    levels = [_cosine(config, float(t)) for t in times]
    for t, (a, b) in list(zip(times, pairwise(levels), strict=False))[ask.begin :]:
        alpha = a / b
        x = (X - (1 - alpha) / sqrt(1 - a) * M) / sqrt(alpha)
        if len(rows) < len(times) - 2 - ask.begin:
            x = x + sqrt((1 - alpha) * (1 - b) / (1 - a)) * Z
        rows.append(row(t, x, level=noised(a)))
    return Table(tuple(rows), 1.0)


def _cosine(config: Config, t: float) -> float:
    """alpha_bar at t, https://arxiv.org/abs/2102.09672, formula 17, in a time that ``scaler`` bends."""
    scaler, s = config["scaler"], config["s"]
    t = 1 - (1 - t) ** scaler if scaler > 1 else t**scaler
    bar = (math.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2
    return min(max(bar, 1 - LARGEST_BAR), LARGEST_BAR)


DDPM: Mapping[str, Any] = {
    **COMMON,
    **CLIPPING,
    **THRESHOLDING,
    "beta_schedule": OneOf("linear", ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")),
    "rescale_betas_zero_snr": False,
    # In diffusers the logarithm of a variance is exponentiated but for fixed_large_log, whose noise is NaN there.
    "variance_type": OneOf(
        "fixed_small",
        ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    ),
}
CLASSES: Mapping[str, Sampler] = {
    "DDPMScheduler": Sampler(ddpm, DDPM, ("timesteps",)),
    "DDPMParallelScheduler": Sampler(ddpm, DDPM, ("timesteps",)),
    "UnCLIPScheduler": Sampler(
        unclip,
        {
            **CLIPPING,
            "num_train_timesteps": 1000,
            "variance_type": OneOf("fixed_small_log", ("fixed_small_log", "learned_range")),
            "prediction_type": OneOf("epsilon", ("epsilon", "sample")),
            "beta_schedule": OneOf("squaredcos_cap_v2", ("squaredcos_cap_v2",)),
        },
    ),
    "DDPMWuerstchenScheduler": Sampler(wuerstchen, {"scaler": 1.0, "s": 0.008}, ("timesteps",), counts_down=False),
}
