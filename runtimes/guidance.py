"""Guidance: the scale of each call of the model, and how the outputs with and without the prompt become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from runtimes.errors import DexportError
from runtimes.session import Array
from runtimes.table import Table

LARGEST = 1000.0  # a scale beyond is a slip of the keyboard


def plan(table: Table, scale: float | Sequence[float], interval: tuple[float, float] = (0.0, 1.0)) -> Table:
    """Return the table with a scale of guidance in each row.

    scale: one for all calls, or several, of which the first holds at the first call, the last at the last, and between
    two of them it changes evenly. interval: the share of the calls, from start to end, that are guided; the others
    have the scale 1 (https://arxiv.org/abs/2404.07724). Raises DexportError for scales or an interval that are none.
    """
    points = np.atleast_1d(np.asarray(scale, np.float64))
    if points.ndim != 1 or not len(points) or not ((points >= 0) & (points <= LARGEST)).all():
        raise DexportError(f"guidance must be a number from 0 to {LARGEST:g}, or several, not {scale!r:.80}")
    start, end = interval
    if not 0 <= start < end <= 1:
        raise DexportError(f"the interval of guidance must rise within 0 to 1, not {start:g} to {end:g}")
    count = len(table.rows)
    scales = np.interp(np.linspace(0, len(points) - 1, count), np.arange(len(points)), points)
    scales[: int(start * count)] = scales[int(end * count) :] = 1.0
    rows = tuple(dataclasses.replace(row, guidance=float(g)) for row, g in zip(table.rows, scales, strict=True))
    return dataclasses.replace(table, rows=rows)


def guide(without: Array, with_prompt: Array, scale: float, rescale: float = 0.0) -> Array:
    """Return u + scale (c - u), float64, for the outputs u without and c with the prompt, [B, C, ...].

    https://arxiv.org/abs/2207.12598, formula 6, with its w as scale - 1. rescale: the share by which each sample's
    deviation is brought back to that of c, against too much contrast: https://arxiv.org/abs/2305.08891, section 3.4.
    """
    base = without.astype(np.float64)  # with a large scale the difference of two near outputs would lose digits
    guided: Array = base + scale * (with_prompt - base)
    if not rescale:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = np.std(with_prompt, axis=axes, keepdims=True, ddof=1, dtype=np.float64) / np.std(
        guided, axis=axes, keepdims=True, ddof=1
    )
    corrected: Array = guided * (rescale * ratio + 1 - rescale)
    return corrected
