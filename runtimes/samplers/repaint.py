"""RePaint: a known part of an image is put back after each step, and the rest is made to fit it by going back up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from math import sqrt

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.ddim import noised
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, M, Row, Table, X, Z, row


def repaint(config: Config, ask: Ask) -> Table:
    """RePaint, https://arxiv.org/abs/2201.09865, algorithm 1, with DDIM's step of deviation ``eta`` for DDPM's.

    A step up is a row that does not call the model: it adds the noise of all the timesteps that lie between at once.
    """
    eta, total = config["eta"], config["num_train_timesteps"]
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    if ask.steps > total:
        raise DexportError(f"steps must be at most {total}, the timesteps that the model was trained on")
    bars, betas, stride = schedule.alpha_bars(config), schedule.betas_of(config).astype(np.float64), total // ask.steps
    rows: list[Row] = []
    count = ask.steps - ask.begin
    for before, place in pairwise([count, *_walk(count, config["jump_length"], config["jump_n_sample"])]):
        t = place * stride
        if place > before:
            # As in diffusers these are the betas above ``before``, though the sample is a step below it.
            kept = float(np.prod(1 - betas[before * stride : t]))
            rows.append(row(t, sqrt(kept) * X + sqrt(1 - kept) * Z, calls=False))
            continue
        a, b = bars[t], bars[t - stride] if place else 1.0
        x0, _ = predict("epsilon", sqrt(a), sqrt(1 - a))
        sigma = eta * sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = sqrt(b) * H0 + sqrt(max(1 - b - sigma**2, 0.0)) * M + sigma * Z
        clip = 1.0 if config["clip_sample"] else math.inf
        rows.append(row(t, x, h=x0, clip=clip, known=noised(b), level=noised(a)))
    return Table(tuple(rows), 1.0)


def _walk(count: int, length: int, times: int) -> list[int]:
    """The places from count - 1 to 0, with each stretch of ``length`` gone over ``times`` times: figure 9 there."""
    left = dict.fromkeys(range(0, count - length, length), times - 1)
    walk, place = [], count
    while place:
        place -= 1
        walk.append(place)
        if left.get(place):
            left[place] -= 1
            walk += range(place + 1, place + length + 1)
            place += length
    return walk


CLASSES: Mapping[str, Sampler] = {
    "RePaintScheduler": Sampler(
        repaint,
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": OneOf("linear", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")),
            "eta": 0.0,
            "trained_betas": None,
            "clip_sample": True,
            # In diffusers these are arguments of set_timesteps.
            "jump_length": 10,
            "jump_n_sample": 10,
        },
        counts_down=False,
    ),
}
