"""ONNX Runtime's integer operators give what the graph of QuantizeLinear and DequantizeLinear says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize
from exporter.compile.onnxruntime_integer import convolve, make_unsigned, multiply
from runtimes.errors import DexportError
from tests.calibration.small import Array, graph, run

RANDOM = np.random.default_rng(6)
STEP = 0.02  # of the input; some of what is drawn lies beyond 128 of them on both sides, and is cut off alike


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def write(text: str, weights: dict[str, Array], scales: dict[str, float]) -> ir.Model:
    model = graph(f"g {text}", weights)
    return quantize.write(model, layers.find(model)[0], scales)[0]


CONVOLUTIONS = {
    "padded": ("(float[B,4,6,6] x) => (float[B,5,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }", (2, 4, 6, 6),
               (5, 4, 3, 3)),
    "strided, without bias": ("(float[B,4,6,6] x) => (float[B,5,3,3] y) { y = Conv<pads=[1,1,1,1], strides=[2,2]>"
                              "(x, w) }", (2, 4, 6, 6), (5, 4, 3, 3)),
    "one axis": ("(float[B,4,9] x) => (float[B,5,9] y) { y = Conv<pads=[1,1]>(x, w, b) }", (2, 4, 9), (5, 4, 3)),
    "grouped": ("(float[B,4,6,6] x) => (float[B,6,4,4] y) { y = Conv<group=2>(x, w, b) }", (2, 4, 6, 6), (6, 2, 3, 3)),
    "depthwise": ("(float[B,4,6,6] x) => (float[B,4,6,6] y) { y = Conv<group=4, pads=[1,1,1,1]>(x, w) }", (2, 4, 6, 6),
                  (4, 1, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_are_right_within_one_step_of_their_output(name: str) -> None:
    text, shape, sides = CONVOLUTIONS[name]
    weights = {"w": normal(*sides), "b": normal(sides[0])}
    x = normal(*shape)
    x.flat[::7] *= 4
    assert x.min() < -129 * STEP and x.max() > 128 * STEP
    expected = run(write(text, weights, {"x": STEP}), {"x": x})["y"]
    step = float(np.abs(expected).max()) / 127
    model, modified = convolve(write(text, weights, {"x": STEP, "y": step}))
    assert modified and [node.op_type for node in model.graph] == [
        "QuantizeLinear", "QLinearConv", "DequantizeLinear",
    ]  # fmt: skip
    signed = run(model, {"x": x})["y"]
    np.testing.assert_allclose(signed, expected, atol=step)
    assert np.unique(np.rint(signed / step)).size > 20  # no constant would do
    assert make_unsigned(model)[1]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], signed)


MULTIPLICATIONS = {
    "rank 2": ("(float[B,8] x) => (float[B,5] y) { y = MatMul(x, w) }", (6, 8), []),
    "rank 3": ("(float[B,7,8] x) => (float[B,7,5] y) { h = MatMul(x, w) y = Add(h, b) }", (2, 7, 8), []),
    "rank 4": ("(float[B,3,7,8] x) => (float[B,3,7,5] y) { h = MatMul(x, w) y = Add(b, h) }", (2, 3, 7, 8), []),
    "one number for all channels": (
        "(float[B,8] x) => (float[B,5] y) { h = MatMul(x, w) y = Add(h, one) }", (6, 8), ["Add"]
    ),
    "a matrix added": ("(float[6,8] x) => (float[6,5] y) { h = MatMul(x, w) y = Add(h, m) }", (6, 8), ["Add"]),
    "a product read twice": (
        "(float[B,8] x) => (float[B,5] y) { h = MatMul(x, w) k = Add(h, b) y = Mul(h, k) }", (6, 8), ["Add", "Mul"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MULTIPLICATIONS))
def test_linear_layers_are_right_and_lose_nothing_behind_them(name: str) -> None:
    text, shape, behind = MULTIPLICATIONS[name]
    weights = {"w": normal(8, 5), "b": normal(5), "one": normal(1), "m": normal(6, 5)}
    x = normal(*shape)
    x.flat[::7] *= 4
    assert x.min() < -129 * STEP and x.max() > 128 * STEP
    expected = run(write(text, weights, {"x": STEP}), {"x": x})["y"]
    model, modified = multiply(write(text, weights, {"x": STEP}))
    assert modified and [node.op_type for node in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat", *behind]
    signed = run(model, {"x": x})["y"]
    np.testing.assert_allclose(signed, expected, rtol=1e-5, atol=1e-4)
    assert make_unsigned(model)[1]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], signed)


def test_a_product_that_is_an_output_stays_one() -> None:
    text = "(float[B,8] x) => (float[B,5] y, float[B,5] h) { h = MatMul(x, w) y = Add(h, b) }"
    weights, x = {"w": normal(8, 5), "b": normal(5)}, normal(6, 8)
    expected = run(write(text, weights, {"x": STEP}), {"x": x})
    found = run(multiply(write(text, weights, {"x": STEP}))[0], {"x": x})
    assert list(found) == ["y", "h"]
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-4)


def test_a_gemm_and_a_layer_in_float_stay_as_they_are() -> None:
    text = "(float[B,8] x) => (float[B,5] y) { h = Gemm(x, w, b) k = MatMul(h, v) y = Add(k, b) }"
    weights, x = {"w": normal(8, 5), "v": normal(5, 5), "b": normal(5)}, normal(6, 8)
    model = graph(f"g {text}", weights)
    quantize.write(model, layers.find(model)[0][:1], {"x": STEP})
    expected = run(model, {"x": x})["y"]
    assert not multiply(model)[1] and not convolve(model)[1]
    assert make_unsigned(model)[1]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], expected)
    assert model.graph.initializers["w_zero_point"].dtype == ir.DataType.INT8  # a weight stays signed


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-36, 1e-44])
def test_the_bias_of_a_silent_channel_is_kept(factor: float) -> None:
    """In steps of the input's and so small a weight's scale the bias would not fit 32 bits; of 0's it would be 0."""
    text = "(float[B,4,4,4] x) => (float[B,5,4,4] y) { y = Conv(x, w, b) }"
    weight = normal(5, 4, 1, 1) * np.float32(0.01)
    weight[2] = weight[2] * 100 * factor
    weights, x = {"w": weight, "b": np.full(5, 0.3, np.float32)}, normal(2, 4, 4, 4)
    for scale, size in ((0.01, 1), (0.5, 20)):
        inputs = {"x": x * np.float32(size)}
        expected = run(write(text, weights, {"x": scale}), inputs)["y"]
        np.testing.assert_allclose(expected[:, 2], 0.3, atol=1e-6)
        step = float(np.abs(expected).max()) / 127
        model, _ = convolve(write(text, weights, {"x": scale, "y": step}))
        np.testing.assert_allclose(run(model, inputs)["y"], expected, atol=step)


def test_a_weight_that_made_room_for_its_bias_is_only_held_more_coarsely() -> None:
    text = "(float[B,4,4,4] x) => (float[B,5,4,4] y) { y = Conv(x, w, b) }"
    weight = normal(5, 4, 1, 1)
    weight[2] *= np.float32(1e-6)
    bias = np.full(5, 0.3, np.float32)
    bias[2] = 2**33 * STEP * np.abs(weight[2]).max() / 127  # four times too much
    model, _ = convolve(write(text, {"w": weight, "b": bias}, {"x": STEP, "y": float(bias[2]) / 127}))
    (node,) = (node for node in model.graph if node.op_type == "QLinearConv")
    held = {index: node.inputs[index].const_value.numpy() for index in (3, 4, 8)}
    numbers, scale = held[3].reshape(5, 4).astype(np.float64), held[4].astype(np.float64)
    plain = np.abs(weight).max((1, 2, 3)) / 127
    np.testing.assert_allclose(scale[[0, 1, 3, 4]], plain[[0, 1, 3, 4]], rtol=1e-6)
    assert 4 * plain[2] < scale[2] < 10 * plain[2]
    # It is rounded twice: to its own steps, then to coarser ones.
    assert np.abs(numbers[2] * scale[2] - weight[2].ravel()).max() <= 0.501 * (scale[2] + plain[2])
    np.testing.assert_allclose(held[8] * STEP * scale, bias, atol=STEP * scale.max(), rtol=1e-6)


def test_a_convolution_without_the_range_of_its_output_is_refused_by_name() -> None:
    text, _, sides = CONVOLUTIONS["padded"]
    with pytest.raises(DexportError, match="'Conv_0' is quantized, but the range of its output is not noted") as error:
        convolve(write(text, {"w": normal(*sides), "b": normal(5)}, {"x": STEP}))
    assert "\n" not in str(error.value)
