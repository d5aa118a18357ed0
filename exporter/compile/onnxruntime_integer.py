"""QDQ to ONNX Runtime's own integer operators, each the fastest of its CPU kernels for the job.

ONNX Runtime fuses QDQ only where an operator's output is quantized too. For a linear layer it has something better:
``MatMulIntegerToFloat`` takes 8-bit numbers and gives floats with the bias added, so that nothing is lost behind it.
A convolution has no such kernel (``ConvInteger`` is ten times slower), so ``QLinearConv`` gives numbers again, in the
range that was observed. Measured (ORT 1.32, 2 cores with AVX-512 VNNI, milliseconds):

    linear, tokens × in → out     fp32    QLinearMatMul    MatMulIntegerToFloat
    4096 × 320 → 2560              109        40                 22
    256 × 5120 → 1280               56        20                 16
    convolution 3×3               fp32    QLinearConv      ConvInteger
    320 → 320, 64×64                77        21                222
    1280 → 1280, 16×16              76        18                235

Activations are unsigned on x86, whose dot-product instructions take unsigned by signed, and signed on ARM64. Only the
zero point differs: 128 more stands for the same number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.graph import add_constant, add_weight, drop_unused, replace_value
from calibration.layers import along
from calibration.quantize import output_scale

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
LARGEST_BIAS = 2**30  # in steps: half of int32 is left for the products
SHIFT = 128  # from signed numbers to unsigned ones


def multiply(model: ir.Model) -> tuple[ir.Model, bool]:
    """MatMul of dequantized factors, with or without a bias added → MatMulIntegerToFloat."""
    modified = False
    for node in list(model.graph):
        activation, weight = _dequantized(node, 0), _dequantized(node, 1)
        if node.op_type != "MatMul" or node.domain or activation is None or weight is None:
            continue
        add = _bias_after(node, weight)
        bias = add.inputs[1 - _place(add, node.outputs[0])] if add is not None else None
        x, x_scale, x_zero = activation.inputs
        w, w_scale, w_zero = weight.inputs
        last = (add or node).outputs[0]
        fused = ir.Node(
            MICROSOFT, "MatMulIntegerToFloat", [x, w, x_scale, w_scale, x_zero, w_zero, bias], name=node.name,
            outputs=[ir.Value(name=f"{last.name}_integer", shape=last.shape, type=last.type)],
        )  # fmt: skip
        model.graph.insert_before(add or node, fused)
        replace_value(last, fused.outputs[0])
        model.opset_imports[MICROSOFT] = 1
        modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


def convolve(model: ir.Model) -> tuple[ir.Model, bool]:
    """Conv of dequantized factors → QLinearConv and DequantizeLinear."""
    modified = False
    for node in list(model.graph):
        activation, weight = _dequantized(node, 0), _dequantized(node, 1)
        if node.op_type != "Conv" or node.domain or activation is None or weight is None:
            continue
        x, x_scale, x_zero = activation.inputs
        w, w_scale, w_zero = weight.inputs
        scale = add_constant(model.graph, f"{node.name}_scale", np.float32(output_scale(node)))
        zero = add_constant(model.graph, f"{node.name}_zero_point", np.int8(0))
        inputs = [x, x_scale, x_zero, w, w_scale, w_zero, scale, zero]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            assert w is not None and w_scale is not None
            inputs[3:5] = w, w_scale = _make_room(model.graph, node, w, w_scale, _numpy(x_scale))
            numbers = np.rint(_numpy(node.inputs[2]) / (_numpy(x_scale) * _numpy(w_scale).astype(np.float64)))
            inputs.append(add_constant(model.graph, f"{node.name}_bias", numbers.astype(np.int32)))
        result = node.outputs[0]
        made = ir.Value(name=f"{result.name}_integer", shape=result.shape, type=ir.TensorType(ir.DataType.INT8))
        floats = ir.Value(name=f"{result.name}_float", shape=result.shape, type=result.type)
        fused = ir.Node("", "QLinearConv", inputs, node.attributes.values(), outputs=[made], name=node.name)
        back = ir.Node("", "DequantizeLinear", [made, scale, zero], outputs=[floats], name=f"{node.name}_dequantize")
        model.graph.insert_before(node, [fused, back])
        replace_value(result, floats)
        modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


def _make_room(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: ir.Value, x_scale: Array
) -> tuple[ir.Value, ir.Value]:
    """A convolution's weight and scales, coarser in channels whose bias is too many steps for the kernel's int32.

    These are channels of tiny weights: what they lose is nothing beside their bias.
    """
    steps = np.abs(_numpy(node.inputs[2])) / (x_scale * _numpy(scale).astype(np.float64))
    factors = np.maximum(steps / LARGEST_BIAS, 1)
    if not (factors > 1).any():
        return weight, scale

    def coarser(array: Array) -> Array:
        rounded: Array = np.rint(array / along(factors, 0, array.ndim)).astype(np.int8)
        return rounded

    assert weight.const_value is not None
    return (
        add_weight(graph, f"{node.name}_weight", weight.const_value, coarser, ir.DataType.INT8),
        add_constant(graph, f"{node.name}_weight_scale", (_numpy(scale) * factors).astype(np.float32)),
    )


def make_unsigned(model: ir.Model) -> tuple[ir.Model, bool]:
    """Signed activations → unsigned ones: every zero point of an activation is 128 more."""
    graph, modified = model.graph, False
    turned: dict[str, ir.Value] = {}
    for node in graph:
        for index in ZERO_POINTS.get(node.op_type, ()):
            zero = node.inputs[index] if index < len(node.inputs) else None
            if zero is None or zero.dtype != ir.DataType.INT8 or (
                node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()
            ):  # fmt: skip
                continue
            name = f"{zero.name}_unsigned"
            if name not in turned:
                turned[name] = add_constant(model.graph, name, (_numpy(zero).astype(np.int16) + SHIFT).astype(np.uint8))
            node.replace_input_with(index, turned[name])
            modified = True
        if node.op_type in ("QuantizeLinear", "QLinearConv"):
            node.outputs[0].dtype = ir.DataType.UINT8
    if modified:
        for value in list(graph.initializers.values()):
            drop_unused(value)
    return model, modified


ZERO_POINTS = {
    "QuantizeLinear": (2,), "DequantizeLinear": (2,), "QLinearConv": (2, 7), "MatMulIntegerToFloat": (4,),
}  # fmt: skip
"""Where each operator takes the zero point of an activation."""


def _dequantized(node: ir.Node, index: int) -> ir.Node | None:
    """The DequantizeLinear that gives a node's input, or None."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _bias_after(node: ir.Node, weight: ir.Node) -> ir.Node | None:
    """The Add of a constant for each output channel that is the only user of a MatMul by ``weight``, or None."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    other = users[0].node.inputs[1 - users[0].idx]
    numbers = weight.inputs[0]
    if other is None or other.shape is None or not other.is_initializer() or numbers is None or numbers.shape is None:
        return None
    return users[0].node if list(other.shape) == [numbers.shape[1]] else None  # the kernel broadcasts nothing


def _place(node: ir.Node, value: ir.Value) -> int:
    return next(index for index, one in enumerate(node.inputs) if one is value)


def _numpy(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
