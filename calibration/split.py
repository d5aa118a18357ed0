"""Two ranges for a concatenation: conv(concat(a, b)) = conv_a(a) + conv_b(b) (Q-Diffusion, Li et al. 2023).

A U-Net's shortcut reads what its last block made beside what was skipped over the whole way down, and the one may be
many times larger than the other: with one scale for both the smaller one is left with few numbers. So a convolution or
linear layer that reads a concatenation of channels becomes one for each part, with its slice of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.graph import Array, add_node, add_weight, drop_unused, free_name, replace_value
from calibration.layers import Layer, find


def split(model: ir.Model) -> tuple[ir.Model, bool]:
    """Split each layer whose input is a Concat along its channels."""
    modified = False
    for layer in find(model)[0]:
        sizes = _parts(layer)
        if sizes:
            _split(model.graph, layer, sizes)
            modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


def _parts(layer: Layer) -> list[int]:
    """The number of channels of each part, or nothing where there are no parts to split."""
    concat = layer.input.producer()
    if concat is None or concat.op_type != "Concat" or layer.node.op_type not in ("Conv", "MatMul"):
        return []
    rank = len(layer.input.shape or ())
    if not rank or concat.attributes["axis"].as_int() % rank != layer.channel % rank:
        return []
    sizes = [value.shape[layer.channel] if value is not None and value.shape else None for value in concat.inputs]
    assert layer.weight.shape is not None
    whole = all(isinstance(size, int) for size in sizes) and sum(sizes) == layer.weight.shape[layer.in_axis]  # type: ignore[arg-type]
    return sizes if whole and len(sizes) > 1 else []  # type: ignore[return-value]  # a grouped convolution is not whole


def _split(graph: ir.Graph, layer: Layer, sizes: Sequence[int]) -> None:
    concat, node = layer.input.producer(), layer.node
    assert concat is not None
    total: ir.Value | None = None
    start = 0
    for index, (part, size) in enumerate(zip(concat.inputs, sizes, strict=True)):
        weight = _slice(graph, layer, index, start, size)
        start += size
        bias = node.inputs[2:] if index == 0 else ()  # once
        name = f"{layer.output.name}_{index}"
        product = add_node(
            node, node.op_type, [part, weight, *bias], name, ir.DataType.FLOAT, tuple(node.attributes.values()),
            shape=layer.output.shape,
        )  # fmt: skip
        if total is None:
            total = product
        else:
            total = add_node(node, "Add", [total, product], f"{name}_sum", ir.DataType.FLOAT, shape=product.shape)
    assert total is not None
    replace_value(layer.output, total)
    old = layer.weight
    graph.remove(node, safe=True)
    drop_unused(old)


def _slice(graph: ir.Graph, layer: Layer, index: int, start: int, size: int) -> ir.Value:
    axis, whole = layer.in_axis, layer.weight.const_value
    assert whole is not None
    shape = [size if place == axis else n for place, n in enumerate(whole.shape.numpy())]

    def change(array: Array) -> Array:
        return np.take(array, range(start, start + size), axis)

    name = free_name(graph, f"{layer.weight.name}.part{index}")  # layers may share a weight, but not its parts
    return add_weight(graph, name, whole, change, shape=shape)
