"""Write 8-bit convolutions and linear layers into a graph, as QuantizeLinear and DequantizeLinear (QDQ).

    x ─ Q ─ DQ ─┐
    W(int8) ─ DQ ┴ Conv or MatMul

Every runtime reads this form and runs the pair as one int8 kernel. Weights are symmetric with a scale for each output
channel; an activation has one scale, and one pair of Q and DQ however many layers read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.graph import add_constant, add_node, add_weight, release, replace_input
from calibration.layers import Layer, along
from calibration.ranges import MOST, NEAREST_ZERO
from runtimes.errors import DexportError

Array = NDArray[Any]
OUTPUT = "dexport.output_scale"  # of a quantized convolution: the value of one step


def write(model: ir.Model, layers: Sequence[Layer], scales: Mapping[str, float]) -> tuple[ir.Model, bool]:
    """Quantize ``layers``; ``scales``: of their inputs, and of the convolutions' outputs, by the value's name.

    An output stays float here; its scale is noted in the node's metadata, for a runtime whose kernels need it. The
    weights are rounded when the model is saved.
    """
    activations: dict[str, ir.Value] = {}
    weights: dict[tuple[str, int], ir.Value] = {}
    for layer in layers:
        name = str(layer.input.name)
        if name not in activations:
            activations[name] = _quantize_activation(layer, scales[name])
        key = (str(layer.weight.name), layer.out_axis)
        if key not in weights:
            weights[key] = _quantize_weight(layer)
        if str(layer.output.name) in scales:
            layer.node.metadata_props[OUTPUT] = repr(scales[str(layer.output.name)])
        replace_input(layer.node, 0, activations[name])
        replace_input(layer.node, 1, weights[key])
    return model, bool(layers)


def output_scale(node: ir.Node) -> float:
    """The scale of a quantized convolution's output, as ``write`` noted it."""
    if OUTPUT not in node.metadata_props:
        raise DexportError(f"{node.name!r} is quantized, but the range of its output is not noted; quantize it anew")
    return float(node.metadata_props[OUTPUT])


def _quantize_activation(layer: Layer, scale: float) -> ir.Value:
    value, node = layer.input, layer.node
    assert node.graph is not None
    factor = add_constant(node.graph, f"{value.name}_scale", np.float32(scale))
    zero = add_constant(node.graph, f"{value.name}_zero_point", np.int8(0))
    numbers = add_node(node, "QuantizeLinear", [value, factor, zero], f"{value.name}_quantized", ir.DataType.INT8,
                       shape=value.shape)  # fmt: skip
    return add_node(node, "DequantizeLinear", [numbers, factor, zero], f"{value.name}_dequantized", ir.DataType.FLOAT,
                    shape=value.shape)  # fmt: skip


def _quantize_weight(layer: Layer) -> ir.Value:
    weight, axis, graph = layer.weight, layer.out_axis, layer.node.graph
    tensor = weight.const_value
    assert tensor is not None and graph is not None
    scale = weight_scale(tensor.numpy(), axis)
    release(tensor)
    name = weight.name
    if f"{name}_quantized" in graph.initializers:  # a weight that one layer reads along one axis, one along the other
        name = f"{name}_axis{axis}"
    factor = add_constant(graph, f"{name}_scale", scale)
    zero = add_constant(graph, f"{name}_zero_point", np.zeros(scale.shape, np.int8))
    numbers = add_weight(
        graph, f"{name}_quantized", tensor, lambda value: round_weight(value, scale, axis), ir.DataType.INT8
    )
    return add_node(
        layer.node, "DequantizeLinear", [numbers, factor, zero], f"{name}_dequantized", ir.DataType.FLOAT,
        [ir.AttrInt64("axis", axis)], shape=weight.shape,
    )  # fmt: skip


def weight_scale(weight: Array, axis: int) -> Array:
    """A scale for each output channel, float32 [out]; one of only zeros has the largest of the others.

    A runtime holds a bias in steps of the input's scale times the weight's, so with a coarser scale it would be lost.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis)
    peak = np.maximum(weight.max(axis=others), -weight.min(axis=others))
    if not peak.any():
        return np.ones(peak.shape, np.float32)
    scale: Array = np.maximum(np.where(peak > 0, peak, peak.max()) / MOST, NEAREST_ZERO).astype(np.float32)
    return scale


def round_weight(weight: Array, scale: Array, axis: int) -> Array:
    """The weight in steps of its scale, int8."""
    steps = np.rint(weight / along(scale, axis, weight.ndim))
    rounded: Array = np.clip(steps, -MOST, MOST, out=steps).astype(np.int8)
    return rounded
