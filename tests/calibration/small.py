"""Small graphs from ONNX's text form, run by ONNX Runtime without its rewrites, which would hide what a graph says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]


def graph(text: str, weights: Mapping[str, Array]) -> ir.Model:
    """A model of opset 23 from ``text``, its signature and nodes, with initializers and inferred shapes."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def fake(values: Array, scale: float | Array) -> Array:
    """What is left of values after 8 bits."""
    return np.clip(np.rint(values / scale), -127, 127) * scale
