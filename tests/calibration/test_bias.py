"""Bias correction takes back the mean of what rounding a weight adds, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from calibration import bias, layers, quantize
from tests.calibration import oracles
from tests.calibration.small import Array, graph, run
from tests.calibration.test_quantize import statistics

RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


CONV = "(float[B,6,4,4] x) => (float[B,5,4,4] y) {{ y = Conv{}(x, w, b) }}"
# name: (text, shape of x, of the weight; axes of its outputs and inputs, x's axis of channels)
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, int, int]]] = {
    "conv 1x1": (CONV.format(""), (40, 6, 4, 4), (5, 6, 1, 1), (0, 1, 1)),
    "conv over one axis": (
        "(float[B,6,9] x) => (float[B,5,9] y) { y = Conv(x, w, b) }", (40, 6, 9), (5, 6, 1), (0, 1, 1)
    ),
    "matmul": (
        "(float[B,7,6] x) => (float[B,7,5] y) { h = MatMul(x, w) y = Add(b, h) }", (40, 7, 6), (6, 5), (1, 0, 2)
    ),
    "matmul of rank 4": (
        "(float[B,2,7,6] x) => (float[B,2,7,5] y) { h = MatMul(x, w) y = Add(h, b) }", (40, 2, 7, 6), (6, 5), (1, 0, 3)
    ),
    "gemm": ("(float[B,6] x) => (float[B,5] y) { y = Gemm(x, w, b) }", (400, 6), (6, 5), (1, 0, 1)),
    "gemm, transposed": (
        "(float[B,6] x) => (float[B,5] y) { y = Gemm<transB=1>(x, w, b) }", (400, 6), (5, 6), (0, 1, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_the_mean_error_is_taken_back(name: str) -> None:
    """With an input that is held nearly exactly, what is left of the mean error is float32's and the input's."""
    text, shape, sides, (out_axis, in_axis, channel) = CASES[name]
    weights = {"w": normal(*sides), "b": normal(5)}
    x = normal(*shape) + np.linspace(-8, 8, 6, dtype=np.float32).reshape([-1] + [1] * (len(shape) - channel - 1))
    exact = run(graph(f"g {text}", weights), {"x": x})["y"].astype(np.float64)
    others = tuple(axis for axis in range(len(shape)) if axis != channel)

    def shift(corrected: bool) -> tuple[Array, Array]:
        model = graph(f"g {text}", weights)
        found, _ = layers.find(model)
        if corrected:
            model, modified = bias.correct(model, found, statistics("x", x, channel))
            assert modified and "b" not in model.graph.initializers
        held = next(value for value in model.graph.initializers.values() if value.name != "w").const_value.numpy()
        model, _ = quantize.write(model, found, {"x": float(np.abs(x).max()) / 127})
        return held, (run(model, {"x": x})["y"] - exact).mean(others)

    (plain, before), (held, after) = shift(False), shift(True)
    assert np.abs(before).max() > 0.03 and np.abs(after).max() < 0.2 * np.abs(before).max()
    np.testing.assert_array_equal(plain, weights["b"])
    difference = (oracles.rounded(weights["w"], out_axis) - weights["w"]).reshape(sides[:2])
    expected = weights["b"] - np.tensordot(difference, x.mean(others, dtype=np.float64), ([in_axis], [0]))
    np.testing.assert_allclose(held, expected, atol=1e-4)


def test_all_places_of_a_kernel_count() -> None:
    """Of a constant picture without an edge, the error is the same everywhere, and all of it is taken back."""
    weights = {"w": normal(5, 6, 3, 3), "b": normal(5)}
    text = "g " + CONV.replace("5,4,4] y", "5,2,2] y").format("")
    x = np.broadcast_to(np.linspace(-127, 127, 6).reshape(6, 1, 1), (1, 6, 4, 4)).astype(np.float32)
    x = np.rint(x)  # whole numbers, which a step of 1 holds exactly
    model = graph(text, weights)
    found, _ = layers.find(model)
    bias.correct(model, found, statistics("x", x, 1))
    quantize.write(model, found, {"x": 1.0})
    expected = oracles.conv(x, weights["w"], weights["b"])
    np.testing.assert_allclose(run(model, {"x": x})["y"], expected, atol=2e-3)
    plain = oracles.conv(x, oracles.rounded(weights["w"], 0), weights["b"])
    assert np.abs(plain - expected).max() > 0.5


@pytest.mark.parametrize("nodes", ["Gemm(x, w, b) z = Gemm(x, v, b)", "Conv(x, w, b) z = Conv(x, v, b)"])
def test_a_shared_bias_stays_for_the_layer_that_is_not_corrected(nodes: str) -> None:
    sides = (6, 6, 1, 1) if "Conv" in nodes else (6, 6)
    weights = {"w": normal(*sides), "v": normal(*sides), "b": normal(6)}
    rank = "B,6,4,4" if "Conv" in nodes else "B,6"
    text = f"g (float[{rank}] x) => (float[{rank}] y, float[{rank}] z) {{ y = {nodes} }}"
    x = normal(20, 6, *([4, 4] if "Conv" in nodes else [])) + 3
    model, exact = graph(text, weights), run(graph(text, weights), {"x": x})
    assert bias.correct(model, layers.find(model)[0][:1], statistics("x", x, 1))[1]
    found = run(model, {"x": x})
    np.testing.assert_array_equal(found["z"], exact["z"])
    assert np.abs(found["y"] - exact["y"]).max() > 1e-3


@pytest.mark.parametrize(
    "nodes, sides",
    [
        ("y = Conv(x, w)", (4, 4, 1, 1)),
        ("y = Conv<group=2>(x, w, b)", (4, 2, 1, 1)),
        ("h = Conv(x, w) y = Add(h, b)", (4, 4, 1, 1)),  # along the last axis, where there are no channels
        ("h = MatMul(x, w) k = Relu(h) y = Add(k, b)", (4, 4)),
        ("c = Abs(b) y = Conv(x, w, c)", (4, 4, 1, 1)),  # no constant
    ],
)
def test_what_has_no_bias_to_correct_stays(nodes: str, sides: tuple[int, ...]) -> None:
    weights = {"w": normal(*sides), "b": normal(4)}
    text = f"g (float[B,4,4,4] x) => (float[B,4,4,4] y) {{ {nodes} }}"
    x = normal(20, 4, 4, 4) + 3
    model = graph(text, weights)
    channel = 3 if "MatMul" in nodes else 1
    assert not bias.correct(model, layers.find(model)[0], statistics("x", x, channel))[1]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], run(graph(text, weights), {"x": x})["y"])
