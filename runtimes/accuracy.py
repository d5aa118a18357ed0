"""How near two results are, and how near they must be: the measures and the bands of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.manifest import Graph

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


@dataclass(frozen=True)
class Band:
    """The least that a bundle of one precision must reach against the fp32 torch model.

    ``graph``: SQNR in dB of each graph alone; ``latents``: SQNR of the free run's last latents; ``image``: PSNR in dB.
    """

    graph: float
    latents: float
    image: float


BANDS = {
    "fp32": Band(graph=90.0, latents=80.0, image=60.0),
    "fp16": Band(graph=50.0, latents=40.0, image=40.0),
    "bf16": Band(graph=34.0, latents=30.0, image=30.0),
    "w8": Band(graph=20.0, latents=14.0, image=20.0),
    "w4": Band(graph=8.0, latents=4.0, image=10.0),
    "int8": Band(graph=16.0, latents=10.0, image=18.0),
    "fp8": Band(graph=14.0, latents=8.0, image=14.0),
}
"""The noise that each precision has anyway, and room for deeper models.

On the reference model OpenVINO and ONNX Runtime in fp32 are 124 to 136 dB from torch in each graph, OpenVINO in bf16
41 to 56 dB; graphs cast to fp16 are 61 to 74 dB away, the denoiser in int8 27 to 38. In fp8, simulated, it is 17 dB and
more: 3 bits of mantissa are an error of 2.6 % of each number, whatever its size, where int8's is that of the largest.
Deeper graphs have more noise: the encoder of a model of SD 1.5's size has 95 dB in fp32. ``dexport build`` measures it
and the manifest holds it. tests/exporter/test_gate.py has subtly wrong models that must fail in each band. The bands of
8 bits find a graph that is broken; whether it is good enough is what a build's budget asks of its pictures.
"""


def band(graph: Graph, precision: str) -> Band:
    """The band of one graph: of its own precision where it notes one, as those beside an int8 denoiser do."""
    return BANDS[graph.properties.get("precision", precision)]
