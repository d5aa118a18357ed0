"""PNDM: pseudo numerical methods, which blend the model's past outputs."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from runtimes import schedule
from runtimes.samplers.ddim import final_bar, noised
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H1, H2, H3, NOTHING, M, S, Table, X, row


def pndm(config: Config, ask: Ask) -> Table:
    """PLMS, https://arxiv.org/abs/2202.09778: its transfer (which is DDIM's) of an eps blended from past outputs.

    Without Runge-Kutta steps at its start: as in latent diffusion, the first step is made twice, the second time with
    the mean of the outputs at both of its ends. So there is one call more than there are steps.
    """
    bars, stride = schedule.alpha_bars(config), config["num_train_timesteps"] // ask.steps
    blends = [
        M,
        (M + H1) / 2,
        (3 * M - H1) / 2,
        (23 * M - 16 * H1 + 5 * H2) / 12,
        (55 * M - 59 * H1 + 37 * H2 - 9 * H3) / 24,
    ]
    leaps = schedule.leaps(config, ask)
    rows, last = [], 0
    for index, (t, to) in enumerate([*leaps[:2], *leaps[1:]][ask.begin :]):
        start, sample = t, X
        if index == 1:
            start = t + stride if ask.timesteps is None else last
            to, sample = t, S
        last = t
        a, b = bars[start], bars[to] if to >= 0 else final_bar(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a), sample, blends[min(index, 4)])
        x = sqrt(b) * x0 + sqrt(1 - b) * eps
        # The second call's output is used once, and not kept.
        rows.append(row(t, x, h=NOTHING if index == 1 else M, s=X if index == 0 else S, shift=index != 1))
    return Table(tuple(rows), 1.0, noised(bars, rows))


CLASSES: Mapping[str, Sampler] = {
    "PNDMScheduler": Sampler(
        pndm,
        {
            **COMMON,
            "set_alpha_to_one": False,
            "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction")),
            "skip_prk_steps": OneOf(False, (True,)),
        },
        ("timesteps",),
    ),
}
