"""Narrow weights to what ONNX Runtime's CPU kernels take: MatMulNBits for linear layers, floats for convolutions.

ONNX Runtime fuses DequantizeLinear and MatMul by itself when it loads a graph, into MatMulNBits with blocks of 32.
Written here, the layout costs less time and memory at load (0.11 s instead of 0.37 s for a text encoder of 123 million
weights, 160 MB instead of 260 MB after), and the blocks are as large as is good. Measured (ORT 1.32, 2 cores with
AVX-512 VNNI, 77 tokens, 768 → 3072, milliseconds; the SQNR of the product with random factors in dB):

    fp32 MatMul                                       1.94
    8 bits, blocks of 32, 128, 256, activations int8  1.46, 1.15, 1.14    46.9, 46.3, 46.1
    8 bits, blocks of 32, activations float           4.6                 48.6
    4 bits, blocks of 32, activations int8            1.54                26.6
    4 bits, blocks of 32, activations float           2.0                 26.6

"Activations int8" is accuracy level 4: the kernel rounds each token's activations to 8 bits, with a scale for each
block. With float activations its 8-bit kernel is slower than fp32. The weights stay narrow in memory in both cases.

A convolution has no such kernel. Its DequantizeLinear would run at each call, and hide the weight from the blocked
layout that ONNX Runtime's convolutions prefer: 10 to 25 % slower than fp32. As Cast and Mul, which it folds at load,
the file stays as small, and the convolution is as fast as in fp32 and takes as much memory.

A text encoder is run once a picture, and all that is drawn depends on it. So its linear layers are folded too: nothing
is rounded but the weights. On one of SD 1.5's size, with groups of 16 (SQNR; milliseconds a call on a machine that
others used too, so for the order alone; MB after load):

    folded                                         35.7 dB     980    1026
    MatMulNBits, blocks of 16, activations float   35.7 dB    2200     190
    MatMulNBits, blocks of 16, activations int8    34.2 dB     820     190
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.graph import add_constant, add_node, add_weight
from calibration.weights import FLOAT

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
BLOCKS = (128, 64, 32, 16)  # MatMulNBits takes 256 too, for no time gained and coarser activations
SCALE = 4  # bytes of a scale
INT8_INPUT = 4  # an accuracy level of MatMulNBits

Rewrite = Callable[[ir.Model], tuple[ir.Model, bool]]


@dataclass(frozen=True)
class _Weight:
    """What DequantizeLinear makes of numbers and scales; ``axis`` is that of the output channels."""

    node: ir.Node
    numbers: ir.Value
    scale: ir.Value
    axis: int
    group: int  # input channels that share a scale; 0: all

    @property
    def bits(self) -> int:
        return 4 if self.numbers.dtype == ir.DataType.INT4 else 8

    @property
    def sizes(self) -> Sequence[int]:
        assert self.numbers.const_value is not None
        return self.numbers.const_value.shape.numpy()

    @property
    def block(self) -> int:
        """The block with the fewest bytes of numbers, of which the last block may be padding, and of scales."""
        inputs = self.sizes[1 - self.axis]
        return self.group or min(BLOCKS, key=lambda block: -(-inputs // block) * (block + SCALE))


def multiply(model: ir.Model) -> tuple[ir.Model, bool]:
    """MatMul or Gemm of a dequantized weight, with or without a bias added → MatMulNBits."""
    modified = False
    for node in list(model.graph):
        weight = _matrix(node)
        if weight is None:
            continue
        outputs, inputs, block = weight.sizes[weight.axis], weight.sizes[1 - weight.axis], weight.block
        last, bias = node, node.inputs[2] if len(node.inputs) > 2 else None
        users = list(node.outputs[0].uses())
        if len(users) == 1 and users[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
            other = users[0].node.inputs[1 - users[0].idx]
            if bias is None and _is_vector(other, outputs):
                last, bias = users[0].node, other
        attributes = {"K": inputs, "N": outputs, "bits": weight.bits, "block_size": block, "accuracy_level": INT8_INPUT}
        result = last.outputs[0]
        product = ir.Value(name=result.name, shape=result.shape, type=result.type)
        made = ir.Node(
            MICROSOFT, "MatMulNBits", [node.inputs[0], *_pack(model.graph, weight), None, None, bias],
            [ir.AttrInt64(name, value) for name, value in attributes.items()], outputs=[product], name=node.name,
        )  # fmt: skip
        model.graph.insert_before(last, made)
        result.name = f"{result.name}_float"
        ir.convenience.replace_all_uses_with(result, product, replace_graph_outputs=True)
        model.graph.remove([node] if last is node else [last, node], safe=True)
        modified = True
    if modified:
        model.opset_imports[MICROSOFT] = 1
        RemoveUnusedNodesPass()(model)
    return model, modified


def fold_convolutions(model: ir.Model) -> tuple[ir.Model, bool]:
    """DequantizeLinear of a convolution's weight → Cast and Mul, which ONNX Runtime computes once, at load."""
    return _fold(model, ("Conv",))


def fold(model: ir.Model) -> tuple[ir.Model, bool]:
    """The same for the weights of linear layers too: small in the file, floats in memory and in arithmetic."""
    return _fold(model, ("Conv", "MatMul", "Gemm"))


def _fold(model: ir.Model, operators: Sequence[str]) -> tuple[ir.Model, bool]:
    modified = False
    for node in list(model.graph):
        weight = _dequantized(node) if not node.domain and node.op_type in operators else None
        if weight is None:
            continue
        floats, before = weight.node.outputs[0], weight.node
        name, axis, sizes = str(floats.name), 1 - weight.axis, list(weight.sizes)
        if weight.group:  # an axis of its own within the groups
            sizes[axis : axis + 1] = [sizes[axis] // weight.group, weight.group]
            column = [1 if at == axis + 1 else size for at, size in enumerate(sizes)]
        else:
            column = [size if at == weight.axis else 1 for at, size in enumerate(sizes)]
        parts = (("numbers", weight.numbers, sizes), ("factor", weight.scale, column))
        factors = [_wide(before, f"{name}_{part}", value, shape) for part, value, shape in parts]
        product = add_node(before, "Mul", factors, f"{name}_scaled", ir.DataType.FLOAT, shape=ir.Shape(sizes))
        if weight.group:
            whole = add_constant(model.graph, f"{name}_sizes", np.array(weight.sizes, np.int64))
            product = add_node(before, "Reshape", [product, whole], f"{name}_whole", ir.DataType.FLOAT,
                               shape=floats.shape)  # fmt: skip
        floats.replace_all_uses_with(product)
        modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


def _wide(before: ir.Node, name: str, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
    """A constant in another shape, as float32."""
    tensor, dtype = value.const_value, value.dtype
    assert before.graph is not None and tensor is not None and dtype is not None
    made = add_weight(before.graph, name, tensor, partial(_reshaped, sizes=sizes), dtype, sizes)
    if dtype == ir.DataType.FLOAT:
        return made
    return add_node(before, "Cast", [made], f"{name}_wide", ir.DataType.FLOAT, FLOAT, shape=made.shape)


REWRITES: tuple[Rewrite, ...] = (multiply, fold_convolutions)
FOLDED: tuple[Rewrite, ...] = (fold,)  # for text encoders


def pack(rows: Array, block: int, bits: int) -> Array:
    """Signed numbers [out, in] as unsigned ones in blocks, 2^(bits-1) more; of 4 bits two a byte, low half first."""
    outputs, inputs = rows.shape
    zero = 1 << (bits - 1)
    codes = np.full((outputs, -(-inputs // block) * block), zero, np.uint8)
    codes[:, :inputs] = rows.astype(np.int8).view(np.uint8) + np.uint8(zero)  # modulo 256, as it must be
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.reshape(outputs, -1, block * bits // 8)


def _pack(graph: ir.Graph, weight: _Weight) -> tuple[ir.Value, ir.Value]:
    """The numbers [out, blocks, bytes] and scales [out, blocks] of the kernel, once for all layers that share them."""
    block, bits, axis = weight.block, weight.bits, weight.axis
    outputs, blocks = weight.sizes[axis], -(-weight.sizes[1 - axis] // block)
    names = f"{weight.numbers.name}_packed", f"{weight.numbers.name}_packed_scale"

    def spread(value: Array) -> Array:
        wide = np.repeat(value[:, None], blocks, axis=1) if value.ndim == 1 else value if axis == 0 else value.T
        return np.array(wide, np.float32)  # never a view: the file may be unmapped

    if names[0] not in graph.initializers:
        numbers, scale = weight.numbers.const_value, weight.scale.const_value
        assert numbers is not None and scale is not None
        add_weight(graph, names[0], numbers, lambda value: pack(value if axis == 0 else value.T, block, bits),
                   ir.DataType.UINT8, [outputs, blocks, block * bits // 8])  # fmt: skip
        add_weight(graph, names[1], scale, spread, shape=[outputs, blocks])
    return graph.initializers[names[0]], graph.initializers[names[1]]


def _matrix(node: ir.Node) -> _Weight | None:
    """The narrow weight of a linear layer, or None where MatMulNBits cannot stand for the node."""
    weight = _dequantized(node) if not node.domain and node.op_type in ("MatMul", "Gemm") else None
    first = node.inputs[0] if weight is not None else None
    if weight is None or first is None or first.shape is None or len(first.shape) < 2 or len(weight.sizes) != 2:
        return None
    if weight.axis != (0 if node.op_type == "Gemm" and _int(node, "transB", 0) else 1):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    scaled = any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta"))
    if scaled or _int(node, "transA", 0) or not (bias is None or _is_vector(bias, weight.sizes[weight.axis])):
        return None
    return weight


def _dequantized(node: ir.Node) -> _Weight | None:
    """A node's constant weight as ``calibration.weights`` writes it: symmetric, and not in one scale alone."""
    dequantize = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if dequantize is None or (dequantize.domain, dequantize.op_type) != ("", "DequantizeLinear"):
        return None
    numbers, scale = dequantize.inputs[:2]
    if scale is not None and (cast := scale.producer()) is not None and cast.op_type == "Cast":
        scale = cast.inputs[0]
    if len(dequantize.inputs) > 2 or numbers is None or scale is None:
        return None
    if numbers.const_value is None or scale.const_value is None or numbers.dtype not in (ir.DataType.INT8,
                                                                                         ir.DataType.INT4):  # fmt: skip
        return None
    rank, group = len(numbers.const_value.shape), _int(dequantize, "block_size", 0)
    axis = _int(dequantize, "axis", 1) % rank
    if len(scale.const_value.shape) != (rank if group else 1) or (group and rank != 2):
        return None
    return _Weight(dequantize, numbers, scale, 1 - axis if group else axis, group)


def _is_vector(value: ir.Value | None, size: int) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and list(value.shape) == [size]


def _reshaped(value: Array, sizes: Sequence[int]) -> Array:
    return value.reshape(sizes).copy()  # no view: the file may be unmapped


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
