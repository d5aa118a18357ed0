"""Each observer's range against a search over the values themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration import ranges
from calibration.observe import HALF, LOWEST, OCTAVE, Observed
from runtimes.errors import DexportError
from tests.calibration.small import fake

RANDOM = np.random.default_rng(0)
VALUES = {
    "normal": RANDOM.standard_normal(200_000),
    "laplace": RANDOM.laplace(size=200_000),
    "one outlier": np.append(RANDOM.standard_normal(100_000), 40.0),
    "silu": (lambda x: x / (1 + np.exp(-x)))(RANDOM.standard_normal(200_000) * 2),
}
BIN = 2 ** (1 / OCTAVE)  # how much wider each bin is than the last


def observed(values: NDArray[Any]) -> Observed:
    """What the graph would have counted."""
    size = np.abs(values)
    place = np.clip(np.floor((np.log2(np.maximum(size, 1e-30)) - LOWEST) * OCTAVE), 0, HALF - 1).astype(int)
    histogram = np.bincount((place + HALF * (values < 0)).ravel(), minlength=2 * HALF)
    bounds = np.array([[values.min(), values.max()]], np.float32)
    each = np.array([size.max()], np.float32)
    return Observed(bounds, each, each, each, histogram)


@pytest.mark.parametrize("name", list(VALUES))
def test_mse_is_as_good_as_a_search_over_the_values(name: str) -> None:
    values = VALUES[name]
    peak = np.abs(values).max()

    def cost(limit: float) -> float:
        return float(np.square(fake(values, limit / 127) - values).mean())

    best = min(cost(peak * part) for part in np.linspace(0.02, 1, 400))
    found = ranges.scale(observed(values), "mse")
    # SiLU's values crowd at its minimum, where errors of rounding are not spread evenly.
    assert cost(found * 127) <= (1.1 if name == "silu" else 1.02) * best
    assert ranges.error_of(observed(values), found) == pytest.approx(
        cost(found * 127), rel=0.1 if name == "silu" else 0.03
    )


@pytest.mark.parametrize("name", list(VALUES))
def test_percentile_and_min_max(name: str) -> None:
    values = VALUES[name]
    assert ranges.scale(observed(values), "min-max") * 127 == pytest.approx(np.abs(values).max(), rel=1e-6)
    expected = np.quantile(np.abs(values), 1 - ranges.SHARE)
    found = ranges.scale(observed(values), "percentile") * 127
    assert expected / BIN <= found <= expected * BIN


def test_entropy_cuts_a_far_outlier_and_little_else() -> None:
    assert ranges.scale(observed(VALUES["one outlier"]), "entropy") * 127 < 15
    assert ranges.scale(observed(np.linspace(-1, 1, 100_001)), "entropy") * 127 > 0.9


def test_zeros_and_unknown_names_are_refused() -> None:
    with pytest.raises(DexportError, match="only zeros"):
        ranges.scale(observed(np.zeros(10)))
    with pytest.raises(DexportError, match="no observer 'median'; there are min-max, percentile, mse, entropy"):
        ranges.scale(observed(VALUES["normal"]), "median")


def test_the_least_scale_has_a_reciprocal() -> None:
    tiny = ranges.scale(observed(np.full(10, 1e-38)), "min-max")
    assert np.isfinite(np.float32(1) / np.float32(tiny))
