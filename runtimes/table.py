"""The table form of a sampler: one row of scalars for each call of the model, and the algebra that solvers write.

Every row says how the loop's registers change. X is the sample, S a saved sample, H0 .. H3 a history (H0 the newest),
M the model's output and Z fresh noise::

    M  = model(scale X, t)
    H0 = clip(h_x X + h_m M)         left as it was where h_x = h_m = 0
    X' = x_x X + x_s S + x_m M + sum x_h[j] H_j + x_z Z
    S' = s_x X + s_s S + s_m M + sum s_h[j] H_j + s_z Z
    then, where ``shift`` is set, H3 = H2, H2 = H1, H1 = H0

A model that learned the variance of its steps gives twice the channels: M is the first half; the second, V, scales Z
where ``deviation`` says so, and is left out elsewhere. Where a part of an image is known, a row with ``known`` puts it
back: X' = mask (known[0] image + known[1] Z) + (1 - mask) X'.

A solver writes none of these scalars. It composes the registers below by + - * /, as its paper does, and ``row`` reads
the scalars off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

HISTORY = 4


@dataclass(frozen=True)
class Row:
    """One call of the model and what follows it.

    clip: the largest magnitude that H0 keeps (inf: any). threshold: 0, or the share of H0's values that are kept by
    dynamic thresholding, https://arxiv.org/abs/2205.11487, section 2.3; ``clip`` then is the largest threshold.
    deviation: () for Z of unit variance, or (a, b, power), by which Z is of the deviation exp(a + b V) V^power.
    known: () or the factors of a known image and of Z, as noisy as the sample is after the row. calls: whether the
    model is called; M is 0 where it is not. level: () or, where the row begins a step, the factors of signal and noise
    in the sample before it (in PNDM's Runge-Kutta steps, at each call).
    guidance: the scale of guidance at this call, which the model, not the loop, applies; at most 1: none. hints:
    likewise the scale of each picture that steers the model (runtimes.hints). wording: likewise which of the wordings
    of the prompts it is told (runtimes.wording).
    """

    t: float
    scale: float
    h_x: float
    h_m: float
    clip: float
    threshold: float
    x_x: float
    x_s: float
    x_m: float
    x_h: tuple[float, ...]
    x_z: float
    s_x: float
    s_s: float
    s_m: float
    s_h: tuple[float, ...]
    s_z: float
    shift: bool
    deviation: tuple[float, ...] = ()
    known: tuple[float, ...] = ()
    calls: bool = True
    level: tuple[float, ...] = ()
    guidance: float = 1.0
    hints: tuple[float, ...] = ()
    wording: int = 0


@dataclass(frozen=True)
class Table:
    """A compiled sampler, whose loop starts from noise of unit variance: X = init_scale * noise."""

    rows: tuple[Row, ...]
    init_scale: float

    @property
    def mix(self) -> tuple[float, ...]:
        """Where it starts from an image instead, X = mix[0] * (the encoded image) + mix[1] * noise."""
        return self.rows[0].level


class Form:
    """A linear combination of registers; ``+ - * /`` give new ones."""

    __array_ufunc__ = None  # so that numpy's scalars leave ``scalar * form`` to this class

    def __init__(self, weights: tuple[float, ...]) -> None:
        self.weights = weights  # of X, S, M, H0 .. H3, Z

    def __add__(self, other: Form) -> Form:
        return Form(tuple(a + b for a, b in zip(self.weights, other.weights, strict=True)))

    def __sub__(self, other: Form) -> Form:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Form:
        return Form(tuple(float(factor) * a for a in self.weights))

    def __truediv__(self, divisor: float) -> Form:
        return Form(tuple(a / float(divisor) for a in self.weights))


def _registers() -> list[Form]:
    return [Form(tuple(line)) for line in np.eye(3 + HISTORY + 1).tolist()]


X, S, M, H0, H1, H2, H3, Z = _registers()
NOTHING = 0.0 * X


def row(
    t: float,
    x: Form,
    *,
    scale: float = 1.0,
    h: Form = NOTHING,
    clip: float = math.inf,
    threshold: float = 0.0,
    s: Form = S,
    shift: bool = False,
    deviation: tuple[float, ...] = (),
    known: tuple[float, ...] = (),
    calls: bool = True,
    level: tuple[float, ...] = (),
) -> Row:
    """Write a row: X' = x, H0 = clip(h), S' = s (kept by default), the model called at ``t`` with scale * X.

    ``h`` may hold only X and M, since it is computed before all else.
    """
    if any(h.weights[1:2] + h.weights[3:]):
        raise ValueError("H0 can be made of X and M only")
    h_x, _, h_m, *_ = h.weights
    x_x, x_s, x_m, *x_h, x_z = x.weights
    s_x, s_s, s_m, *s_h, s_z = s.weights
    return Row(
        float(t), float(scale), h_x, h_m, float(clip), float(threshold),
        x_x, x_s, x_m, tuple(x_h), x_z, s_x, s_s, s_m, tuple(s_h), s_z, shift, deviation, known, calls,
        tuple(map(float, level)),
    )  # fmt: skip
