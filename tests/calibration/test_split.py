"""A layer of a concatenation becomes one for each part, which in float is the same function."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize
from calibration.split import split
from tests.calibration.small import Array, graph, run
from tests.exporter.graphs import relative

RANDOM = np.random.default_rng(3)
IMAGES = {"a": (2, 2, 4, 4), "b": (2, 3, 4, 4)}
TOKENS = {"a": (2, 4, 2), "b": (2, 4, 3)}


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


SPLIT = {
    "conv": ("x = Concat<axis=1>(a, b) y = Conv<pads=[1,1,1,1]>(x, w, c)", IMAGES, (5, 5, 3, 3), "Conv"),
    "axis counted from the end": ("x = Concat<axis=-3>(a, b) y = Conv<strides=[2,2]>(x, w)", IMAGES, (5, 5, 2, 2),
                                  "Conv"),
    "three parts": ("x = Concat<axis=1>(a, b, a) y = Conv(x, w, c)", IMAGES, (5, 7, 1, 1), "Conv"),
    "matmul": ("x = Concat<axis=2>(a, b) h = MatMul(x, w) y = Add(h, c)", TOKENS, (5, 5), "MatMul"),
}  # fmt: skip


def make(nodes: str, shapes: dict[str, tuple[int, ...]], weights: dict[str, Array]) -> ir.Model:
    inputs = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    rank = ",".join("NMKL"[: len(shapes["a"])])
    return graph(f"g ({inputs}) => (float[{rank}] y) {{ {nodes} }}", weights)


@pytest.mark.parametrize("name", list(SPLIT))
def test_the_function_stays(name: str) -> None:
    nodes, shapes, sides, kind = SPLIT[name]
    weights = {"w": normal(*sides), "c": normal(5)}
    inputs = {key: normal(*shape) for key, shape in shapes.items()}
    expected = run(make(nodes, shapes, weights), inputs)["y"]
    model, modified = split(make(nodes, shapes, weights))
    assert modified
    np.testing.assert_allclose(run(model, inputs)["y"], expected, atol=1e-5)
    kinds = [node.op_type for node in model.graph]
    parts = nodes.partition(")")[0].count(",") + 1
    assert kinds.count(kind) == parts and "Concat" not in kinds
    assert "w" not in model.graph.initializers  # no second copy is left
    stored = [value.const_value for key, value in model.graph.initializers.items() if key.startswith("w.")]
    assert sum(tensor.size for tensor in stored if tensor is not None) == weights["w"].size
    assert split(model) == (model, False)


def test_layers_that_share_a_weight_keep_their_own_parts() -> None:
    """The parts of the one are 2 and 3 channels wide, those of the other 3 and 2."""
    nodes = "x = Concat<axis=1>(a, b) z = Concat<axis=1>(b, a) p = Conv(x, w) q = Conv(z, w) y = Sub(p, q)"
    weights = {"w": normal(5, 5, 1, 1)}
    inputs = {key: normal(*shape) for key, shape in IMAGES.items()}
    model, modified = split(make(nodes, IMAGES, weights))
    assert modified and len(layers.find(model)[0]) == 4
    np.testing.assert_allclose(run(model, inputs)["y"], run(make(nodes, IMAGES, weights), inputs)["y"], atol=1e-5)


def test_a_concatenation_that_is_read_elsewhere_stays_for_its_reader() -> None:
    nodes = "x = Concat<axis=1>(a, b) p = Conv(x, w) q = Relu(x) y = Add(p, q)"
    weights = {"w": normal(5, 5, 1, 1)}
    inputs = {key: normal(*shape) for key, shape in IMAGES.items()}
    model, modified = split(make(nodes, IMAGES, weights))
    assert modified and [node.op_type for node in model.graph].count("Concat") == 1
    np.testing.assert_allclose(run(model, inputs)["y"], run(make(nodes, IMAGES, weights), inputs)["y"], atol=1e-5)


@pytest.mark.parametrize(
    "nodes, sides",
    [
        ("x = Concat<axis=1>(a, a) y = Conv<group=2>(x, w)", (4, 2, 1, 1)),
        ("x = Concat<axis=2>(a, a) y = Conv(x, w)", (5, 2, 1, 1)),
        ("x = Concat<axis=0>(a, a) y = Conv(x, w)", (5, 2, 1, 1)),
        ("x = Concat<axis=1>(a, a) y = MatMul(x, w)", (4, 5)),
        ("x = Concat<axis=1>(b) y = Conv(x, w)", (5, 3, 1, 1)),
        ("x = Concat<axis=1>(a, b) z = Relu(x) y = Conv(z, w)", (5, 5, 1, 1)),
    ],
)
def test_what_is_left_alone(nodes: str, sides: tuple[int, ...]) -> None:
    model = make(nodes, IMAGES, {"w": normal(*sides)})
    before = [node.op_type for node in model.graph]
    assert split(model) == (model, False)
    assert [node.op_type for node in model.graph] == before


def test_a_concatenation_of_unknown_shape_is_left_alone() -> None:
    model = make("x = Concat<axis=1>(a, b) y = Conv(x, w)", IMAGES, {"w": normal(5, 5, 1, 1)})
    next(iter(model.graph)).outputs[0].shape = None
    assert split(model) == (model, False)


def test_a_quiet_part_beside_a_loud_one_keeps_its_numbers() -> None:
    """With one scale for both, steps are as wide as the quiet part's values, and it is lost."""
    nodes = "x = Concat<axis=1>(a, b) y = Conv(x, w)"
    weights = {"w": normal(5, 5, 1, 1)}
    inputs = {"a": 100 * normal(*IMAGES["a"]), "b": normal(*IMAGES["b"])}
    steps = {name: float(np.abs(value).max()) / 127 for name, value in inputs.items()}
    # Only what the quiet part adds is looked at.
    without = inputs | {"b": np.zeros_like(inputs["b"])}

    def heard(model: ir.Model) -> Array:
        difference: Array = run(model, inputs)["y"].astype(np.float64) - run(model, without)["y"]
        return difference

    exact = heard(make(nodes, IMAGES, weights))
    errors = {}
    for parts in (False, True):
        model = make(nodes, IMAGES, weights)
        if parts:
            split(model)
        quantize.write(model, layers.find(model)[0], steps | {"x": max(steps.values())})
        errors[parts] = relative(heard(model), exact)
    assert errors[True] < 0.02 and errors[False] > 0.1
