"""The measures of the judge, and how sure they are: retrieval, Fréchet distance, PSNR, and intervals of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from data import load
from numpy.typing import NDArray

from runtimes.accuracy import psnr

Array = NDArray[Any]
MIDDLE = (2.5, 97.5)  # percentiles: 95 % lie between them
RESAMPLES = 2000  # of a bootstrap
PERMUTATIONS = 300  # of the null, each of which costs two Fréchet distances


def retrieval(images: Array, right: list[int]) -> tuple[Array, Array]:
    """For each image whether its emoji is the nearest of all, and whether it is among the five nearest."""
    tiles = load()[0].reshape(-1, 32 * 32 * 3).astype(np.float32) / 255
    flat = images.transpose(0, 2, 3, 1).reshape(len(images), -1).astype(np.float32)
    distance = (flat**2).sum(1)[:, None] - 2 * flat @ tiles.T + (tiles**2).sum(1)[None]
    order = np.argsort(distance, axis=1)
    first = order[:, 0] == right
    return first, (order[:, :5] == np.asarray(right)[:, None]).any(axis=1)


def frechet(one: Array, other: Array) -> float:
    """Fréchet distance of Gaussians fitted to two sets of latents [N, ...]."""
    return Gaussian(one).distance(other)


class Gaussian:
    """A Gaussian fitted to latents [N, ...]."""

    def __init__(self, latents: Array) -> None:
        self.mean, self.covariance = _moments(latents)
        values, vectors = np.linalg.eigh(self.covariance)
        self._root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def distance(self, latents: Array) -> float:
        """The Fréchet distance to a Gaussian fitted to other latents (Dowson and Landau 1982)."""
        mean, covariance = _moments(latents)
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(self._root @ covariance @ self._root), 0, None)).sum()
        traces = np.trace(self.covariance) + np.trace(covariance)
        return float(np.square(self.mean - mean).sum() + traces - 2 * cross)


def _moments(latents: Array) -> tuple[Array, Array]:
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    return flat.mean(0), np.cov(flat, rowvar=False)


def interval(values: Array, measure: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """The bootstrap's 95 % interval of a measure of values [N]: over samples drawn from them with replacement.

    measure: takes values and ``axis``, like ``numpy.median``. The percentile method (Efron and Tibshirani 1993).
    """
    drawn = np.asarray(values)[np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))]
    low, high = np.percentile(measure(drawn, axis=1), MIDDLE)
    return float(low), float(high)


def null_interval(one: Array, other: Array, truth: Array) -> tuple[float, float]:
    """Where 95 % of the differences of two runs' distances to the data lie, if the runs differ in their seeds alone.

    one, other, truth: latents [N, ...], row i of the same prompt. Each prompt's two pictures change places at random: a
    permutation test, so that neither run is the better one.
    """
    random, data = np.random.default_rng(0), Gaussian(truth)
    found = []
    for _ in range(PERMUTATIONS):
        swapped = (random.random(len(truth)) < 0.5).reshape(-1, *[1] * (truth.ndim - 1))
        first, second = np.where(swapped, other, one), np.where(swapped, one, other)
        found.append(data.distance(first) - data.distance(second))
    low, high = np.percentile(found, MIDDLE)
    return float(low), float(high)


def lowest_tenth(values: Array, axis: int | None = None) -> Any:
    """The 10th percentile."""
    return np.percentile(values, 10, axis=axis)


class Reference:
    """What a model is compared with: the pictures of another one for the same prompts."""

    def __init__(self, images: Array, again: Array, right: list[int], encode: Callable[[Array], Array]) -> None:
        """``again``: pictures of the same model from other seeds; ``encode``: the one yardstick for all latents."""
        data = load()[0][right].transpose(0, 3, 1, 2).astype(np.float32) / 255
        self.images, self.right, self._encode = images, right, encode
        self.hits = retrieval(images, right)[0].astype(float)
        self.truth, self.latents, self._again = encode(data), encode(images), encode(again)
        self.data = Gaussian(self.truth)
        self.seeds = frechet(self.latents, self._again)  # the distance that nothing but the seeds makes

    @cached_property
    def null(self) -> tuple[float, float]:
        """The interval that other seeds alone move the Fréchet distance to the data in."""
        return null_interval(self.latents, self._again, self.truth)

    def compare(self, images: Array) -> dict[str, Any]:
        """The figures of pictures from the same prompts and seeds, by name; intervals as [low, high], 95 %."""
        found = np.array([psnr(one, other) for one, other in zip(self.images, images, strict=True)])
        difference = retrieval(images, self.right)[0] - self.hits
        latents = self._encode(images)
        return {
            "frechet_to_other": frechet(latents, self.latents),
            "psnr_median_db": float(np.median(found)),
            "psnr_median_95": list(interval(found, np.median)),
            "psnr_10th_percentile_db": float(lowest_tenth(found)),
            "psnr_10th_percentile_95": list(interval(found, lowest_tenth)),
            "top1_difference": float(difference.mean()),
            "top1_difference_95": list(interval(difference)),
            "frechet_shift": self.data.distance(latents) - self.data.distance(self.latents),
            "frechet_shift_null_95": list(self.null),
        }


@dataclass(frozen=True)
class Gate:
    """How far from its reference a model may be: the least PSNR in dB of the median picture and of the one that a tenth
    are worse than, and the most that top-1 may fall, in percentage points.
    """

    psnr: float = 36.0
    psnr_10th: float = 30.0
    top1_drop: float = 1.5

    def missed(self, figures: dict[str, Any]) -> list[str]:
        """What of ``Reference.compare`` is not good enough, a line each; NaN never is."""
        low, high = figures["frechet_shift_null_95"]
        drop, shift = -100 * figures["top1_difference"], figures["frechet_shift"]
        median, tenth = figures["psnr_median_db"], figures["psnr_10th_percentile_db"]
        checks = [
            (median >= self.psnr, f"median PSNR {median:.1f} dB, at least {self.psnr:g} are needed"),
            (
                tenth >= self.psnr_10th,
                f"10th percentile of PSNR {tenth:.1f} dB, at least {self.psnr_10th:g} are needed",
            ),
            (drop <= self.top1_drop, f"top-1 falls by {drop:.1f} points, at most {self.top1_drop:g} are allowed"),
            (low <= shift <= high, f"Fréchet shift {shift:+.2f}, outside [{low:+.2f}, {high:+.2f}] that seeds explain"),
        ]
        return [line for good, line in checks if not good]
