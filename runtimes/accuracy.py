"""How near two results are: the measures of the gate and of the self-test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
EXACT_DB = 200.0  # what is said of two equal arrays; float32 cannot reach it otherwise


@dataclass(frozen=True)
class Agreement:
    """One array against its reference: largest error, relative L2 error, signal to noise in dB, finiteness."""

    max_abs: float
    relative: float
    sqnr_db: float
    finite: bool


def compare(expected: Array, actual: Array) -> Agreement:
    """Compare ``actual`` with ``expected`` in float64. A non-finite value or another shape agrees with nothing."""
    if expected.shape != actual.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return Agreement(float("inf"), float("inf"), -EXACT_DB, False)
    reference = expected.astype(np.float64)
    error = actual.astype(np.float64) - reference
    noise, signal = float(np.square(error).sum()), float(np.square(reference).sum())
    if noise == 0:
        return Agreement(0.0, 0.0, EXACT_DB, True)
    if signal == 0:
        return Agreement(float(np.abs(error).max()), float("inf"), -EXACT_DB, True)
    relative = (noise / signal) ** 0.5
    return Agreement(float(np.abs(error).max()), relative, float(-20 * np.log10(relative)), True)


def psnr(expected: Array, actual: Array, peak: float = 1.0) -> float:
    """Peak signal to noise in dB of images whose values span ``peak``; EXACT_DB where they are equal."""
    error = float(np.square(expected.astype(np.float64) - actual.astype(np.float64)).mean())
    if not np.isfinite(error):
        return -EXACT_DB
    return min(EXACT_DB, 10 * float(np.log10(peak**2 / error))) if error else EXACT_DB


def ssim(expected: Array, actual: Array, window: int = 7) -> float:
    """Mean structural similarity of images [B, C, H, W] in [0, 1] (Wang et al. 2004), flat square window.

    The window and the unbiased variance are scikit-image's defaults.
    """
    x, y = expected.astype(np.float64), actual.astype(np.float64)
    window = min(window, *x.shape[-2:])
    count = window * window

    def mean(value: Array) -> Array:
        blocks = np.lib.stride_tricks.sliding_window_view(value, (window, window), (-2, -1))
        return np.asarray(blocks.mean((-2, -1)))

    mx, my = mean(x), mean(y)
    unbiased = count / (count - 1) if count > 1 else 1.0
    vx, vy = unbiased * (mean(x * x) - mx * mx), unbiased * (mean(y * y) - my * my)
    cov = unbiased * (mean(x * y) - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
