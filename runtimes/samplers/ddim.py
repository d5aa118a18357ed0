"""DDIM, forwards and inverted, and CogVideoX's samplers: steps between two timesteps, in the terms of alpha_bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import sqrt
from typing import Any

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import CLIPPING, COMMON, THRESHOLDING, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, H1, Form, Table, X, Z, row


def bounds(config: Config) -> dict[str, Any]:
    """How far x_0 may go, as the config says."""
    if config.get("thresholding"):
        return {"clip": config["sample_max_value"], "threshold": config["dynamic_thresholding_ratio"]}
    return {"clip": float(config["clip_sample_range"]) if config["clip_sample"] else math.inf}


def ddim(config: Config, ask: Ask) -> Table:
    """DDIM, https://arxiv.org/abs/2010.02502, formulas 12 and 16; a and b are their alpha_t and alpha_t-1."""
    bars, eta = schedule.alpha_bars(config), config["eta"]
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    rows = []
    for t, to in schedule.leaps(config, ask)[ask.begin :]:
        a, b = bars[t], bars[to] if to >= 0 else final_bar(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        if config["use_clipped_model_output"]:
            eps = (X - sqrt(a) * H0) / sqrt(1 - a)
        sigma = eta * sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = sqrt(b) * H0 + sqrt(max(1 - b - sigma**2, 0.0)) * eps + sigma * Z
        rows.append(row(t, x, h=x0, level=noised(a), **bounds(config)))
    return Table(tuple(rows), 1.0)


def final_bar(config: Config, bars: schedule.Floats) -> float:
    """alpha_bar past the last timestep."""
    return 1.0 if config["set_alpha_to_one"] else float(bars[0])


def noised(bar: float) -> tuple[float, float]:
    """The factors of image and noise in x_t, of alpha_bar at t."""
    return sqrt(bar), sqrt(1 - bar)


def ddim_inverse(config: Config, ask: Ask) -> Table:
    """DDIM's step the other way, from a to a noisier b: https://arxiv.org/abs/2105.05233, appendix F.

    The loop starts from an image, and the model is told the timestep that the step goes to.
    """
    bars, kind, rows = schedule.alpha_bars(config), config["prediction_type"], []
    to_one = config["set_alpha_to_one"] if config["set_alpha_to_zero"] is None else config["set_alpha_to_zero"]
    for t in schedule.whole(config, ask)[::-1].tolist()[ask.begin :]:
        start = t - config["num_train_timesteps"] // ask.steps
        a, b = bars[start] if start >= 0 else 1.0 if to_one else bars[0], bars[t]
        if kind == "sample" and a == 1:
            raise DexportError(
                "DDIMInverseScheduler with prediction_type='sample' has no eps in an image without noise; "
                "set set_alpha_to_one to False"
            )
        x0, eps = predict(kind, sqrt(a), sqrt(1 - a))
        level = noised(a) if start >= 0 else (1.0, 0.0)
        rows.append(row(t, sqrt(b) * H0 + sqrt(1 - b) * eps, h=x0, level=level, **bounds(config)))
    return Table(tuple(rows), 1.0)


def cogvideox_ddim(config: Config, ask: Ask) -> Table:
    """DDIM on a shifted schedule, which has the options of clipping and makes no use of them."""
    return ddim({**config, "clip_sample": False, "eta": 0.0, "use_clipped_model_output": False}, ask)


def cogvideox_dpm(config: Config, ask: Ask) -> Table:
    """SDE-DPM-Solver++(2M), https://arxiv.org/abs/2211.01095, appendix B; H0 and H1 are x_0 at this and the last step.

    a and b are alpha_bar at the step's ends, lambda = log(a / (1 - a)) / 2, and ``decay`` is exp(-2h).
    """
    bars, rows = schedule.alpha_bars(config), []
    leaps, before = schedule.leaps(config, ask)[ask.begin :], None
    for t, to in leaps:
        a, b = bars[t], bars[to] if to >= 0 else final_bar(config, bars)
        x0, _ = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        decay = a * (1 - b) / (b * (1 - a))
        data: Form = H0
        if before and to >= 0:  # from pure noise, where before = 0, lambda's last step was endless and its slope is 0
            slope = (_lambda(b) - _lambda(a)) / (2 * (_lambda(a) - _lambda(before)))
            data = H0 + slope * (H0 - H1)
        x = sqrt((1 - b) / (1 - a) * decay) * X + sqrt(b) * (1 - decay) * data + sqrt((1 - b) * (1 - decay)) * Z
        rows.append(row(t, x, h=x0, shift=True, level=noised(a)))
        before = a
    return Table(tuple(rows), 1.0)


def _lambda(bar: float) -> float:
    return math.log(bar / (1 - bar)) / 2


DDIM: Mapping[str, Any] = {
    **COMMON,
    **CLIPPING,
    **THRESHOLDING,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
    "eta": 0.0,
    "use_clipped_model_output": False,
}
COGVIDEOX: Mapping[str, Any] = {
    **COMMON,
    **CLIPPING,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": OneOf("scaled_linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "set_alpha_to_one": True,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
}
CLASSES: Mapping[str, Sampler] = {
    "DDIMScheduler": Sampler(ddim, DDIM, ("timesteps",)),
    "DDIMParallelScheduler": Sampler(ddim, DDIM, ("timesteps",)),
    "DDIMInverseScheduler": Sampler(
        ddim_inverse,
        {
            **COMMON,
            **CLIPPING,
            "timestep_spacing": OneOf("leading", ("leading", "trailing")),
            "set_alpha_to_one": True,
            "set_alpha_to_zero": None,  # what older configs call set_alpha_to_one
            "rescale_betas_zero_snr": False,
        },
        counts_down=False,
    ),
    "CogVideoXDDIMScheduler": Sampler(cogvideox_ddim, COGVIDEOX),
    "CogVideoXDPMScheduler": Sampler(cogvideox_dpm, COGVIDEOX),
}
