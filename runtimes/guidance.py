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
    points = np.atleast_1d(numbers(scale))
    if points.ndim != 1 or not len(points) or not ((points >= 0) & (points <= LARGEST)).all():
        raise DexportError(f"guidance must be a number from 0 to {LARGEST:g}, or several, not {scale!r:.80}")
    ends = numbers(interval)
    if ends.shape != (2,) or not 0 <= ends[0] < ends[1] <= 1:
        raise DexportError(
            f"the interval of guidance must be two numbers that rise within 0 to 1, not {interval!r:.80}"
        )
    calls = [index for index, row in enumerate(table.rows) if row.calls]
    # Rounded, since a share of a whole number of calls may fall just below it: 0.58 of 50.
    first, last = (int(round(float(end) * len(calls), 9)) for end in ends)
    if first == last and (points > 1).any():
        raise DexportError(
            f"the interval of guidance, {ends[0]:g} to {ends[1]:g}, holds none of {len(calls)} calls; widen it"
        )
    scales = np.interp(np.linspace(0, len(points) - 1, len(calls)), np.arange(len(points)), points)
    scales[:first] = scales[last:] = 1.0
    own = dict(zip(calls, scales.tolist(), strict=True))
    rows = tuple(dataclasses.replace(row, guidance=own.get(index, 1.0)) for index, row in enumerate(table.rows))
    return dataclasses.replace(table, rows=rows)


def numbers(value: object) -> Array:
    """An array of numbers; of what is none, an empty one."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return np.zeros(0)
    return array.astype(np.float64) if array.dtype.kind in "iuf" else np.zeros(0)


def guide(
    without: Array, with_prompt: Array, scale: float, rescale: float = 0.0, *, patch: int | None = None,
    rows: bool = False,
) -> Array:  # fmt: skip
    """Return u + scale (c - u), float64, for the outputs u without and c with the prompt, [B, C, ...].

    https://arxiv.org/abs/2207.12598, formula 6, with its w as scale - 1. rescale: the share by which each sample's
    deviation is brought back to that of c, against too much contrast: https://arxiv.org/abs/2305.08891, section 3.4.
    patch: each token, C x patch x patch numbers of [B, C, h, w], is brought back to its length in c, as Qwen-Image
    does: https://arxiv.org/abs/2508.02324. rows: likewise each row of w numbers, as Lumina 2 does:
    https://arxiv.org/abs/2503.21758.
    """
    base = without.astype(np.float64)  # with a large scale the difference of two near outputs would lose digits
    guided: Array = base + scale * (with_prompt - base)
    if patch is not None:
        guided = guided * _ratio(_lengths(with_prompt.astype(np.float64), patch), _lengths(guided, patch))
    if rows:
        own, wanted = (
            np.linalg.norm(value.astype(np.float64), axis=-1, keepdims=True) for value in (guided, with_prompt)
        )
        guided = guided * _ratio(wanted, own)
    if not rescale:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = np.std(with_prompt, axis=axes, keepdims=True, ddof=1, dtype=np.float64) / np.std(
        guided, axis=axes, keepdims=True, ddof=1
    )
    corrected: Array = guided * (rescale * ratio + 1 - rescale)
    return corrected


def _lengths(output: Array, patch: int) -> Array:
    """The length of each token of [B, C, h, w], at each of its elements: [B, 1, h, w]."""
    batch, channels, height, width = output.shape
    tokens = output.reshape(batch, channels, height // patch, patch, width // patch, patch)
    lengths = np.sqrt(np.sum(tokens**2, axis=(1, 3, 5), keepdims=True))
    return np.broadcast_to(lengths, (batch, 1, *tokens.shape[2:])).reshape(batch, 1, height, width)


def _ratio(wanted: Array, own: Array) -> Array:
    """wanted / own; 1 where a token has no length to scale."""
    return np.divide(wanted, own, out=np.ones_like(own), where=own > 0)
