"""Passes over a hub graph that no family's own test would catch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from exporter import passes


@pytest.mark.parametrize("epsilon", [1e-15, 1e-8, 1e-6])
def test_an_epsilon_stays(epsilon: float) -> None:
    """x / (x + epsilon) is 0 at 0, as the linear attention of Sana needs it, and not NaN."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    term = ir.tensor(np.float32(epsilon), name="term")
    constant = ir.Value(name="term", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT), const_value=term)
    total = ir.node("Add", [x, constant])
    ratio = ir.node("Div", [x, total.outputs[0]])
    (y,) = ratio.outputs
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph = ir.Graph([x], [y], nodes=[total, ratio], initializers=[constant], opset_imports={"": 23})
    model = passes.run(ir.Model(graph, ir_version=10), passes.HUB)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    values = np.array([[0, 1, -2], [0.5, 0, 3]], np.float32)
    (found,) = session.run(None, {"x": values})
    np.testing.assert_allclose(found, values / (values + np.float32(epsilon)))
