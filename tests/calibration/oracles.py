"""Layers in numpy, in float64, as their specification says."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tests.calibration.small import Array


def conv(x: Array, weight: Array, bias: Array | None = None, pad: int = 0, stride: int = 1, group: int = 1) -> Array:
    """Convolution over any number of axes: x [B,C,...], weight [O,C/group,...]."""
    spatial = x.ndim - 2
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0)] + [(pad, pad)] * spatial)
    axes = tuple(range(2, x.ndim))
    windows = sliding_window_view(padded, weight.shape[2:], axes)  # [B,C,places...,kernel...]
    windows = windows[(slice(None), slice(None), *[slice(None, None, stride)] * spatial)]
    contracted = (1, *range(2 + spatial, 2 + 2 * spatial))
    parts = [
        np.tensordot(part, each.astype(np.float64), (contracted, tuple(range(1, weight.ndim))))  # [B,places...,O]
        for part, each in zip(np.split(windows, group, 1), np.split(weight, group, 0), strict=True)
    ]
    result = np.moveaxis(np.concatenate(parts, -1), -1, 1)
    return result if bias is None else result + bias.reshape(-1, *[1] * spatial)


def rounded(weight: Array, axis: int) -> Array:
    """A weight in 127 steps either way for each channel along ``axis``."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    step = np.abs(weight).max(others, keepdims=True) / 127.0
    step[step == 0] = 1
    return np.rint(weight / step) * step
