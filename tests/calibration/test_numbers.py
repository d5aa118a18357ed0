"""8-bit floats against ONNX Runtime's and ml_dtypes' own, and the error that is said of them against samples."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize, ranges
from calibration.numbers import FP8, INT8, Numbers, with_half_scales
from tests.calibration.small import Array, graph, run
from tests.calibration.test_quantize import GRAPHS, SHAPES, normal
from tests.calibration.test_ranges import VALUES, observed

E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)  # 0 to 448, all there are
RANDOM = np.random.default_rng(3)


def fake(values: Array, scale: float | Array) -> Array:
    """What is left of values after E4M3, by ml_dtypes; beyond its end they are cut off."""
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def test_numbers_are_those_of_a_runtime() -> None:
    """All of them, the middles between two, what is just beside these, zeros, and what is beyond the end."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    values = np.concatenate([E4M3, middles, middles * (1 - 1e-6), middles * (1 + 1e-6), [460.0, 1e6]])
    values = np.concatenate([values, -values]).astype(np.float32)
    model = graph(
        "g (float[N] x) => (float8e4m3fn[N] y, float[N] z) { y = QuantizeLinear(x, s, o) z = DequantizeLinear(y, s) }",
        {"s": np.float32(1), "o": np.zeros((), ml_dtypes.float8_e4m3fn)},
    )
    model.graph.outputs.pop(0)
    np.testing.assert_array_equal(FP8.round(values).astype(np.float32), run(model, {"x": values})["z"])
    np.testing.assert_array_equal(FP8.place(E4M3), np.arange(127))
    assert np.isfinite(FP8.round(values).astype(np.float32)).all()


def test_spacing_is_the_distance_to_the_next_number() -> None:
    np.testing.assert_array_equal(FP8.spacing(E4M3[:-1]), np.diff(E4M3))


@pytest.mark.parametrize("size", [2e-4, 0.01, 1.0, 100.0, 300.0], ids=str)
@pytest.mark.parametrize("numbers", [INT8, FP8], ids=lambda numbers: numbers.name)
def test_the_error_is_that_of_samples(numbers: Numbers, size: float) -> None:
    """From where most become 0, over subnormal numbers, to where many are cut off."""
    values = RANDOM.standard_normal(200_000) * size
    exact = np.square(numbers.round(values).astype(np.float64) - values).mean()
    assert numbers.error(np.abs(values)).mean() == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("name", list(VALUES))
def test_mse_is_as_good_as_a_search_over_the_values(name: str) -> None:
    values = VALUES[name]
    peak = float(np.abs(values).max())

    def cost(end: float) -> float:
        return float(np.square(fake(values, end / 448) - values).mean())

    best = min(cost(peak * part) for part in np.geomspace(0.1, 4, 300))
    found = ranges.scale(observed(values), "mse", FP8)
    assert cost(found * 448) <= 1.03 * best
    assert ranges.error_of(observed(values), found, FP8) == pytest.approx(cost(found * 448), rel=0.06)


def test_an_outlier_costs_a_float_format_nothing_and_whole_numbers_much() -> None:
    values = RANDOM.standard_normal(100_000)
    outlier = np.append(values, 400.0)

    def share(values: Array, numbers: Numbers) -> float:
        scale = ranges.scale(observed(values), "min-max", numbers)
        return ranges.error_of(observed(values), scale, numbers)

    # Of the outlier itself no more is lost than half a step of 6.25 %.
    assert share(outlier, FP8) < 1.1 * share(values, FP8) + (400 / 32) ** 2 / len(values)
    assert share(outlier, INT8) > 100 * share(values, INT8)


@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_layer_in_fp8_is_the_layer_of_rounded_factors(name: str) -> None:
    text, weights = GRAPHS[name]
    model = graph(text, weights)
    (layer,) = layers.find(model)[0]
    others = tuple(axis for axis in range(weights["w"].ndim) if axis != layer.out_axis)
    scale = np.abs(weights["w"]).max(others, keepdims=True) / 448
    x = normal(*SHAPES[name])
    rounded = weights | {"w": fake(weights["w"], scale).astype(np.float32)}
    expected = run(graph(text, rounded), {"x": fake(x, np.float32(0.01)).astype(np.float32)})["y"]
    model, modified = quantize.write(model, [layer], {"x": 0.01}, FP8)
    assert modified and model.graph.initializers["w_quantized"].dtype == ir.DataType.FLOAT8E4M3FN
    actual = run(model, {"x": x})["y"]
    # A weight just at a middle may be rounded to either side, by the last bit of its scale.
    assert np.square(actual - expected).mean() < 1e-5 * np.square(expected).mean()
    plain = run(graph(*GRAPHS[name]), {"x": x})["y"]
    assert np.abs(actual - plain).max() > 1e-3


@pytest.mark.parametrize("peak", [1e-9, 3e-5, 0.02, 5.0, 6e4, 9e6, 1e9], ids=str)
def test_scales_of_half_precision_are_held_exactly_and_cut_nothing_off(peak: float) -> None:
    for numbers in (INT8, FP8):
        scale = float(with_half_scales(numbers).scale(peak))
        assert scale * numbers.most >= peak * (1 - 1e-6) and scale > 0
        if peak / numbers.most < 65504:
            assert np.float16(scale) == scale
        assert scale <= max(peak / numbers.most * 1.001, 6e-8) or peak < 1e-3
