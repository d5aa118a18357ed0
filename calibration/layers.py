"""The layers of a graph that can be quantized: convolutions and linear layers with a constant weight.

A linear layer is a MatMul with a constant matrix, or a Gemm. Its bias, if it has one, is the Gemm's or the Conv's third
input, or is added by the next node. Everything else that multiplies is left in floating point, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray

Kind = Literal["conv", "linear"]
SUFFIXES = (".transposed", ".weight")  # of a weight's name, which without them is the module's


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that multiplies ``input`` by a constant ``weight``.

    out_axis, in_axis: the axes of the weight's output and input channels; channel: the input's axis of channels. A
    grouped convolution has only its group's input channels on ``in_axis``.
    """

    name: str  # the module's, like unet.conv_in
    kind: Kind
    node: ir.Node
    out_axis: int
    in_axis: int
    channel: int

    @property
    def input(self) -> ir.Value:
        """What is multiplied by the weight."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """The constant factor."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """The product; a linear layer's bias may be added after it."""
        return self.node.outputs[0]

    @property
    def work(self) -> float:
        """Multiplications for one image, as far as the output's sizes are fixed."""
        sizes = [size for size in (self.output.shape or ()) if isinstance(size, int)]
        weight = self.weight.const_value
        assert weight is not None
        return math.prod(sizes) * float(weight.size / int(weight.shape.numpy()[self.out_axis]))

    @property
    def bias(self) -> ir.Value | None:
        """The constant that is added to each output channel, wherever the graph adds it, or None."""
        if len(self.node.inputs) > 2:
            return self.node.inputs[2]
        if self.kind == "conv":
            return None  # a vector that is added later is added along the last axis, which is no channel's
        users = list(self.output.uses())
        if len(users) != 1 or users[0].node.op_type != "Add":
            return None
        other = users[0].node.inputs[1 - users[0].idx]
        is_bias = other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1
        return other if is_bias else None


def find(model: ir.Model) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers in the graph's order, and what multiplies but cannot be quantized: name to reason."""
    layers: list[Layer] = []
    left: dict[str, str] = {}
    taken: set[str] = set()
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm", "ConvTranspose", "Einsum") or node.domain:
            continue
        why = _why_not(node)
        name = _name(node)
        if name in taken:  # a weight that several nodes share
            name = f"{name} ({node.name})"
        taken.add(name)
        if why:
            left[name] = why
            continue
        rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 3
        if node.op_type == "Conv":
            layers.append(Layer(name, "conv", node, 0, 1, 1))
        elif node.op_type == "Gemm" and _int(node, "transB"):
            layers.append(Layer(name, "linear", node, 0, 1, 1))
        else:
            layers.append(Layer(name, "linear", node, 1, 0, rank - 1))
    return layers, left


def _why_not(node: ir.Node) -> str | None:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return f"{node.op_type} has no int8 kernel in the runtimes"
    first, weight = node.inputs[0], node.inputs[1]
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return "both factors are activations"
    if first is None or first.const_value is not None:
        return "its input is constant"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}"
    if node.op_type == "MatMul" and len(weight.const_value.shape) != 2:
        return "its weight is no matrix"
    if node.op_type == "MatMul" and first.shape is None:
        return "the rank of its input is unknown"
    if node.op_type == "Gemm":
        scaled = any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta"))
        if scaled or _int(node, "transA"):
            return "this Gemm scales or transposes"
    return None


def _name(node: ir.Node) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    name = weight.name if weight is not None and weight.is_initializer() else node.name
    for suffix in SUFFIXES:
        name = str(name).removesuffix(suffix)
    return str(name)


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def along(values: NDArray[Any], axis: int, rank: int) -> NDArray[Any]:
    """Values [n] in a shape that is broadcast along ``axis`` of an array of ``rank`` axes."""
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])
