"""DDIM and DDPM: steps between two timesteps of a noise schedule, in the terms of alpha_bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import CLIPPING, COMMON, THRESHOLDING, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, Form, Row, Table, X, Z, row

MINIMAL_VARIANCE = 1e-20  # below which diffusers' DDPM does not let the variance fall


def _x0(config: Config, form: Form) -> dict[str, Any]:
    """H0 as x_0, held within bounds as the config says."""
    if config["thresholding"]:
        return {"h": form, "clip": config["sample_max_value"], "threshold": config["dynamic_thresholding_ratio"]}
    return {"h": form, "clip": float(config["clip_sample_range"]) if config["clip_sample"] else math.inf}


def ddim(config: Config, ask: Ask) -> Table:
    """DDIM, https://arxiv.org/abs/2010.02502, formulas 12 and 16; a and b are their alpha_t and alpha_t-1."""
    bars, eta = schedule.alpha_bars(config), config["eta"]
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    rows = []
    for t, to in schedule.leaps(config, ask)[ask.begin :]:
        a, b = bars[t], bars[to] if to >= 0 else final_bar(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        sigma = eta * sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = sqrt(b) * H0 + sqrt(max(1 - b - sigma**2, 0.0)) * eps + sigma * Z
        rows.append(row(t, x, **_x0(config, x0)))
    return Table(tuple(rows), 1.0, noised(bars, rows))


def final_bar(config: Config, bars: schedule.Floats) -> float:
    """alpha_bar past the last timestep."""
    return 1.0 if config["set_alpha_to_one"] else float(bars[0])


def ddpm(config: Config, ask: Ask) -> Table:
    """DDPM, https://arxiv.org/abs/2006.11239, formulas 6 and 7; a and b are their alpha_bar_t and alpha_bar_t-1."""
    bars, rows = schedule.alpha_bars(config), []
    times = schedule.whole(config, ask).tolist()[ask.begin :]
    for t, to in pairwise([*times, -1]):
        a, b = bars[t], bars[to] if to >= 0 else 1.0
        x0, _ = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        alpha, beta = a / b, 1 - a / b
        variance = beta if config["variance_type"] == "fixed_large" else max((1 - b) / (1 - a) * beta, MINIMAL_VARIANCE)
        x = sqrt(b) * beta / (1 - a) * H0 + sqrt(alpha) * (1 - b) / (1 - a) * X
        if t > 0:
            x = x + sqrt(variance) * Z
        rows.append(row(t, x, **_x0(config, x0)))
    return Table(tuple(rows), 1.0, noised(bars, rows))


def noised(bars: schedule.Floats, rows: Sequence[Row]) -> tuple[float, float]:
    """The factors of image and noise in x_t at the first row's t."""
    a = bars[int(rows[0].t)]
    return sqrt(a), sqrt(1 - a)


CLASSES: Mapping[str, Sampler] = {
    "DDIMScheduler": Sampler(
        ddim,
        {
            **COMMON,
            **CLIPPING,
            **THRESHOLDING,
            "set_alpha_to_one": True,
            "rescale_betas_zero_snr": False,
            "eta": 0.0,
        },
        ("timesteps",),
    ),
    "DDPMScheduler": Sampler(
        ddpm,
        {
            **COMMON,
            **CLIPPING,
            **THRESHOLDING,
            "rescale_betas_zero_snr": False,
            # fixed_small_log is fixed_small computed in another way; learned variances need a further output.
            "variance_type": OneOf("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large")),
        },
        ("timesteps",),
    ),
}
