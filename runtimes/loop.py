"""The loop that runs any sampler's table, and its noise.

The state is float64 around a float32 model: the sampler's own error then stays far below the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.errors import DexportError
from runtimes.session import Array
from runtimes.table import HISTORY, Row, Table

Denoiser = Callable[[Array, float, Row], Array]


@dataclass(frozen=True)
class Step:
    """What the loop has done: row ``index`` of ``total``, at timestep ``t``.

    sample: X' after the row, [B, C, ...] float64; output: the model's output, guidance applied, likewise, without
    what it learned of the variance; 0 where the row did not call it.
    """

    index: int
    total: int
    t: float
    sample: Array
    output: Array


def sample(
    table: Table,
    start: Array,
    model: Denoiser,
    noise: Callable[[], Array],
    known: Sequence[Array] | None = None,
) -> Iterator[Step]:
    """Run ``table`` and yield after each row; the caller shows progress, or stops by not asking for more.

    start: noise of unit variance [B, C, ...]. model: called with the scaled sample (float32, like ``start``), the
    timestep and the row; returns an output of that shape, or of twice the channels (see runtimes.table). noise: called
    for each fresh draw of that shape. known: an image of that shape and a mask, 1 where it stays and 0 where it is
    painted, for a table that keeps a known part; a third array is the noise of the image at every step, which is drawn
    anew for each without it.
    Raises DexportError where a shape is wrong or the model's output is not finite.
    """
    x = table.init_scale * _shaped(start, np.shape(start), "the start")
    saved, history, nothing = x, [np.zeros_like(x)] * HISTORY, np.zeros_like(x)
    image, mask, still = _known(known, table, x.shape) if known else (nothing, None, None)
    for index, row in enumerate(table.rows):
        output, learned = nothing, None
        if row.calls:
            output, learned = _halves(model((row.scale * x).astype(np.float32), row.t, row), x.shape, row)
        if row.h_x or row.h_m:
            history = [_bounded(row.h_x * x + row.h_m * output, row), *history[1:]]
        drawn = row.x_z or row.s_z or (row.known and mask is not None and still is None)
        fresh = _shaped(noise(), x.shape, "the noise") if drawn else nothing
        if row.deviation:
            fresh = fresh * _deviation(learned, row)
        registers = (x, saved, output, *history, fresh)
        x, saved = (
            _combine((row.x_x, row.x_s, row.x_m, *row.x_h, row.x_z), registers),
            _combine((row.s_x, row.s_s, row.s_m, *row.s_h, row.s_z), registers),
        )
        if row.known and mask is not None:
            x = mask * (row.known[0] * image + row.known[1] * (fresh if still is None else still)) + (1 - mask) * x
        if row.shift:
            history = [history[0], *history[:-1]]
        yield Step(index, len(table.rows), row.t, x, output)


def _shaped(value: Array, shape: tuple[int, ...], what: str) -> Array:
    """Return ``value`` in float64 after checking it."""
    array = np.asarray(value, np.float64)
    if array.ndim < 2 or array.shape != shape:
        raise DexportError(f"{what} has the shape {list(array.shape)}; the loop needs [B, C, ...] = {list(shape)}")
    if not np.isfinite(array).all():
        raise DexportError(
            f"{what} holds NaN or infinity; if the bundle is fp16, build it with --precision bf16 or fp32"
        )
    return array


def _known(known: Sequence[Array], table: Table, shape: tuple[int, ...]) -> tuple[Array, Array, Array | None]:
    """The known image, its mask and its noise, checked."""
    if not any(row.known for row in table.rows):
        raise DexportError("this sampler keeps no known part of an image; take RePaintScheduler, or leave the mask out")
    image, mask = _shaped(known[0], shape, "the known image"), np.asarray(known[1], np.float64)
    if mask.ndim != image.ndim or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise DexportError(
            f"the mask has the shape {list(mask.shape)}; it must go over that of the image, {list(shape)}"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise DexportError("the mask must hold numbers from 0 (paint) to 1 (keep)")
    return image, mask, _shaped(known[2], shape, "the noise of the known image") if len(known) > 2 else None


def _halves(value: Array, shape: tuple[int, ...], row: Row) -> tuple[Array, Array | None]:
    """The model's output, checked, and where it has twice the channels what it learned of the variance."""
    what, twice = f"the model's output at timestep {row.t:g}", (shape[0], 2 * shape[1], *shape[2:])
    if np.shape(value) != twice:
        return _shaped(value, shape, what), None
    output, learned = np.split(_shaped(value, twice, what), 2, axis=1)
    return output, learned


def _deviation(learned: Array | None, row: Row) -> Array:
    """The deviation of the noise where the model learned it."""
    if learned is None:
        raise DexportError(
            "this sampler takes a learned variance, and the model's output has no channels for it; "
            "set variance_type to 'fixed_small', or take another sampler"
        )
    start, slope, power = row.deviation
    if power and (learned < 0).any():
        raise DexportError(f"the variance that the model learned is below 0 at timestep {row.t:g}")
    deviation: Array = np.exp(start + slope * learned) * learned**power
    return deviation


def _bounded(value: Array, row: Row) -> Array:
    """H0 within the row's bounds: clipped, or by dynamic thresholding, each sample for itself."""
    if not row.threshold:
        return value if row.clip == np.inf else np.clip(value, -row.clip, row.clip)
    sizes = np.quantile(np.abs(value).reshape(len(value), -1), row.threshold, axis=1)
    bound = np.minimum(np.maximum(sizes, 1), row.clip).reshape(-1, *[1] * (value.ndim - 1))
    thresholded: Array = np.clip(value, -bound, bound) / bound
    return thresholded


def _combine(weights: tuple[float, ...], registers: tuple[Array, ...]) -> Array:
    terms = [(weight, register) for weight, register in zip(weights, registers, strict=True) if weight]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]  # a register that is kept needs no copy: none is ever written to
    if not terms:
        return np.zeros_like(registers[0])
    total: Array = terms[0][0] * terms[0][1]
    for weight, register in terms[1:]:
        total += weight * register
    return total


def noise_source(seeds: Sequence[int], shape: tuple[int, ...]) -> Callable[[], Array]:
    """Return a source of standard normal noise: each call gives the next draw, [len(seeds), *shape] float64.

    Image i has a stream of its own, numpy's Philox seeded by ``seeds[i]``, so that it does not depend on the batch
    that it is made in. The first draw is meant for the loop's start.
    """
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise DexportError(f"a seed must be a whole number from 0, not {seed!r}")
    streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
    return lambda: np.stack([stream.standard_normal(shape) for stream in streams])
