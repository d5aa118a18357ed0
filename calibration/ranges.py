"""From statistics to ranges: which part of an activation's values its 8 bits are spread over.

A wide range rounds coarsely, a narrow one cuts off. Four observers choose:

    min-max      all that was seen
    percentile   all but a share of the largest values
    mse          the range with the least mean squared error of rounding and cutting together
    entropy      the range whose quantized histogram tells the least from the original (Kullback-Leibler divergence,
                 Migacz, "8-bit inference with TensorRT", 2017)

A range is symmetric and its numbers are -127 to 127: TensorRT's kernels take no zero point, and OpenVINO's are faster
without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from calibration.observe import HALF, OCTAVE, Observed, magnitudes
from runtimes.errors import DexportError

Array = NDArray[np.float64]
MOST = 127  # the greatest number; -128 is not used, so that a value and its negative are alike
SHARE = 2e-5  # of the values that are not 0, which the percentile observer cuts off
NARROWEST = 0.2  # of what was seen: the narrowest range that mse and entropy try
SMOOTH = 1e-4  # of the values: what entropy grants a bin that the quantized histogram says is empty
TRIED = 81  # ranges that they try
NEAREST_ZERO = 1e-30  # the least scale: its reciprocal is a float32 too


def scale(observed: Observed, observer: str = "mse") -> float:
    """The scale of a value, by one of ``OBSERVERS``: a float x is held as the whole number round(x / scale)."""
    if observer not in OBSERVERS:
        raise DexportError(f"no observer {observer!r}; there are {', '.join(OBSERVERS)}")
    sizes, counts = _folded(observed)
    return float(np.float32(max(OBSERVERS[observer](sizes, counts, observed.peak) / MOST, NEAREST_ZERO)))


def error_of(observed: Observed, scale: float) -> float:
    """The mean squared error of a value's elements with this scale."""
    return error(*_folded(observed), scale * MOST)


def error(sizes: Array, counts: Array, limit: float) -> float:
    """Mean squared error of magnitudes with their counts, rounded to 127 steps up to ``limit`` and cut off there.

    Below one step a value becomes 0 or the step. Elsewhere the error of rounding is uniform, of variance step²/12:
    the bins there are narrower than steps or full of values, and their middles would be rounded all to one side.
    """
    step = limit / MOST
    rounding = np.where(sizes < step, np.minimum(sizes, step - sizes) ** 2, step**2 / 12)
    squared = np.where(sizes > limit, (sizes - limit) ** 2, rounding)
    return float((counts * squared).sum() / counts.sum())


def _min_max(sizes: Array, counts: Array, peak: float) -> float:
    return peak


def _percentile(sizes: Array, counts: Array, peak: float) -> float:
    some = sizes > 0  # zeros need no range, and where nearly all are zeros the range would be one of nothing
    sizes, counts = sizes[some], counts[some]
    if not len(sizes):
        return peak
    place = int(np.searchsorted(np.cumsum(counts), (1 - SHARE) * counts.sum()))
    return min(peak, float(sizes[min(place, len(sizes) - 1)]))


def _mse(sizes: Array, counts: Array, peak: float) -> float:
    return min(_tried(peak), key=lambda limit: error(sizes, counts, limit))


def _entropy(sizes: Array, counts: Array, peak: float) -> float:
    return min(_tried(peak), key=lambda limit: _divergence(sizes, counts, limit))


OBSERVERS: Mapping[str, Callable[[Array, Array, float], float]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
"""Each takes magnitudes, ascending, their counts and the greatest one, and gives the range's end."""


def _tried(peak: float) -> list[float]:
    return [peak * float(part) for part in np.linspace(NARROWEST, 1, TRIED)]


def _divergence(sizes: Array, counts: Array, limit: float) -> float:
    """Kullback-Leibler divergence of what the quantized numbers can tell of the histogram from the histogram."""
    number = np.minimum(np.rint(sizes / limit * MOST), MOST).astype(int)
    inside = sizes <= limit
    if not inside.any():
        return np.inf
    # What is cut off is seen at the end of the range, and the quantized histogram does not know of it.
    last = int(np.flatnonzero(inside)[-1])
    cut = counts[~inside].sum()
    seen = np.where(inside, counts, 0.0)
    empty = sizes[last] < limit / 2 ** (1 / OCTAVE)  # the end of the range: what is cut off does not lie near others
    seen[last] += 0 if empty else cut
    total = np.bincount(number[inside], counts[inside], MOST + 1)
    bins = np.bincount(number[inside], minlength=MOST + 1)
    told = (total / np.maximum(bins, 1))[number[inside]]  # a number's values, spread over the bins that it stands for
    p, q = seen[inside] / (seen.sum() + empty * cut), told / max(told.sum(), 1)
    if not (empty and cut):
        return float((p * np.log(p / q)).sum())
    end = cut / counts.sum()  # in a bin of its own, to which the quantized histogram, smoothed, gives SMOOTH
    return float((p * np.log(p / (q * (1 - SMOOTH)))).sum() + end * np.log(end / SMOOTH))


def _folded(observed: Observed) -> tuple[Array, Array]:
    """The middles of the magnitudes' bins that hold something, ascending, and how many values each holds."""
    counts = (observed.histogram[:HALF] + observed.histogram[HALF:]).astype(np.float64)
    some = counts > 0
    if not some.any() or observed.peak == 0:
        raise DexportError("only zeros were observed")
    return np.minimum(magnitudes()[some], observed.peak), counts[some]  # the last bin reaches beyond the peak
