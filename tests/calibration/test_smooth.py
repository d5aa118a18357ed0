"""Smoothing changes no function, lowers the error where it is done, and is done nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize, smooth
from calibration.observe import Observed
from tests.calibration.small import Array, graph, run
from tests.calibration.test_quantize import outliers, statistics

RANDOM = np.random.default_rng(4)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


ATTENTION = (
    "g (float[B,6,8] x) => (float[B,6,5] y) {"
    " q = MatMul(x, wq) qs = Reshape(q, split) qt = Transpose<perm=[0,2,1,3]>(qs)"
    " k = MatMul(x, wk) ks = Reshape(k, split) kt = Transpose<perm=[0,2,1,3]>(ks)"
    " v = MatMul(x, wv) vs = Reshape(v, split) vt = Transpose<perm=[0,2,1,3]>(vs) o = Attention(qt, kt, vt)"
    " t = Transpose<perm=[0,2,1,3]>(o) n = Reshape(t, join) y = MatMul(n, w) }"
)
SHAPES = {"split": np.array([0, 6, 2, 4], np.int64), "join": np.array([0, 6, 8], np.int64)}
PROJECTIONS = {"wq": normal(8, 8), "wk": normal(8, 8), "wv": normal(8, 8) * outliers(8), "w": normal(8, 5)}
PLACES: dict[str, tuple[str, dict[str, Array], tuple[int, ...]]] = {
    "layer norm": (
        "g (float[B,6,8] x) => (float[B,6,5] y) { n = LayerNormalization(x, s, t) y = MatMul(n, w) }",
        {"s": outliers(8), "t": normal(8), "w": normal(8, 5)}, (4, 6, 8),
    ),
    "layer norm without bias, two layers": (
        "g (float[B,6,8] x) => (float[B,6,5] y) { n = LayerNormalization(x, s) p = MatMul(n, w) q = MatMul(n, v)"
        " y = Add(p, q) }",
        {"s": outliers(8), "w": normal(8, 5), "v": normal(8, 5)}, (4, 6, 8),
    ),
    "layer norm whose scale is its bias": (
        "g (float[B,8] x) => (float[B,5] y) { n = LayerNormalization(x, s, s) y = Gemm<transB=1>(n, w) }",
        {"s": outliers(8), "w": normal(5, 8)}, (30, 8),
    ),
    "group norm": (
        "g (float[B,8,4,4] x) => (float[B,5,4,4] y) { n = GroupNormalization<num_groups=2>(x, s, t)"
        " y = Conv<pads=[1,1,1,1]>(n, w) }",
        {"s": outliers(8), "t": normal(8), "w": normal(5, 8, 3, 3)}, (2, 8, 4, 4),
    ),
    "attention": (ATTENTION, PROJECTIONS | SHAPES, (4, 6, 8)),
}  # fmt: skip


def make(text: str, weights: dict[str, Array]) -> ir.Model:
    """The graph, with the shape of its value ``n``, which ONNX does not infer of a GroupNormalization."""
    model = graph(text, weights)
    for node in model.graph:
        if node.op_type == "GroupNormalization":
            node.outputs[0].shape = model.graph.inputs[0].shape
    return model


def observed(model: ir.Model, x: Array) -> Array:
    """The value ``n`` of a graph, which each graph here has."""
    (value,) = (value for node in model.graph for value in node.outputs if value.name == "n")
    model.graph.outputs.append(value)
    return run(model, {"x": x})["n"]


def readers_of_n(model: ir.Model) -> list[layers.Layer]:
    return [layer for layer in layers.find(model)[0] if layer.input.name == "n"]


@pytest.mark.parametrize("name", list(PLACES))
def test_the_function_stays_and_the_error_falls(name: str) -> None:
    text, weights, shape = PLACES[name]
    x = normal(*shape)
    exact = run(make(text, weights), {"x": x})["y"]
    n = observed(make(text, weights), x)
    axis = 1 if n.ndim == 4 else n.ndim - 1
    steps = {"n": float(np.abs(n).max()) / 127}

    def error(smoothed: dict[str, float], model: ir.Model) -> float:
        model, _ = quantize.write(model, readers_of_n(model), steps | smoothed)
        return float(np.square(run(model, {"x": x})["y"].astype(np.float64) - exact).mean())

    model = make(text, weights)
    model, new = smooth.smooth(model, readers_of_n(model), statistics("n", n, axis), steps)
    np.testing.assert_allclose(run(model, {"x": x})["y"], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    assert list(new) == ["n"] and new["n"] < steps["n"]
    assert error(new, model) < 0.5 * error({}, make(text, weights))


def loud(count: int) -> dict[str, Observed]:
    """Statistics of an input whose fourth channel is 60 times louder than the others."""
    return statistics("n", normal(200, count) * outliers(count), 1)


SCALES = {"n": 200 / 127}


def test_an_even_input_is_left() -> None:
    text, weights, _ = PLACES["layer norm"]
    model = make(text, weights)
    assert smooth.smooth(model, readers_of_n(model), statistics("n", normal(4000, 8), 1), {"n": 4 / 127})[1] == {}


def test_a_constant_that_others_read_stays_for_them() -> None:
    """Both norms have one scale, and both matrices are one; only the first input is loud."""
    text = (
        "g (float[B,6,8] x) => (float[B,6,5] y, float[B,6,5] z) { n = LayerNormalization(x, s, t) y = MatMul(n, w)"
        " m = LayerNormalization(x, s, t) z = MatMul(m, w) }"
    )
    weights = {"s": outliers(8), "t": normal(8), "w": normal(8, 5)}
    x = normal(4, 6, 8)
    exact = run(make(text, weights), {"x": x})
    model = make(text, weights)
    assert list(smooth.smooth(model, readers_of_n(model), loud(8), SCALES)[1]) == ["n"]
    for name, value in run(model, {"x": x}).items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-5, atol=1e-5 * np.abs(exact[name]).max())
    assert {"s", "t", "w"} < set(model.graph.initializers)
