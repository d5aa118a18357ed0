"""Which layers a graph has, and that each shape of them that occurs computes with rounded factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize
from calibration.calibrate import instrument
from runtimes.errors import DexportError
from tests.calibration import oracles
from tests.calibration.small import Array, fake, graph, run

RANDOM = np.random.default_rng(2)
STEP = 0.04  # of the input: 127 of them hold all that a test draws


def normal(*shape: int) -> Array:
    return np.clip(RANDOM.standard_normal(shape), -5, 5).astype(np.float32)


# name: (text, shape of x, of the weight, of the bias; axes of output, input and channel; numpy's layer)
Layer = Callable[[Array, Array, Array], Array]
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, int, int], Layer]] = {
    "conv": (
        "(float[2,4,6,6] x) => (float[2,5,3,3] y) { y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) }",
        (2, 4, 6, 6), (5, 4, 3, 3), (5,), (0, 1, 1), lambda x, w, b: oracles.conv(x, w, b, pad=1, stride=2),
    ),
    "conv without bias": (
        "(float[2,4,6,6] x) => (float[2,5,6,6] y) { y = Conv(x, w) }",
        (2, 4, 6, 6), (5, 4, 1, 1), (), (0, 1, 1), lambda x, w, b: oracles.conv(x, w),
    ),
    "conv over one axis": (
        "(float[2,4,9] x) => (float[2,5,9] y) { y = Conv<pads=[1,1]>(x, w, b) }",
        (2, 4, 9), (5, 4, 3), (5,), (0, 1, 1), lambda x, w, b: oracles.conv(x, w, b, pad=1),
    ),
    "grouped": (
        "(float[2,4,6,6] x) => (float[2,6,4,4] y) { y = Conv<group=2>(x, w, b) }",
        (2, 4, 6, 6), (6, 2, 3, 3), (6,), (0, 1, 1), lambda x, w, b: oracles.conv(x, w, b, group=2),
    ),
    "depthwise": (
        "(float[2,4,6,6] x) => (float[2,4,4,4] y) { y = Conv<group=4>(x, w) }",
        (2, 4, 6, 6), (4, 1, 3, 3), (), (0, 1, 1), lambda x, w, b: oracles.conv(x, w, group=4),
    ),
    "matmul of rank 2": (
        "(float[B,8] x) => (float[B,5] y) { y = MatMul(x, w) }",
        (6, 8), (8, 5), (), (1, 0, 1), lambda x, w, b: x @ w,
    ),
    "matmul of rank 3": (
        "(float[B,7,8] x) => (float[B,7,5] y) { h = MatMul(x, w) y = Add(b, h) }",
        (2, 7, 8), (8, 5), (5,), (1, 0, 2), lambda x, w, b: x @ w + b,
    ),
    "matmul of rank 4": (
        "(float[B,3,7,8] x) => (float[B,3,7,5] y) { h = MatMul(x, w) y = Add(h, b) }",
        (2, 3, 7, 8), (8, 5), (5,), (1, 0, 3), lambda x, w, b: x @ w + b,
    ),
    "gemm": (
        "(float[B,8] x) => (float[B,5] y) { y = Gemm(x, w, b) }",
        (6, 8), (8, 5), (5,), (1, 0, 1), lambda x, w, b: x @ w + b,
    ),
    "gemm, transposed": (
        "(float[B,8] x) => (float[B,5] y) { y = Gemm<transB=1>(x, w, b) }",
        (6, 8), (5, 8), (5,), (0, 1, 1), lambda x, w, b: x @ w.T + b,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_each_shape_is_found_and_computes_with_rounded_factors(name: str) -> None:
    text, shape, sides, bias, axes, compute = CASES[name]
    x, w = normal(*shape), normal(*sides)
    weights = {"w": w, "b": normal(*bias)} if bias else {"w": w}
    model = graph(f"g {text}", weights)
    (layer,), left = layers.find(model)
    assert not left and layer.kind == ("conv" if "Conv" in text else "linear")
    assert (layer.out_axis, layer.in_axis, layer.channel) == axes
    assert layer.bias is (model.graph.initializers["b"] if bias else None)
    b = weights.get("b", np.zeros(1))
    plain = run(model, {"x": x})["y"]
    np.testing.assert_allclose(plain, compute(x, w, b), atol=1e-4)  # the oracle itself
    model, modified = quantize.write(model, [layer], {"x": STEP})
    assert modified
    expected = compute(fake(x.astype(np.float64), STEP), oracles.rounded(w, axes[0]), b)
    found = run(model, {"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - plain).max() > 1e-3


def test_names_are_those_of_the_modules() -> None:
    text = (
        "g (float[B,4] x) => (float[B,4] y, float[B,4] z) {"
        " a = MatMul(x, first) b = MatMul(a, shared) y = MatMul(b, shared) z = Gemm(x, last) }"
    )
    model = graph(text, {name: normal(4, 4) for name in ("first", "shared", "last")})
    model.graph.initializers["first"].name = "block.to_q.weight.transposed"  # dots, which the text form does not take
    model.graph.initializers["last"].name = "out.weight"
    found, left = layers.find(model)
    assert [layer.name for layer in found] == ["block.to_q", "shared", "shared (MatMul_2)", "out"] and not left


@pytest.mark.parametrize(
    "call, why",
    [
        ("Gemm<beta=2.0>(x, w, v)", "this Gemm scales or transposes"),
        ("Gemm<transA=1>(x, w)", "this Gemm scales or transposes"),
        ("MatMul(w, x)", "both factors are activations"),
        ("MatMul(x, t)", "its weight is no matrix"),
        ('Einsum<equation="ij,jk->ik">(x, w)', "Einsum has no int8 kernel in the runtimes"),
        ("MatMul(w, w)", "its input is constant"),
    ],
)
def test_the_reason_why_a_node_is_left(call: str, why: str) -> None:
    weights = {"w": normal(4, 4), "v": normal(4), "t": normal(2, 4, 4)}
    model = graph(f"g (float[4,4] x) => (float[4,4] y) {{ h = {call} y = Add(x, h) }}", weights)
    found, left = layers.find(model)
    assert not found and list(left.values()) == [why]


@pytest.mark.parametrize(
    "after",
    [
        "h = Conv(x, c) y = Add(h, v)",  # along the last axis, which is no channel of a convolution's
        "h = MatMul(x, w) k = Add(h, v) y = Mul(h, k)",  # something else reads the product
        "h = MatMul(x, w) y = Mul(h, v)",
        "h = MatMul(x, w) y = Add(h, m)",  # a matrix
        "h = MatMul(x, w) y = Add(h, h)",
    ],
)
def test_what_is_no_bias(after: str) -> None:
    weights = {"w": normal(4, 4), "c": normal(4, 4, 1, 1), "v": normal(4), "m": normal(4, 4)}
    (layer,), _ = layers.find(graph(f"g (float[B,4,4,4] x) => (float[B,4,4,4] y) {{ {after} }}", weights))
    assert layer.bias is None


def test_a_graph_of_which_nothing_can_be_quantized_is_refused_in_one_line(tmp_path: Path) -> None:
    text = "g (float[B,4] x) => (float[B,4] y) { h = MatMul(x, w) y = MatMul(h, v) }"  # a first layer and a last one
    ir.save(graph(text, {"w": normal(4, 4), "v": normal(4, 4)}), tmp_path / "model.onnx")
    with pytest.raises(DexportError, match=r"no layer of it can be quantized \(w: no layer before it\); build it in"):
        instrument(tmp_path / "model.onnx")
