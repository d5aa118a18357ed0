"""Write 8-bit convolutions and linear layers into a graph, as QuantizeLinear and DequantizeLinear (QDQ).

    x ─ Q ─ DQ ──┐
    W(8 bit) ─ DQ ┴ Conv or MatMul

Every runtime reads this form and runs the pair as one 8-bit kernel. Weights are symmetric with a scale for each output
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
from calibration.numbers import INT8, Numbers
from runtimes.errors import DexportError

Array = NDArray[Any]
OUTPUT = "dexport.output_scale"  # of a quantized convolution: the value of one step


def write(
    model: ir.Model, layers: Sequence[Layer], scales: Mapping[str, float], numbers: Numbers = INT8
) -> tuple[ir.Model, bool]:
    """Quantize ``layers``; ``scales``: of their inputs, and of the convolutions' outputs, by the value's name.

    An output stays float here; its scale is noted in the node's metadata, for a runtime whose kernels need it. The
    weights are rounded when the model is saved.
    """
    activations: dict[str, ir.Value] = {}
    weights: dict[tuple[str, int], ir.Value] = {}
    for layer in layers:
        name = str(layer.input.name)
        if name not in activations:
            activations[name] = quantize_activation(layer.node, layer.input, scales[name], numbers)
        key = (str(layer.weight.name), layer.out_axis)
        if key not in weights:
            weights[key] = _quantize_weight(layer, numbers)
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


def quantize_activation(node: ir.Node, value: ir.Value, scale: float, numbers: Numbers) -> ir.Value:
    """What is left of a value after 8 bits, for the node ``node`` and those after it."""
    assert node.graph is not None
    factor = add_constant(node.graph, f"{value.name}_scale", numbers.held(scale))
    zero = add_constant(node.graph, f"{value.name}_zero_point", numbers.round(np.zeros(())))
    held = add_node(node, "QuantizeLinear", [value, factor, zero], f"{value.name}_quantized", numbers.dtype,
                    shape=value.shape)  # fmt: skip
    return add_node(node, "DequantizeLinear", [held, factor, zero], f"{value.name}_dequantized", ir.DataType.FLOAT,
                    shape=value.shape)  # fmt: skip


def _quantize_weight(layer: Layer, numbers: Numbers) -> ir.Value:
    weight, axis, graph = layer.weight, layer.out_axis, layer.node.graph
    tensor = weight.const_value
    assert tensor is not None and graph is not None
    scale = weight_scale(tensor.numpy(), axis, numbers)
    release(tensor)
    name = weight.name
    if f"{name}_quantized" in graph.initializers:  # a weight that one layer reads along one axis, one along the other
        name = f"{name}_axis{axis}"
    factor = add_constant(graph, f"{name}_scale", scale)
    zero = add_constant(graph, f"{name}_zero_point", numbers.round(np.zeros(scale.shape)))
    held = add_weight(
        graph, f"{name}_quantized", tensor, lambda value: round_weight(value, scale, axis, numbers), numbers.dtype
    )
    return add_node(
        layer.node, "DequantizeLinear", [held, factor, zero], f"{name}_dequantized", ir.DataType.FLOAT,
        [ir.AttrInt64("axis", axis)], shape=weight.shape,
    )  # fmt: skip


def weight_scale(weight: Array, axis: int, numbers: Numbers = INT8) -> Array:
    """A scale for each output channel, float32 [out]; one of only zeros has the largest of the others.

    A runtime holds a bias in steps of the input's scale times the weight's, so with a coarser scale it would be lost.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis)
    peak = np.maximum(weight.max(axis=others), -weight.min(axis=others))
    if not peak.any():
        return np.ones(peak.shape, np.float32)
    return numbers.scale(np.where(peak > 0, peak, peak.max()))


def round_weight(weight: Array, scale: Array, axis: int, numbers: Numbers = INT8) -> Array:
    """The weight in steps of its scale, as 8-bit numbers."""
    return numbers.round(weight / along(scale, axis, weight.ndim))
