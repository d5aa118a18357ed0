"""Rectified flows, https://arxiv.org/abs/2210.02747: x = (1 - sigma) x_0 + sigma eps, the model predicts eps - x_0.

The model's t is sigma * num_train_timesteps. X is x itself, so the loop starts from noise of unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import SPACED_SIGMAS, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, Form, M, Row, S, Table, X, Z, row

Sigmas = NDArray[np.floating]


def euler(config: Config, ask: Ask) -> Table:
    """Euler's method on dx/dsigma = eps - x_0; or, with ``stochastic_sampling``, to x_0 and fresh noise from there."""
    if config["stochastic_sampling"]:
        return renewed(config, ask)
    times, sigmas = flow_sigmas(config, ask)
    rows = [row(t, X + (to - sigma) * M, level=level(sigma)) for t, sigma, to in steps(times, sigmas, ask)]
    return Table(tuple(rows), 1.0)


def renewed(config: Config, ask: Ask) -> Table:
    """Multistep consistency sampling, https://arxiv.org/abs/2303.01469, algorithm 1, on a flow's levels of noise."""
    times, sigmas = flow_sigmas(config, ask)
    rows = [row(t, (1 - to) * x0(sigma) + to * Z, level=level(sigma)) for t, sigma, to in steps(times, sigmas, ask)]
    return Table(tuple(rows), 1.0)


def heun(config: Config, ask: Ask) -> Table:
    """Heun's method, https://arxiv.org/abs/2206.00364, algorithm 1: two calls a step, but for the last.

    S keeps the step's start, and H0 the slope there.
    """
    times, sigmas = flow_sigmas({**HEUN_SCHEDULE, **config}, ask)
    rows: list[Row] = []
    for index, (t, sigma, to) in enumerate(steps(times, sigmas, ask), ask.begin):
        rows.append(row(t, X + (to - sigma) * M, h=M, s=X, level=level(sigma)))
        if to:
            rows.append(row(times[index + 1], S + (to - sigma) / 2 * (H0 + M)))
    return Table(tuple(rows), 1.0)


def x0(sigma: float) -> Form:
    """The image that the model sees at ``sigma``."""
    return predict("flow_prediction", 1 - sigma, sigma)[0]


def steps(times: Floats, sigmas: Floats, ask: Ask) -> Sequence[tuple[float, float, float]]:
    """Return each step's timestep and its two sigmas, from the first that is made."""
    return [(t, *ends) for t, ends in zip(times.tolist(), pairwise(sigmas.tolist()), strict=True)][ask.begin :]


def level(sigma: float) -> tuple[float, float]:
    """The factors of image and noise at ``sigma``."""
    return 1 - sigma, sigma


def flow_sigmas(config: Config, ask: Ask) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1], in diffusers' precision: spaced in float64, lists in float32.

    A list of timesteps or sigmas is shifted like the spaced ones; timesteps reach the model as they are given. The
    end is 0 or, for a model whose sigmas are inverted (they rise from image to noise), 1.
    """
    total = config["num_train_timesteps"]
    given = None if ask.timesteps is None else given_times(total, ask.timesteps)
    sigmas: Sigmas
    if ask.sigmas is not None:
        sigmas = given_sigmas(ask.sigmas)[:-1].astype(np.float32)
    elif given is not None:
        sigmas = given.astype(np.float32) / np.float32(total)
    else:
        # The ends are shifted too: with a shift other than 1 diffusers shifts twice.
        first, last = fixed_shift(config, np.array([1, 1 / total], np.float32)).tolist()
        sigmas = np.linspace(first * total, last * total, ask.steps) / total
    sigmas = shift_of(config, ask, fixed_shift(config, sigmas))
    if config["shift_terminal"] and sigmas[-1] < 1:  # a single step from pure noise has no end to stretch to
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - config["shift_terminal"]))
    respaced = schedule.respace(config, sigmas.astype(np.float64), Ask(len(sigmas)))
    levels = (sigmas if respaced is None else respaced).astype(np.float32)
    if config["invert_sigmas"]:
        levels = np.float32(1) - levels
    end = 1.0 if config["invert_sigmas"] else 0.0
    times = levels * np.float32(total) if given is None or config["invert_sigmas"] else given.astype(np.float32)
    return times.astype(np.float64), np.append(levels.astype(np.float64), end)


def fixed_shift(config: Config, sigmas: Sigmas) -> Sigmas:
    """The config's own shift, which one by resolution replaces: https://arxiv.org/abs/2403.03206, formula 23."""
    shift = config["shift"]
    return sigmas if config["use_dynamic_shifting"] else shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_of(config: Config, ask: Ask, sigmas: Sigmas) -> Sigmas:
    """The shift by resolution, of the strength exp(mu), or mu where ``time_shift_type`` is "linear"."""
    if not config["use_dynamic_shifting"]:
        if ask.mu is not None:
            raise DexportError("this scheduler has no shift by resolution (use_dynamic_shifting is off); leave mu out")
        return sigmas
    if ask.mu is None:
        raise DexportError(
            "this scheduler shifts its noise by the resolution (use_dynamic_shifting is on) and needs mu; "
            "give it, or set use_dynamic_shifting to False and take the config's shift"
        )
    strength = math.exp(ask.mu) if config["time_shift_type"] == "exponential" else ask.mu
    if strength <= 0:
        raise DexportError(f"mu must be above 0 with time_shift_type='linear', not {ask.mu:g}")
    return strength / (strength + (1 / sigmas - 1))


def mu_of(config: Config, tokens: int) -> float:
    """Return the mu that pipelines of Flux, SD 3 and others take for an image of ``tokens`` patches.

    On the line through ``base_shift`` at ``base_image_seq_len`` and ``max_shift`` at ``max_image_seq_len``:
    https://arxiv.org/abs/2403.03206, section 5.3.2, as Flux fits it.
    """
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (tokens - low))


def given_times(total: int, timesteps: Sequence[float]) -> Floats:
    """Return a user's timesteps, checked: fractions are allowed, as is the end of the way, ``total``."""
    times = np.asarray(timesteps, np.float64)
    if times.ndim != 1 or not ((times > 0) & (times <= total)).all() or (np.diff(times) >= 0).any():
        raise DexportError(f"the list of timesteps must fall from at most {total} to above 0 without a repetition")
    return times


def given_sigmas(sigmas: Sequence[float]) -> Floats:
    """Return a user's sigmas, checked: a flow's lie in 0 to 1, and end at 0."""
    values = np.asarray(sigmas, np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all() or (np.diff(values) >= 0).any() or values[-1]:
        raise DexportError(
            "the list of sigmas must fall from at most 1 without a repetition, and end with 0; one more than steps"
        )
    return values


SHIFTING: Mapping[str, Any] = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": OneOf("exponential", ("exponential", "linear")),
}
FLOW: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    **SHIFTING,
    **SPACED_SIGMAS,
    "invert_sigmas": False,
    "shift_terminal": None,
}
HEUN_SCHEDULE: Mapping[str, Any] = {"use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False}
"""What flow_sigmas asks for, and the class with Heun's method has no options for."""

CLASSES: Mapping[str, Sampler] = {
    "FlowMatchEulerDiscreteScheduler": Sampler(
        euler, {**FLOW, "stochastic_sampling": False}, ("timesteps", "sigmas", "mu")
    ),
    "FlowMatchHeunDiscreteScheduler": Sampler(heun, {"num_train_timesteps": 1000, "shift": 1.0}),
    "FlowMatchLCMScheduler": Sampler(
        renewed,
        # Factors by which the latents grow from step to step: the loop's sample keeps its size.
        {**FLOW, "scale_factors": OneOf(None, (None, [])), "upscale_mode": "bicubic"},
        ("timesteps", "sigmas", "mu"),
    ),
}
