"""Store weights in 8 or 4 bits and compute in floating point: files a quarter or a sixth as large, and no calibration.

    W(int8) ─ DequantizeLinear ┐                          rows(int8) ─ Gather ─ Cast ┐
    x ─────────────────────────┴ MatMul, Gemm, Conv       scales ───── Gather ───────┴ Mul

Weights are symmetric. In 8 bits there is one scale for each output channel. A table of embeddings has one for each row,
and rows and scales are gathered before they are multiplied: dequantized as a whole, a runtime would expand it at load.

Text encoders have groups in 8 bits too: a scale for each 16 input channels of a linear layer, or elements of a row. The
peak of a few values is lower, so that they are rounded finer. On a text encoder of SD 1.5's size (random weights,
activations in float; the files' share of fp32's, and SQNR):

    one scale for each channel, float32        0.25    31.5 dB
    groups of 64, 32, 16, scales in float32    0.27, 0.28, 0.31    34.4, 34.9, 36.3 dB
    groups of 16, scales in bfloat16           0.28    35.7 dB

A smaller scale than the peak's gains nothing in so many steps. Scales of groups of 8 bits are bfloat16, rounded up:
half as large as float32, and unlike float16 it holds the scale of any weight. The peak itself is then rounded too.

In 4 bits, a linear layer's weight has a scale for each group of 32 input channels. The largest value of a group is not
always worth keeping: a smaller scale cuts it off and rounds the others finer. So each group takes the one of a few clip
ratios that has the least squared error. What has no groups (convolutions, tables, and linear layers whose input
channels do not fill them) is stored in 8 bits.

Scales and numbers are made when the model is saved, one weight at a time, so that memory does not grow with the model.
The price is that each weight is read and rounded twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.graph import add_constant, add_node, add_weight, drop_unused, free_name, replace_input
from calibration.layers import along, find
from calibration.ranges import MOST
from runtimes.errors import DexportError

Array = NDArray[Any]
GROUP = 32  # input channels that share a 4-bit scale
DYNAMIC = "dexport.dynamic"  # a graph's note: activations are to be rounded to 8 bits, in groups of so many
FINE = 16  # input channels, or elements of a row, that share an 8-bit scale in text encoders
SMALLEST = 1024  # elements: what is smaller saves less than its nodes cost
OPSET = 21  # the first whose DequantizeLinear knows 4 bits and groups
FLOAT = (ir.AttrInt64("to", ir.DataType.FLOAT.value),)  # a Cast's attributes
TYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
NARROW = {"w8": 8, "w4": 4}  # precisions of weights alone, and their bits
RATIOS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75)  # of a group's peak; with 7/8 a negative peak becomes -8
CHUNK = 1 << 18  # elements looked at together, so that they stay in the cache
LEAST = float(np.finfo(np.float32).tiny)  # scale: its reciprocal is a float32 too


def group_of(kind: str, precision: str) -> int:
    """``narrow``'s group for a kind of graph: what runs once a picture is exact rather than fast."""
    return FINE if kind in ("text", "hint") and precision == "w8" else 0


def narrow(
    model: ir.Model, bits: int, group: int = 0, only: Collection[ir.Node] | None = None
) -> tuple[ir.Model, bool]:
    """Store the weights of linear layers, convolutions and tables in ``bits``, 8 or 4; the model is changed in place.

    ``group``: input channels that share an 8-bit scale; 0 for all of them. What they do not divide has one scale too.
    ``only``: the nodes whose weights are narrowed; all by default.
    A weight that something else reads too stays as it is, since its floats would have to stay beside the numbers.
    Return the model and whether it was modified; raise DexportError for other bits, and for an opset without 4 bits.
    """
    if bits not in TYPES:
        raise DexportError(f"weights cannot be stored in {bits} bits; choose 8 or 4")
    uses = [*_layers(model, bits, GROUP if bits == 4 else group), *_tables(model, group if bits == 8 else 0)]
    uses = [use for use in uses if only is None or use.node in only]
    if uses and (opset := model.opset_imports.get("", 0)) < OPSET:
        raise DexportError(f"the graph has opset {opset}, and narrow weights need {OPSET}; export it again")
    counts = Counter(use.weight for use in uses)
    whole = {weight for weight in counts if counts[weight] == len(weight.uses()) and not weight.is_graph_output()}
    modified = False
    for use in uses:
        if use.weight in whole:
            (_write_table if use.node.op_type == "Gather" else _write_layer)(model.graph, use)
            modified = True
    return model, modified


@dataclass(frozen=True)
class _Use:
    """A node that reads a weight; ``axis`` is that of the weight's output channels, or of a table's rows.

    group: elements along the other axis that share a scale; 0: all.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    bits: int
    group: int

    @property
    def name(self) -> str:
        """What the numbers are named after: the same for all that can share them."""
        rows = "_rows" if self.group and self.node.op_type == "Gather" else ""  # which have another shape
        return f"{self.weight.name}_int{self.bits}" + (f"_axis{self.axis}{rows}" if self.bits == 8 else "")

    @property
    def scales(self) -> list[int]:
        """The shape of the scales."""
        sizes = _sizes(self.weight)
        if not self.group:
            return [sizes[self.axis]]
        return [size if at == self.axis else size // self.group for at, size in enumerate(sizes)]


def _layers(model: ir.Model, bits: int, group: int) -> Iterator[_Use]:
    for layer in find(model)[0]:
        sizes = _sizes(layer.weight)
        grouped = group and layer.kind == "linear" and sizes[layer.in_axis] % group == 0
        if np.prod(sizes) >= SMALLEST:
            yield _Use(layer.node, layer.weight, layer.out_axis, bits if grouped else 8, group if grouped else 0)


def _tables(model: ir.Model, group: int) -> Iterator[_Use]:
    """Gathers of the rows of a constant [vocab, width] of floats."""
    for node in model.graph:
        table = node.inputs[0] if (node.domain, node.op_type) == ("", "Gather") else None
        if table is None or not table.is_initializer() or table.dtype != ir.DataType.FLOAT:
            continue
        sizes = _sizes(table)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if len(sizes) == 2 and axis in (0, -2) and sizes[1] >= GROUP and np.prod(sizes) >= SMALLEST:
            grouped = group and sizes[1] % group == 0 and node.outputs[0].shape is not None
            yield _Use(node, table, 0, 8, group if grouped else 0)


def _write_layer(graph: ir.Graph, use: _Use) -> None:
    """Dequantize the weight before its first reader, for all of them."""
    name = f"{use.name}_dequantized"
    earlier = next((node.outputs[0] for node in _readers(graph, use.name) if node.outputs[0].name == name), None)
    if earlier is None:
        axis = [ir.AttrInt64("axis", 1 - use.axis if use.group else use.axis)]
        group = [ir.AttrInt64("block_size", use.group)] if use.group else []
        scale = _scale(graph, use, f"{use.name}_scale", use.scales)
        if scale.dtype != ir.DataType.FLOAT:
            scale = add_node(
                use.node, "Cast", [scale], f"{scale.name}_wide", ir.DataType.FLOAT, FLOAT, shape=scale.shape
            )
        inputs = [_numbers(graph, use, _sizes(use.weight)), scale]
        earlier = add_node(use.node, "DequantizeLinear", inputs, name, ir.DataType.FLOAT, [*axis, *group],
                           shape=use.weight.shape)  # fmt: skip
    replace_input(use.node, 1, earlier)


def _write_table(graph: ir.Graph, use: _Use) -> None:
    """Gather the rows' numbers and scales, and multiply them; groups are an axis of their own meanwhile."""
    node, result, rows = use.node, use.node.outputs[0], use.node.inputs[1]
    name, axis, (count, width) = str(result.name), [ir.AttrInt64("axis", 0)], _sizes(use.weight)
    groups = [width // use.group] if use.group else []
    column = _scale(graph, use, f"{use.name}_row_scale", [count, *groups, 1])
    table = _numbers(graph, use, [count, *groups, width // (groups or [1])[0]])
    numbers = add_node(node, "Gather", [table, rows], f"{name}_numbers", ir.DataType.INT8, axis)
    scales = add_node(node, "Gather", [column, rows], f"{name}_scales", column.dtype, axis)
    if column.dtype != ir.DataType.FLOAT:
        scales = add_node(node, "Cast", [scales], f"{name}_scales_wide", ir.DataType.FLOAT, FLOAT)
    floats = add_node(node, "Cast", [numbers], f"{name}_floats", ir.DataType.FLOAT, FLOAT)
    result.name = f"{name}_wide"  # what follows takes its name, which may be that of the graph's output
    product = add_node(node, "Mul", [floats, scales], f"{name}_groups" if groups else name, ir.DataType.FLOAT,
                       shape=None if groups else result.shape)  # fmt: skip
    if groups:
        assert result.shape is not None
        sizes = [0] * (len(result.shape) - 1) + [width]  # 0: as it is
        whole = add_constant(graph, free_name(graph, f"{name}_sizes"), np.array(sizes, np.int64))
        product = add_node(node, "Reshape", [product, whole], name, ir.DataType.FLOAT, shape=result.shape)
    ir.convenience.replace_all_uses_with(result, product, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    drop_unused(use.weight)


def _numbers(graph: ir.Graph, use: _Use, shape: Sequence[int]) -> ir.Value:
    tensor, axis, bits, group = use.weight.const_value, use.axis, use.bits, use.group
    assert tensor is not None
    if use.name in graph.initializers:
        return graph.initializers[use.name]
    return add_weight(
        graph, use.name, tensor, lambda value: quantize(value, axis, bits, group)[0].reshape(shape), TYPES[bits], shape
    )


def _scale(graph: ir.Graph, use: _Use, name: str, shape: Sequence[int]) -> ir.Value:
    tensor, axis, bits, group = use.weight.const_value, use.axis, use.bits, use.group
    assert tensor is not None
    if name in graph.initializers:
        return graph.initializers[name]
    dtype = ir.DataType.BFLOAT16 if bits == 8 and group else ir.DataType.FLOAT
    return add_weight(
        graph, name, tensor, lambda value: quantize(value, axis, bits, group)[1].reshape(shape), dtype, shape
    )


def quantize(weight: Array, axis: int, bits: int, group: int = 0) -> tuple[Array, Array]:
    """A float32 weight as numbers, int8 or int4, and their scales.

    One scale for each index of ``axis``, float32; or of a matrix one for each ``group`` of the other axis, float32 for
    int4 and bfloat16 for int8. int4 has groups only.
    """
    if not group:
        others = tuple(index for index in range(weight.ndim) if index != axis)
        scale = _positive(np.maximum(weight.max(axis=others), -weight.min(axis=others)) / np.float32(MOST))
        factor = np.broadcast_to(along(scale, axis, weight.ndim), weight.shape)
        whole = np.empty(weight.shape, np.int8)
        rows = max(1, CHUNK * len(weight) // weight.size)
        for start in range(0, len(weight), rows):
            piece = slice(start, start + rows)
            whole[piece] = np.rint(weight[piece] / factor[piece])
        return whole, scale
    choose, least, most = (_peak_scale, -MOST, MOST) if bits == 8 else (_best_scale, -8, 7)
    turned = np.ascontiguousarray(weight if axis == 0 else weight.T)  # [out, in]
    groups = turned.reshape(-1, group)
    numbers, scale = np.empty(groups.shape, np.int8), np.empty(len(groups), np.float32)
    for start in range(0, len(groups), CHUNK // group):
        piece = slice(start, start + CHUNK // group)
        scale[piece] = choose(groups[piece])
        numbers[piece] = np.clip(np.rint(groups[piece] / scale[piece, None]), least, most)
    kinds = (np.int8, ml_dtypes.bfloat16) if bits == 8 else (ml_dtypes.int4, np.float32)
    narrowed, scales = numbers.reshape(turned.shape).astype(kinds[0]), scale.reshape(len(turned), -1).astype(kinds[1])
    return (narrowed, scales) if axis == 0 else (narrowed.T, scales.T)


def _peak_scale(groups: Array) -> Array:
    """Of each group [n, group], the least scale in bfloat16 whose 127 steps reach the peak, as float32."""
    peak = np.maximum(groups.max(axis=1), -groups.min(axis=1))
    bits = _positive(peak / np.float32(MOST)).view(np.uint32)
    up: Array = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return up


def _best_scale(groups: Array) -> Array:
    """Of each group [n, 32], the scale with the least squared error."""
    peak = np.maximum(groups.max(axis=1), -groups.min(axis=1))
    least, best = np.full(len(groups), np.inf, np.float32), np.ones(len(groups), np.float32)
    for ratio in RATIOS:
        scale = _positive(peak * np.float32(ratio / 7))
        steps = groups / scale[:, None]
        error = np.clip(np.rint(steps), -8, 7)
        error -= steps
        squared = np.einsum("ij,ij->i", error, error) * np.float32(ratio**2)  # in units that no weight overflows
        better = squared < least
        least[better], best[better] = squared[better], scale[better]
    return best


def _positive(scale: Array) -> Array:
    """1 where a scale is 0, since all weights are, and never so little that a weight divided by it overflows."""
    return np.where(scale > 0, np.maximum(scale, np.float32(LEAST)), np.float32(1))


def _sizes(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())


def _readers(graph: ir.Graph, name: str) -> list[ir.Node]:
    value = graph.initializers.get(name)
    return [] if value is None else [use.node for use in value.uses()]
