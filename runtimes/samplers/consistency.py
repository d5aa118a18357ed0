"""Consistency models, https://arxiv.org/abs/2303.01469: every call gives x_0, to which fresh noise is added again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import cos, inf, sin, sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.ddim import bounds, noised
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import CLIPPING, COMMON, THRESHOLDING, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, M, Row, Table, X, Z, row

LCM_SIGMA_DATA = 0.5  # the deviation of the data: https://arxiv.org/abs/2310.04378, section 4.2
TRIGFLOW_END = 1.5708  # pi / 2, pure noise, as diffusers rounds it
TRIGFLOW_MIDDLE = 1.3  # of two steps: https://arxiv.org/abs/2503.09641, section 4


def lcm(config: Config, ask: Ask) -> Table:
    """Latent consistency models, https://arxiv.org/abs/2310.04378, algorithm 3 and formula 9."""
    bars, rows = schedule.alpha_bars(config), []
    times = distilled(config, ask)
    for t, to in list(zip(times, [*times[1:], None], strict=True))[ask.begin :]:
        a, scaled = bars[t], t * config["timestep_scaling"]
        skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
        out = scaled / sqrt(scaled**2 + LCM_SIGMA_DATA**2)
        x0, _ = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        x = out * H0 + skip * X
        if to is not None:
            x = sqrt(bars[to]) * x + sqrt(1 - bars[to]) * Z
        rows.append(row(t, x, h=x0, level=noised(a), **bounds(config)))
    return Table(tuple(rows), 1.0)


def tcd(config: Config, ask: Ask) -> Table:
    """Trajectory consistency, https://arxiv.org/abs/2402.19159, algorithm 4: from t to s <= t', and up to t' by noise.

    ``eta`` is the paper's gamma: at 0 nothing is random, at 1 every step goes to x_0. The class has options of
    clipping and makes no use of them.
    """
    bars, eta, rows = schedule.alpha_bars(config), config["eta"], []
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    times = distilled(config, ask)
    for t, to in list(zip(times, [*times[1:], 0], strict=True))[ask.begin :]:
        s = int(np.float32(1 - eta) * np.float32(to))  # in diffusers' precision
        a, b, c = bars[t], bars[to], bars[s]
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        x = sqrt(c) * x0 + sqrt(1 - c) * eps
        if eta and t != times[-1]:
            x = sqrt(b / c) * x + sqrt(1 - b / c) * Z
        rows.append(row(t, x, level=noised(a)))
    return Table(tuple(rows), 1.0)


def distilled(config: Config, ask: Ask) -> list[int]:
    """Return timesteps out of the ``original_inference_steps`` that the model was distilled on, falling.

    They lie in the part ``strength`` of those; of a list that is given, that part is made.
    """
    if ask.timesteps is not None:
        times = [int(t) for t in schedule.given(config, ask.timesteps)]
        return times[len(times) - int(len(times) * ask.strength) :]
    total, original = config["num_train_timesteps"], config["original_inference_steps"]
    if original > total:
        raise DexportError(f"original_inference_steps must be at most num_train_timesteps, {total}, not {original}")
    if ask.steps > original:
        raise DexportError(f"steps must be at most original_inference_steps, {original}, not {ask.steps}")
    left = int(original * ask.strength)
    if ask.steps > left:
        raise DexportError(
            f"a strength of {ask.strength:g} leaves {left} of the {original} steps that the model was distilled on "
            f"(original_inference_steps), and {ask.steps} are asked for; raise the strength or take fewer steps"
        )
    times = np.arange(left, 0, -1) * (total // original) - 1
    chosen: list[int] = times[np.linspace(0, left, ask.steps, endpoint=False).astype(np.int64)].tolist()
    return chosen


def consistency(config: Config, ask: Ask) -> Table:
    """Multistep consistency sampling, https://arxiv.org/abs/2303.01469, algorithm 1, formulas 5 and appendix C.

    X = x_0 + sigma eps. Timesteps that are given count the sigmas: from num_train_timesteps - 1, sigma_max.
    """
    total, data = config["num_train_timesteps"], config["sigma_data"]
    low, high, rho = config["sigma_min"], config["sigma_max"], config["rho"]
    if total == 1:
        raise DexportError("num_train_timesteps must be at least 2, for sigma_max and sigma_min")
    if ask.timesteps is not None:
        chosen = schedule.given(config, ask.timesteps)
    elif ask.steps > total:
        raise DexportError(f"steps must be at most num_train_timesteps, {total}, not {ask.steps}")
    else:
        chosen = np.arange(ask.steps - 1, -1, -1.0) * (total // ask.steps)
    ramp = chosen[::-1] / (total - 1)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    times = 1000 * 0.25 * np.log(levels)
    # Rounded as in diffusers, sigma_min too: the last step's noise is what is left of their difference, 0.
    *sigmas, low = np.append(levels, low).astype(np.float32).astype(np.float64).tolist()
    rows = []
    for t, (sigma, to) in list(zip(times, pairwise([*sigmas, low]), strict=True))[ask.begin :]:
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        out = (sigma - low) * data / sqrt(sigma**2 + data**2)
        renoised = H0 + config["s_noise"] * sqrt(max(to**2 - low**2, 0.0)) * Z
        clip = 1.0 if config["clip_denoised"] else inf
        scale, level = 1 / sqrt(sigma**2 + data**2), (1.0, sigma)
        rows.append(row(t, renoised, scale=scale, h=out * M + skip * X, clip=clip, level=level))
    return Table(tuple(rows), float(high))


def trigflow(config: Config, ask: Ask) -> Table:
    """Multistep sampling of sCM, https://arxiv.org/abs/2410.11081, section 3 and algorithm 2.

    x = cos(t) x_0 + sin(t) z, z of the deviation sigma_data, and the model gives F with x_0 = cos(t) x - sin(t) F.
    x_0 has that deviation too: what it is made of, and made into, is multiplied and divided by it outside of the loop.
    """
    if ask.steps > config["num_train_timesteps"]:
        raise DexportError(f"steps must be at most {config['num_train_timesteps']}, not {ask.steps}")
    if ask.timesteps is not None:
        times = np.append(_angles(ask.timesteps), 0.0)
    elif ask.steps == 2:
        times = np.array([TRIGFLOW_END, TRIGFLOW_MIDDLE, 0.0])
    else:
        times = schedule.linspace(TRIGFLOW_END, 0, ask.steps + 1).astype(np.float64)
    times = times.astype(np.float32).astype(np.float64)
    data, rows = config["sigma_data"], []
    for t, to in list(pairwise(times.tolist()))[ask.begin :]:
        x = cos(to) * (cos(t) * X - sin(t) * M) + sin(to) * data * Z
        rows.append(row(t, x, level=(cos(t), sin(t) * data)))
    return Table(tuple(rows), data)


def _angles(timesteps: Any) -> schedule.Floats:
    angles = np.asarray(timesteps, np.float64)
    if angles.ndim != 1 or not ((angles > 0) & (angles <= TRIGFLOW_END)).all() or (np.diff(angles) >= 0).any():
        raise DexportError(f"the list of timesteps must fall from at most {TRIGFLOW_END} to above 0; they are angles")
    return angles


def decoder(config: Config, ask: Ask) -> Table:
    """The two steps of DALL-E 3's consistency decoder, https://github.com/openai/consistencydecoder.

    The scalings are those of https://arxiv.org/abs/2206.00364, table 1 (EDM), for x / alpha.
    """
    if ask.steps != 2:
        raise DexportError(f"the consistency decoder makes 2 steps, not {ask.steps}; take 2")
    if config["num_train_timesteps"] <= DECODER_TIMES[0]:
        raise DexportError(f"the consistency decoder begins at timestep {DECODER_TIMES[0]} of num_train_timesteps")
    bars, data = schedule.alpha_bars({**DECODER_BETAS, **config}), config["sigma_data"]
    rows: list[Row] = []
    for t, to in list(zip(DECODER_TIMES, (*DECODER_TIMES[1:], None), strict=True))[ask.begin :]:
        a = bars[t]
        sigma = sqrt(1 / a - 1)
        x = sigma * data / sqrt(sigma**2 + data**2) * M + data**2 / (sigma**2 + data**2) / sqrt(a) * X
        if to is not None:
            x = sqrt(bars[to]) * x + sqrt(1 - bars[to]) * Z
        rows.append(row(t, x, scale=1 / sqrt(a * (sigma**2 + data**2)), level=noised(a)))
    return Table(tuple(rows), sqrt(1 - bars[DECODER_TIMES[0]]))


DECODER_TIMES = (1008, 512)
DECODER_BETAS: Mapping[str, Any] = {
    "beta_start": 0.0,
    "beta_end": 0.0,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": None,
}
LATENT_CONSISTENCY: Mapping[str, Any] = {
    **COMMON,
    **CLIPPING,
    **THRESHOLDING,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": OneOf("scaled_linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "original_inference_steps": 50,
    "clip_sample": False,
    "set_alpha_to_one": True,  # this and the spacing are of no account: no step goes past the last timestep
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

CLASSES: Mapping[str, Sampler] = {
    "LCMScheduler": Sampler(lcm, LATENT_CONSISTENCY, ("timesteps", "strength")),
    "TCDScheduler": Sampler(tcd, {**LATENT_CONSISTENCY, "eta": 0.3}, ("timesteps", "strength")),
    "CMStochasticIterativeScheduler": Sampler(
        consistency,
        {
            "num_train_timesteps": 40,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "s_noise": 1.0,
            "rho": 7.0,
            "clip_denoised": True,
        },
        ("timesteps",),
        counts_down=False,
    ),
    "SCMScheduler": Sampler(
        trigflow,
        {"num_train_timesteps": 1000, "prediction_type": OneOf("trigflow", ("trigflow",)), "sigma_data": 0.5},
        ("timesteps",),
        counts_down=False,
    ),
    "ConsistencyDecoderScheduler": Sampler(decoder, {"num_train_timesteps": 1024, "sigma_data": 0.5}),
}
