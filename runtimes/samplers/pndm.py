"""PNDM: pseudo numerical methods, which blend the model's past outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers.ddim import final_bar, noised
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, OneOf, Sampler
from runtimes.schedule import Ask, Config, Floats
from runtimes.table import H0, H1, H2, H3, NOTHING, Form, M, Row, S, Table, X, row

RUNGE_KUTTA = 3  # steps that give the first linear multistep its three past outputs
FOURTH = (55 * M - 59 * H1 + 37 * H2 - 9 * H3) / 24
BLENDS = (M, (M + H1) / 2, (3 * M - H1) / 2, (23 * M - 16 * H1 + 5 * H2) / 12, FOURTH)
Transfer = Callable[[int, int, Form, Form], Form]


def pndm(config: Config, ask: Ask) -> Table:
    """PNDM, https://arxiv.org/abs/2202.09778: DDIM's transfer of an eps that is blended from several outputs."""
    bars = schedule.alpha_bars(config)

    def transfer(t: int, to: int, sample: Form, output: Form) -> Form:
        a, b = bars[t], bars[to] if to >= 0 else final_bar(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a), sample, output)
        return sqrt(b) * x0 + sqrt(1 - b) * eps

    # Fewer steps leave no room for those of Runge and Kutta; diffusers fails there.
    if config["skip_prk_steps"] or ask.steps - ask.begin <= RUNGE_KUTTA:
        rows = _plms(config, ask, transfer, bars)
    else:
        if ask.timesteps is not None:
            raise DexportError(
                "the Runge-Kutta steps of PNDM lie between evenly spaced timesteps; "
                "leave the list of timesteps out, or set skip_prk_steps to True"
            )
        leaps = schedule.leaps(config, ask)[ask.begin :]
        half = config["num_train_timesteps"] // ask.steps // 2
        rows = _runge_kutta([t for t, _ in leaps[: RUNGE_KUTTA + 1]], half, transfer, bars)
        rows += [
            row(t, transfer(t, to, X, FOURTH), h=M, shift=True, level=noised(bars[t])) for t, to in leaps[RUNGE_KUTTA:]
        ]
    return Table(tuple(rows), 1.0)


def _runge_kutta(times: Sequence[int], half: int, transfer: Transfer, bars: Floats) -> list[Row]:
    """Four calls a step, formula 13: k1 .. k4 at its start, twice at its middle, and at its end.

    S keeps the step's start. k1 moves to H1, where it stays for the steps after these, and k2 to H0; k3 is read back
    from the sample that was made of it.
    """
    rows = []
    for t, to in pairwise(times):
        middle = to + half
        third = transfer(t, to, S, M)
        _, of_start, of_output, *_ = third.weights
        k1, k2, k3, k4 = H1, H0, (X - of_start * S) / of_output, M
        rows += [
            row(t, transfer(t, t - half, X, M), h=M, s=X, shift=True, level=noised(bars[t])),
            row(middle, transfer(t, middle, S, M), h=M, level=noised(bars[middle])),
            row(middle, third, level=noised(bars[middle])),
            row(to, transfer(t, to, S, (k1 + 2 * k2 + 2 * k3 + k4) / 6), level=noised(bars[to])),
        ]
    return rows


def _plms(config: Config, ask: Ask, transfer: Transfer, bars: Floats) -> list[Row]:
    """Linear multistep alone: as in latent diffusion the first step is made twice.

    The second time it takes the mean of the outputs at both of its ends; so there is one call more than there are
    steps.
    """
    leaps, stride = schedule.leaps(config, ask), config["num_train_timesteps"] // ask.steps
    rows, last = [], 0
    for index, (t, to) in enumerate([*leaps[:2], *leaps[1:]][ask.begin :]):
        start, sample = t, X
        if index == 1:
            start = t + stride if ask.timesteps is None else last
            to, sample = t, S
        last = t
        x = transfer(start, to, sample, BLENDS[min(index, 4)])
        # The second call's output is used once, and not kept.
        kept: dict[str, Any] = {"h": NOTHING if index == 1 else M, "s": X if index == 0 else S, "shift": index != 1}
        rows.append(row(t, x, level=noised(bars[t]), **kept))
    return rows


CLASSES: Mapping[str, Sampler] = {
    "PNDMScheduler": Sampler(
        pndm,
        {
            **COMMON,
            "set_alpha_to_one": False,
            "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction")),
            "skip_prk_steps": False,
        },
        ("timesteps",),
    ),
}
