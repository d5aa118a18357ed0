"""Observers' ranges against searches over samples, and on distributions that histograms make hard."""

from __future__ import annotations

import numpy as np
import pytest

from calibration import ranges
from calibration.observe import OCTAVE
from tests.calibration.small import Array, fake
from tests.calibration.test_ranges import observed

RANDOM = np.random.default_rng(8)
BIN = 2 ** (1 / OCTAVE)
SAMPLES = {
    "normal": RANDOM.standard_normal(300_000),
    "laplace": RANDOM.laplace(size=300_000),
    "normal, tiny": RANDOM.standard_normal(300_000) * 1e-5,
    "one sign": np.abs(RANDOM.standard_normal(300_000)),
}


def limit(values: Array, observer: str) -> float:
    return ranges.scale(observed(values), observer) * ranges.MOST


@pytest.mark.parametrize("name", list(SAMPLES))
def test_mse_is_within_a_bin_of_a_search_over_the_samples(name: str) -> None:
    values = SAMPLES[name]
    peak = float(np.abs(values).max())
    tried = [peak * part for part in np.linspace(0.1, 1, 181)]
    best = min(tried, key=lambda end: float(np.square(fake(values, end / 127) - values).mean()))
    assert best < 0.95 * peak  # it is worth cutting something off
    assert best / BIN <= limit(values, "mse") <= best * BIN


def divergence(values: Array, end: float, bins: int = 2048) -> float:
    """Of the numbers' histogram, spread over evenly, from the values' over even bins, both with 1e-4 added for all."""
    size = np.abs(values)
    seen = np.histogram(np.minimum(size, end), bins, (0, end))[0].astype(float)
    inside = np.histogram(size[size <= end], bins, (0, end))[0].astype(float)
    number = np.rint((np.arange(bins) + 0.5) / bins * 127).astype(int)
    some = inside > 0
    told = np.bincount(number, inside) / np.maximum(np.bincount(number, some), 1)
    p, q = seen / seen.sum(), np.where(some, told[number], 0)
    q = (q / q.sum() + 1e-4) / (1 + 1e-4 * bins)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def test_entropy_cuts_off_where_a_search_over_the_samples_does() -> None:
    """A narrow bulk and a thin tail up to 20 times its width."""
    values = np.append(RANDOM.standard_normal(300_000), RANDOM.uniform(4, 20, 30))
    tried = np.linspace(0.2, 1, 41) * np.abs(values).max()
    best = min(tried, key=lambda end: divergence(values, end))
    found = limit(values, "entropy")
    assert best < 0.5 * np.abs(values).max() and found < 0.5 * np.abs(values).max()


@pytest.mark.parametrize("observer", list(ranges.OBSERVERS))
@pytest.mark.parametrize(
    "values",
    [
        np.repeat([0.0, 1.0], 5000),
        np.repeat([0.0, -1.0, 1.0], 5000),
        np.repeat([0.1, 1.0], 5000),
        np.append(np.zeros(9000), RANDOM.normal(5, 0.1, 1000)),
        np.append(np.zeros(1_000_000), [2.0, -3.0]),
    ],
    ids=["0 1", "-1 0 1", "0.1 1", "far from its zeros", "nearly all zeros"],
)
def test_values_with_a_gap_between_them_are_not_cut_off(values: Array, observer: str) -> None:
    peak = float(np.abs(values).max())
    assert limit(values, observer) == pytest.approx(peak, rel=0.1)
    error = np.square(fake(values, limit(values, observer) / 127) - values).mean()
    assert error < 0.02 * np.square(values).mean()


@pytest.mark.parametrize("observer", list(ranges.OBSERVERS))
def test_a_range_does_not_depend_on_the_sign_and_follows_the_size(observer: str) -> None:
    """Times a power of two all values are whole octaves further, but for those that become zeros."""
    values = SAMPLES["laplace"]
    found = limit(values, observer)
    assert limit(-values, observer) == found
    assert limit(values * 2.0**-8, observer) * 2.0**8 == pytest.approx(found, rel=0.05)
    assert found <= np.float32(np.abs(values).max()) * (1 + 1e-6)


def test_percentile_cuts_off_its_share_and_min_max_nothing() -> None:
    values = SAMPLES["normal"]
    sparse = np.append(values, np.zeros(3_000_000))  # zeros have no share: they are held exactly anyway
    expected = np.quantile(np.abs(values), 1 - ranges.SHARE)
    for given in (values, sparse):
        assert expected / BIN <= limit(given, "percentile") <= expected * BIN
        assert limit(given, "min-max") == pytest.approx(np.abs(values).max(), rel=1e-6)


@pytest.mark.parametrize("observer", list(ranges.OBSERVERS))
def test_values_below_all_bins_have_a_range(observer: str) -> None:
    found = ranges.scale(observed(RANDOM.standard_normal(1000) * 1e-12), observer)
    assert 1e-15 < found < 1e-13
