"""A quantized graph computes with rounded factors; splitting and smoothing change nothing in float."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from calibration import bias, layers, quantize, smooth
from calibration.observe import Observed
from calibration.split import split
from exporter.compile.onnxruntime_integer import convolve, make_unsigned, multiply
from runtimes.errors import DexportError
from tests.calibration.small import Array, fake, graph, run
from tests.calibration.test_ranges import observed

RANDOM = np.random.default_rng(1)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def rounded(weight: Array, axis: int) -> Array:
    return fake(weight, layers.along(quantize.weight_scale(weight, axis), axis, weight.ndim)).astype(np.float32)


CONV = (
    "g (float[B,4,6,6] x) => (float[B,5,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }",
    {"w": normal(5, 4, 3, 3), "b": normal(5)},
)
GROUPED = (
    "g (float[B,4,6,6] x) => (float[B,6,4,4] y) { y = Conv<group=2>(x, w) }",
    {"w": normal(6, 2, 3, 3)},
)
MATMUL = (
    "g (float[B,7,4] x) => (float[B,7,5] y) { h = MatMul(x, w) y = Add(h, b) }",
    {"w": normal(4, 5), "b": normal(5)},
)
FLAT = ("g (float[B,4] x) => (float[B,5] y) { y = MatMul(x, w) }", {"w": normal(4, 5)})
GEMM = ("g (float[B,4] x) => (float[B,5] y) { y = Gemm<transB=1>(x, w, b) }", {"w": normal(5, 4), "b": normal(5)})
SHAPES = {"conv": (2, 4, 6, 6), "grouped": (2, 4, 6, 6), "matmul": (2, 7, 4), "flat": (3, 4), "gemm": (3, 4)}
GRAPHS = {"conv": CONV, "grouped": GROUPED, "matmul": MATMUL, "flat": FLAT, "gemm": GEMM}


def quantized(model: ir.Model, scales: Mapping[str, float]) -> ir.Model:
    found, _ = layers.find(model)
    model, modified = quantize.write(model, found, scales)
    assert modified
    return model


@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_quantized_layer_is_the_layer_of_rounded_factors(name: str) -> None:
    text, weights = GRAPHS[name]
    (layer,) = layers.find(graph(text, weights))[0]
    assert layer.name == "w" and layer.kind == ("conv" if "Conv" in text else "linear")
    x = normal(*SHAPES[name])
    weights = weights | {"w": rounded(weights["w"], layer.out_axis)}
    expected = run(graph(text, weights), {"x": fake(x, 0.03).astype(np.float32)})["y"]
    actual = run(quantized(graph(*GRAPHS[name]), {"x": 0.03}), {"x": x})["y"]
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    plain = run(graph(*GRAPHS[name]), {"x": x})["y"]
    assert 1e-3 < np.abs(actual - plain).max() < 0.3


def test_what_is_shared_is_quantized_once_and_zeros_stay_zeros() -> None:
    weights = {"w": normal(4, 5), "v": normal(4, 5)}
    weights["w"][:, 2] = 0
    model = graph(
        "g (float[B,4] x) => (float[B,5] y) { a = MatMul(x, w) b = MatMul(x, w) c = MatMul(x, v) y = Sum(a, b, c) }",
        weights,
    )
    found, left = layers.find(model)
    assert [layer.name for layer in found] == ["w", "w (MatMul_1)", "v"] and not left
    model = quantized(model, {"x": 0.02})
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 3
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert "w" not in stored and stored["w_quantized"] == ir.DataType.INT8
    a = run(model, {"x": normal(2, 4)})["y"]
    assert np.isfinite(a).all()


def test_what_cannot_be_quantized_is_named_with_the_reason() -> None:
    model = graph(
        "g (float[B,4] x, float[4,4] m) => (float[B,4] y, float[B,2,5,5] z) {"
        " a = MatMul(x, m) y = Gemm<alpha=0.5>(a, w) c = Reshape(x, s) z = ConvTranspose(c, t) }",
        {"w": normal(4, 4), "t": normal(1, 2, 4, 4), "s": np.array([-1, 1, 2, 2], np.int64)},
    )
    found, left = layers.find(model)
    assert not found and left == {
        "MatMul_0": "both factors are activations",
        "w": "this Gemm scales or transposes",
        "t": "ConvTranspose has no int8 kernel in the runtimes",
    }


CONCAT = "g (float[B,2,4,4] a, float[B,3,4,4] b) => (float[B,5,4,4] y) { x = Concat<axis=1>(a, b) y = Conv(x, w, c) }"


def test_a_layer_of_a_concatenation_becomes_one_for_each_part() -> None:
    weights = {"w": normal(5, 5, 1, 1), "c": normal(5)}
    inputs = {"a": normal(2, 2, 4, 4), "b": 50 * normal(2, 3, 4, 4)}
    expected = run(graph(CONCAT, weights), inputs)["y"]
    model, modified = split(graph(CONCAT, weights))
    assert modified and [node.op_type for node in model.graph] == ["Conv", "Conv", "Add"]
    np.testing.assert_allclose(run(model, inputs)["y"], expected, atol=2e-4)

    def error(model: ir.Model, scales: Mapping[str, float]) -> float:
        return float(np.square(run(quantized(model, scales), inputs)["y"] - expected).mean())

    peaks = {name: float(np.abs(value).max()) / 127 for name, value in inputs.items()}
    assert error(model, peaks) < error(graph(CONCAT, weights), {"x": max(peaks.values())})


@pytest.mark.parametrize(
    "text",
    [
        "g (float[B,2,4,4] a, float[B,2,4,4] b) => (float[B,4,4,4] y)"
        " { x = Concat<axis=1>(a, b) y = Conv<group=2>(x, w) }",
        "g (float[B,4,2,4] a, float[B,4,2,4] b) => (float[B,4,4,4] y)"
        " { x = Concat<axis=2>(a, b) y = Conv<group=2>(x, w) }",
    ],
)
def test_other_concatenations_are_left(text: str) -> None:
    assert not split(graph(text, {"w": normal(4, 2, 1, 1)}))[1]


def statistics(name: str, values: Array, axis: int) -> dict[str, Observed]:
    """What would have been observed of one array."""
    others = tuple(index for index in range(values.ndim) if index != axis)
    found = observed(values)
    peaks, means, powers = np.abs(values).max(others), values.mean(others), np.square(values).mean(others)
    return {name: Observed(found.bounds, peaks, means, powers, found.histogram)}


NORM = (
    "g (float[B,6,8] x) => (float[B,6,5] y) { n = LayerNormalization<axis=-1>(x, s, t)"
    " p = MatMul(n, w) q = MatMul(n, v) y = Sub(p, q) }"
)
ATTENTION = (
    "g (float[B,6,8] x) => (float[B,6,5] y) { k = MatMul(x, u) r = Reshape(k, split) v = Transpose<perm=[0,2,1,3]>(r)"
    " o = MatMul(x, m) h = Reshape(o, split) z = Transpose<perm=[0,2,1,3]>(h)"
    " a = Attention(v, v, z) t = Transpose<perm=[0,2,1,3]>(a) n = Reshape(t, join) y = MatMul(n, w) }"
)


def outliers(count: int) -> Array:
    return np.where(np.arange(count) == 3, 60.0, 1.0).astype(np.float32)


def test_smoothing_moves_outliers_into_the_weight() -> None:
    weights = {"s": outliers(8), "t": normal(8), "w": normal(8, 5), "v": normal(8, 5)}
    x = normal(4, 6, 8)
    exact = run(graph(NORM, weights), {"x": x})["y"]
    model = graph(NORM, weights)
    named = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(named["n"])
    inner = run(model, {"x": x})["n"]
    scale = float(np.abs(inner).max()) / 127

    def error(smoothed: bool) -> float:
        model = graph(NORM, weights)
        found = layers.find(model)[0]
        scales = {"n": scale}
        if smoothed:
            model, new = smooth.smooth(model, found, statistics("n", inner, 2), scales)
            assert list(new) == ["n"] and new["n"] < scale / 3
            np.testing.assert_allclose(run(model, {"x": x})["y"], exact, atol=2e-4)
            scales |= new
        model, _ = quantize.write(model, found, scales)
        return float(np.square(run(model, {"x": x})["y"] - exact).mean())

    assert error(True) < 0.3 * error(False)


def test_smoothing_goes_through_an_attention_to_its_values() -> None:
    weights = {
        "u": normal(8, 8), "m": normal(8, 8) * outliers(8), "w": normal(8, 5),
        "split": np.array([0, 0, 2, 4], np.int64), "join": np.array([0, 0, 8], np.int64),
    }  # fmt: skip
    x = normal(2, 6, 8)
    model = graph(ATTENTION, weights)
    exact = run(model, {"x": x})["y"]
    found = [layer for layer in layers.find(model)[0] if layer.name == "w"]
    peaks = 10 * outliers(8)
    model, new = smooth.smooth(model, found, statistics("n", normal(50, 8) * peaks, 1), {"n": 600 / 127})
    assert list(new) == ["n"]
    np.testing.assert_allclose(run(model, {"x": x})["y"], exact, rtol=1e-4, atol=1e-3)


def test_what_another_node_reads_or_what_needs_no_smoothing_is_left() -> None:
    weights = {"s": outliers(8), "t": normal(8), "w": normal(8, 5), "v": normal(8, 5)}
    read = graph(
        NORM.replace("(float[B,6,5] y)", "(float[B,6,5] y, float[B,6,8] e)").replace(" }", " e = Exp(n) }"), weights
    )
    values = statistics("n", normal(40, 8) * outliers(8), 1)
    assert smooth.smooth(read, layers.find(read)[0], values, {"n": 1.0})[1] == {}
    even = graph(NORM, weights)
    values = statistics("n", normal(4000, 8), 1)
    assert smooth.smooth(even, layers.find(even)[0], values, {"n": 4 / 127})[1] == {}


def test_bias_correction_takes_the_shift_back_and_touches_no_other_layer() -> None:
    weights = {"w": normal(16, 5), "v": normal(16, 5), "b": normal(5)}
    text = (
        "g (float[B,16] x) => (float[B,5] y, float[B,5] z) {"
        " h = MatMul(x, w) y = Add(h, b) k = MatMul(x, v) z = Add(k, b) }"
    )
    x = (normal(500, 16) + 3).astype(np.float32)
    exact = run(graph(text, weights), {"x": x})

    def shift(corrected: bool) -> tuple[float, float]:
        model = graph(text, weights)
        found = layers.find(model)[0][:1]
        if corrected:
            model, modified = bias.correct(model, found, statistics("x", x, 1))
            assert modified
        model, _ = quantize.write(model, found, {"x": float(np.abs(x).max()) / 127})
        actual = run(model, {"x": x})
        return float(np.abs((actual["y"] - exact["y"]).mean(0)).max()), float(np.abs(actual["z"] - exact["z"]).max())

    (before, _), (after, other) = shift(False), shift(True)
    assert after < 0.3 * before and other < 1e-5


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("name", ["conv", "grouped", "matmul", "flat"])
def test_integer_operators_give_what_the_quantized_graph_says(name: str, unsigned: bool) -> None:
    x = normal(*SHAPES[name])
    expected = run(quantized(graph(*GRAPHS[name]), {"x": 0.03}), {"x": x})["y"]
    step = float(np.abs(expected).max()) / 127
    model = quantized(graph(*GRAPHS[name]), {"x": 0.03, "y": step})
    for rewrite in (multiply, convolve, *([make_unsigned] if unsigned else [])):
        model, _ = rewrite(model)
    kinds = {node.op_type for node in model.graph}
    assert kinds == ({"QuantizeLinear", "QLinearConv", "DequantizeLinear"} if SHAPES[name][2:3] == (6,) else
                     {"QuantizeLinear", "MatMulIntegerToFloat"})  # fmt: skip
    inside = next(node for node in model.graph if node.op_type == "QuantizeLinear").outputs[0].dtype
    assert inside == (ir.DataType.UINT8 if unsigned else ir.DataType.INT8)
    np.testing.assert_allclose(run(model, {"x": x})["y"], expected, atol=step if "Conv" in GRAPHS[name][0] else 1e-4)


def test_a_convolution_without_the_range_of_its_output_is_refused() -> None:
    with pytest.raises(DexportError, match="the range of its output is not noted"):
        convolve(quantized(graph(*CONV), {"x": 0.03}))
