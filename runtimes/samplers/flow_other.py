"""The rarer samplers of rectified flows, and the classes that no table can stand for, with the reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.flow import FLOW, Sigmas, fixed_shift, flow_sigmas, given_sigmas, given_times, level, steps, x0
from runtimes.samplers.sampler import OFF, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import M, S, Table, X, Z, row

GUARD = 1e-12  # what diffusers adds to the divisors alpha


def euler_ancestral(config: Config, ask: Ask) -> Table:
    """Euler's method to a lower sigma, and noise up again: https://arxiv.org/abs/2206.00364, algorithm 2, for a flow.

    ``down`` is the lower sigma. There the signal has the share 1 - down: it is scaled to 1 - sigma' with the noise, and
    what the noise then lacks of sigma' is drawn. The schedule is that of FlowMatchEulerDiscreteScheduler; a list of
    sigmas is taken as it is.
    """
    eta, amount = config["eta"], config["s_noise"]
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    if ask.sigmas is None:
        times, sigmas = flow_sigmas(config, ask)
    else:
        listed = given_sigmas(ask.sigmas).astype(np.float32)
        times = (listed[:-1] * np.float32(config["num_train_timesteps"])).astype(np.float64)
        sigmas = listed.astype(np.float64)
    rows = []
    for t, sigma, to in steps(times, sigmas, ask):
        down = to * (1 + (to / sigma - 1) * eta)
        x = down / sigma * X + (1 - down / sigma) * x0(sigma)
        if to and eta and amount:
            lacking = to**2 - (down * (1 - to)) ** 2 / ((1 - down) ** 2 + GUARD)
            x = (1 - to) / (1 - down + GUARD) * x + amount * sqrt(max(lacking, 0.0)) * Z
        rows.append(row(t, x, level=level(sigma)))
    return Table(tuple(rows), 1.0)


def flow_map(config: Config, ask: Ask) -> Table:
    """A flow map, https://arxiv.org/abs/2406.07507: the model gives the mean slope between two times, t and r.

    r, for the model, is the next row's t, and 0 in the last.
    """
    total = config["num_train_timesteps"]
    if ask.sigmas is not None and ask.timesteps is not None:
        raise DexportError("a list of sigmas and one of timesteps exclude each other here; leave one out")
    if ask.sigmas is not None:
        base = given_sigmas(ask.sigmas)[:-1]
    elif ask.timesteps is not None:
        base = given_times(total, ask.timesteps) / total
    else:
        base = np.linspace(1, 0, ask.steps + 1)[:-1]
    sigmas = np.append(fixed_shift({**config, "use_dynamic_shifting": False}, base), 0.0)
    rows = [
        row(t, X + (to - sigma) * M, level=level(sigma)) for t, sigma, to in steps(sigmas[:-1] * total, sigmas, ask)
    ]
    return Table(tuple(rows), 1.0)


def minimax(config: Config, ask: Ask) -> Table:
    """Euler's method for MiniMax H3, whose t rises from noise (0) to data (1), and whose model predicts x_0 - eps.

    n steps are n calls of the model; diffusers' count for them is n + 1, the points between.
    """
    if ask.sigmas is None:
        base = schedule.linspace(1, 0, ask.steps + 1)
        shift = config["shift"]
        sigmas = shift * base / (1 + (shift - 1) * base)
    else:
        sigmas = given_sigmas(ask.sigmas).astype(np.float32)
    times = (np.float32(1) - sigmas[:-1]).astype(np.float64)
    rows = []
    for t, sigma, to in steps(times, sigmas.astype(np.float64), ask):
        data = X + (1 - t) * M  # 1 - t is sigma, rounded twice
        rows.append(row(t, to / sigma * X + (1 - to / sigma) * data, level=(t, 1 - t)))
    return Table(tuple(rows), 1.0)


def helios_euler(config: Config, ask: Ask) -> Table:
    """Euler's method on Helios' schedule of one stage."""
    times, sigmas = _helios_sigmas(config, ask, ask.steps)
    rows = [row(t, X + (to - sigma) * M, level=level(sigma)) for t, sigma, to in steps(times, sigmas, ask)]
    return Table(tuple(rows), 1.0)


def helios_distilled(config: Config, ask: Ask) -> Table:
    """Helios distilled by https://arxiv.org/abs/2311.18828: to x_0, and up again by the start's noise, kept in S."""
    if ask.begin:
        raise DexportError("HeliosDMDScheduler needs the noise of its start; begin at the first step")
    times, sigmas = _helios_sigmas(config, ask, ask.steps + 1)
    times, sigmas = times[:-1], np.delete(sigmas, -2)
    rows = [row(t, (1 - to) * x0(sigma) + to * S, level=level(sigma)) for t, sigma, to in steps(times, sigmas, ask)]
    return Table(tuple(rows), 1.0)


def _helios_sigmas(config: Config, ask: Ask, count: int) -> tuple[Floats, Floats]:
    """Return timesteps [count] and sigmas [count + 1]; the config's shift is one by resolution that stands still."""
    total, strength = config["num_train_timesteps"], config["shift"]
    dynamic = config["use_dynamic_shifting"]
    if dynamic != (ask.mu is not None):
        raise DexportError("mu goes with use_dynamic_shifting: give both, or neither")
    if dynamic and strength != 1:
        raise DexportError("use_dynamic_shifting and a shift exclude each other; set shift to 1")
    sigmas: Sigmas = np.linspace(1, 1 / total, count + 1)[:-1].astype(np.float32)
    if ask.mu is not None:
        strength = ask.mu
    if dynamic or strength != 1:
        strength = math.exp(strength) if config["time_shift_type"] == "exponential" else strength
        if strength <= 0:
            raise DexportError(f"mu must be above 0 with time_shift_type='linear', not {ask.mu}")
        sigmas = strength / (strength + (1 / sigmas - 1))
    times = sigmas * np.float32(total)
    return times.astype(np.float64), np.append(sigmas.astype(np.float64), 0.0)


HELIOS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stages": OneOf(3, (1,)),  # between stages the latents grow; the loop's sample keeps its size
    "stage_range": [0, 1 / 3, 2 / 3, 1],
    "gamma": 1 / 3,
    "prediction_type": OneOf("flow_prediction", ("flow_prediction",)),
    "use_flow_sigmas": OneOf(True, (True,)),
    "use_dynamic_shifting": False,
    "time_shift_type": OneOf("exponential", ("exponential", "linear")),
}
CLASSES: Mapping[str, Sampler] = {
    "LTXEulerAncestralRFScheduler": Sampler(
        euler_ancestral, {**FLOW, "invert_sigmas": OFF, "eta": 1.0, "s_noise": 1.0}, ("sigmas", "mu")
    ),
    "FlowMapEulerDiscreteScheduler": Sampler(
        flow_map, {"num_train_timesteps": 1000, "shift": 1.0}, ("timesteps", "sigmas")
    ),
    "MiniMaxH3Scheduler": Sampler(minimax, {"shift": 12.0}, ("sigmas",), counts_down=False),
    "HeliosScheduler": Sampler(
        helios_euler,
        {
            **HELIOS,
            "scheduler_type": OneOf("unipc", ("euler",)),
            # Options of its multistep solver, which Euler's method does not look at.
            "thresholding": False,
            "solver_order": 2,
            "predict_x0": True,
            "solver_type": "bh2",
            "lower_order_final": True,
            "disable_corrector": [],
            "solver_p": None,
        },
        ("mu",),
    ),
    "HeliosDMDScheduler": Sampler(
        helios_distilled, {**HELIOS, "time_shift_type": OneOf("linear", ("exponential", "linear"))}, ("mu",)
    ),
}

TOKENS = "it acts on tokens, which a table's sums cannot hold"
REFUSED: Mapping[str, str] = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "VQDiffusionScheduler": TOKENS,
    "PiflowScheduler": "its model gives a grid of several predictions for each step, and a table has one output",
    "RFD4ProteinaScheduler": "it moves the atoms of a molecule, and keeps by a mask those that exist",
}
"""The classes of diffusers that no table can stand for, with the reason."""
