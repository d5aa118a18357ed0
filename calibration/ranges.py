"""From statistics to ranges: which part of an activation's values its 8 bits are spread over.

A wide range rounds coarsely, a narrow one cuts off. Four observers choose:

    min-max      all that was seen
    percentile   all but a share of the largest values
    mse          the range with the least mean squared error of rounding and cutting together
    entropy      the range whose quantized histogram tells the least from the original (Kullback-Leibler divergence,
                 Migacz, "8-bit inference with TensorRT", 2017)

A range is symmetric and its numbers are -127 to 127: TensorRT's kernels take no zero point, and OpenVINO's are faster
without one. The same observers choose for floats of 8 bits (calibration/numbers.py), with the errors that those make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from calibration.numbers import INT8, Numbers
from calibration.observe import HALF, OCTAVE, Observed, magnitudes
from runtimes.errors import DexportError

Array = NDArray[np.float64]
MOST = int(INT8.most)
SHARE = 2e-5  # of the values that are not 0, which the percentile observer cuts off
NARROWEST = 0.2  # of what was seen: the narrowest range that mse and entropy try
SMOOTH = 1e-4  # of the values: what entropy grants a bin that the quantized histogram says is empty
TRIED = 81  # ranges that they try


def scale(observed: Observed, observer: str = "mse", numbers: Numbers = INT8) -> float:
    """The scale of a value, by one of ``OBSERVERS``: a float x is held as the number nearest to x / scale."""
    if observer not in OBSERVERS:
        raise DexportError(f"no observer {observer!r}; there are {', '.join(OBSERVERS)}")
    sizes, counts = _folded(observed)
    return float(numbers.scale(OBSERVERS[observer](sizes, counts, observed.peak, numbers)))


def error_of(observed: Observed, scale: float, numbers: Numbers = INT8) -> float:
    """The mean squared error of a value's elements with this scale."""
    return error(*_folded(observed), scale * numbers.most, numbers)


def error(sizes: Array, counts: Array, limit: float, numbers: Numbers) -> float:
    """Mean squared error of magnitudes with their counts, rounded to numbers up to ``limit`` and cut off there."""
    step = limit / numbers.most
    return float((counts * numbers.error(sizes / step)).sum() / counts.sum()) * step**2


def _min_max(sizes: Array, counts: Array, peak: float, numbers: Numbers) -> float:
    return peak


def _percentile(sizes: Array, counts: Array, peak: float, numbers: Numbers) -> float:
    some = sizes > 0  # zeros need no range, and where nearly all are zeros the range would be one of nothing
    sizes, counts = sizes[some], counts[some]
    if not len(sizes):
        return peak
    place = int(np.searchsorted(np.cumsum(counts), (1 - SHARE) * counts.sum()))
    return min(peak, float(sizes[min(place, len(sizes) - 1)]))


def _mse(sizes: Array, counts: Array, peak: float, numbers: Numbers) -> float:
    return min(_tried(peak, numbers.widest), key=lambda limit: error(sizes, counts, limit, numbers))


def _entropy(sizes: Array, counts: Array, peak: float, numbers: Numbers) -> float:
    return min(_tried(peak, 1.0), key=lambda limit: _divergence(sizes, counts, limit, numbers))


OBSERVERS: Mapping[str, Callable[[Array, Array, float, Numbers], float]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
"""Each takes magnitudes, ascending, their counts, the greatest one and the numbers, and gives the range's end."""


def _tried(peak: float, widest: float) -> list[float]:
    return [peak * float(part) for part in np.linspace(NARROWEST, widest, TRIED)]


def _divergence(sizes: Array, counts: Array, limit: float, numbers: Numbers) -> float:
    """Kullback-Leibler divergence of what the quantized numbers can tell of the histogram from the histogram."""
    number = numbers.place(sizes / limit * numbers.most)
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
