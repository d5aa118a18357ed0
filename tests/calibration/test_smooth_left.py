"""Inputs that smoothing leaves as they are: their channels are made or read by something that it cannot change."""

from __future__ import annotations

import numpy as np
import pytest

from calibration import smooth
from tests.calibration.small import Array
from tests.calibration.test_smooth import ATTENTION, PROJECTIONS, SCALES, SHAPES, loud, make, normal, readers_of_n

NORM = "n = LayerNormalization(x, s, t) y = MatMul(n, w)"
VECTORS = {"s": np.ones(8, np.float32), "t": normal(8), "w": normal(8, 5)}
LEFT: dict[str, tuple[str, dict[str, Array]]] = {
    "another reader": (f"(float[B,6,8] x) => (float[B,6,5] y, float[B,6,8] z) {{ {NORM} z = Exp(n) }}", VECTORS),
    "a graph's output": (f"(float[B,6,8] x) => (float[B,6,5] y, float[B,6,8] n) {{ {NORM} }}", VECTORS),
    "a scale that is no constant": (
        f"(float[B,6,8] x, float[8] s) => (float[B,6,5] y) {{ {NORM} }}", {key: VECTORS[key] for key in "tw"}
    ),
    "one scale for all channels": (
        f"(float[B,6,8] x) => (float[B,6,5] y) {{ {NORM} }}", VECTORS | {"s": np.ones(1, np.float32)}
    ),
    "a norm over two axes": (
        f"(float[B,8,8] x) => (float[B,8,5] y) {{ {NORM.replace('(x', '<axis=1>(x')} }}",
        VECTORS | {"s": np.ones((8, 8), np.float32)},
    ),
    "a norm along another axis": (
        "(float[B,8,8] x) => (float[B,5,8] y) { n = LayerNormalization(x, s, t) y = Conv(n, w) }",
        VECTORS | {"w": normal(5, 8, 1)},
    ),
    "a group norm read along another axis": (
        "(float[B,8,8] x) => (float[B,8,5] y) { n = GroupNormalization<num_groups=2>(x, s, t) y = MatMul(n, w) }",
        VECTORS,
    ),
    "a grouped convolution": (
        "(float[B,8,4,4] x) => (float[B,4,4,4] y)"
        " { n = GroupNormalization<num_groups=2>(x, s, t) y = Conv<group=2>(n, w) }",
        VECTORS | {"w": normal(4, 4, 1, 1)},
    ),
    "made by a gate": (
        "(float[B,6,8] x, float[B,6,8] g) => (float[B,6,5] y) { h = Gelu(g) n = Mul(x, h) y = MatMul(n, w) }",
        {"w": normal(8, 5)},
    ),
    "an input": ("(float[B,6,8] n) => (float[B,6,5] y) { y = MatMul(n, w) }", {"w": normal(8, 5)}),
    "queries that share a head": (
        ATTENTION.removeprefix("g ").replace("(k, split)", "(k, one)").replace("(v, split)", "(v, one)"),
        PROJECTIONS | SHAPES | {
            "one": np.array([0, 6, 1, 4], np.int64), "wk": normal(8, 4), "wv": normal(8, 4),
        },
    ),
    "heads that are joined otherwise": (
        ATTENTION.removeprefix("g ").replace("t = Transpose<perm=[0,2,1,3]>", "t = Transpose<perm=[0,1,2,3]>"),
        PROJECTIONS | SHAPES,
    ),
    "a value that another attention reads": (
        ATTENTION.removeprefix("g ").replace("y = MatMul(n, w)", "u = MatMul(n, w) m = ReduceMean(vt) y = Add(u, m)"),
        PROJECTIONS | SHAPES,
    ),
    "a value that is the graph's output": (
        ATTENTION.removeprefix("g ").replace("(float[B,6,5] y)", "(float[B,6,5] y, float[B,6,8] v)"),
        PROJECTIONS | SHAPES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LEFT))
def test_where_nothing_is_done(name: str) -> None:
    """All have an input that would be worth it, and most a place that looks like one of those above."""
    text, weights = LEFT[name]
    model = make(f"g {text}", weights)
    before = dict(model.graph.initializers)
    assert readers_of_n(model)
    assert smooth.smooth(model, readers_of_n(model), loud(8), SCALES)[1] == {}
    assert dict(model.graph.initializers) == before
