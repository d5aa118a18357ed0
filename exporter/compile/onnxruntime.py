"""The hub to ONNX Runtime's dialect: the same graph in the forms that its CPU kernels run fastest.

Attention. The exporter writes it over four axes, with a Reshape and a Transpose on each side:

    Q [B,S,H·D] → Reshape [B,S,H,D] → Transpose [B,H,S,D] ┐
    K, V likewise                                          ├ Attention [B,H,S,D] → Transpose → Reshape [B,S,H·D]
                                                           ┘
Both kernels below take [B,S,H·D] as it is and find the heads themselves. Measured (ORT 1.32, 2 cores with AVX-512,
8 heads of 40 to 160, milliseconds relative to the four-axes form):

    tokens × context     Attention, packed     MultiHeadAttention
    64 × 64, 64 × 77            0.5–0.8              0.9–1.0
    256 × 77                    0.5–0.9              0.7–1.0
    1024 × 1024                 0.8–1.0              0.7–1.0
    2304 × 2304                 1.0                  0.8–0.9
    4096 × 4096                 1.0–1.2              0.8

MultiHeadAttention works in tiles, so it never holds the S×L scores, which at 4096 tokens and 16 heads are 1 GB. So it
is taken for long sequences, and the packed Attention for the rest. With a single head of 512 (a VAE's) tiles do not
fit the cache and it is no faster; a mask or causal attention takes its slow path. Those stay Attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.weights import NARROW, group_of, narrow
from exporter.compile import onnxruntime_weights
from exporter.compile.onnxruntime_integer import convolve, make_unsigned, multiply
from runtimes.errors import Progress
from runtimes.manifest import Graph
from runtimes.session import require
from runtimes.target import Target

WHY = "ONNX Runtime's CPU kernels have no bf16 arithmetic and no fp8, and fp16 is slower than fp32 there"
DYNAMIC = ("cpu", "arm64")  # MatMulNBits rounds activations itself
SCORES = ()  # its attention is one float operator
LONG = 1024 * 1024  # queries × keys from which MultiHeadAttention is faster (see above)
WIDEST_HEAD = 160  # the widest head measured to be so
MICROSOFT = "com.microsoft"
HEADS_FIRST = [0, 2, 1, 3]  # [B,S,H,D] ↔ [B,H,S,D]

Rewrite = Callable[[ir.Model], tuple[ir.Model, bool]]


def precisions(target: Target) -> tuple[str, ...]:
    """What its CPU kernels are good at; int8 is for a graph that is quantized already."""
    return ("fp32", *NARROW, "int8")


def computes_in_fp16(target: Target, precision: str) -> bool:
    """Its CPU kernels compute in fp32 and in 8 bits."""
    return False


def check(target: Target) -> None:
    """The bundle is written without ONNX Runtime, but its version is recorded, and the gate runs it."""
    require("onnxruntime")


def depends_on(target: Target) -> str:
    """The versions of the writer and of the runtime whose kernels the rules were measured on."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("onnx-ir", "onnxruntime"))


def alternatives(graph: Graph, target: Target, precision: str) -> tuple[Graph, ...]:
    """None: its files say all."""
    return ()


def build(
    source: Path, graph: Graph, output: Path, target: Target, precision: str, max_batch: int, progress: Progress,
    islands: Collection[str] = frozenset(),
) -> Graph:  # fmt: skip
    """Write model.onnx and model.onnx.data. See exporter.compile.compile_graph."""
    progress(f"{graph.kind}: rewriting for ONNX Runtime", 0.0)
    model = ir.load(source)
    rewrites = REWRITES
    if precision in NARROW:
        group = group_of(graph.kind, precision)
        model, _ = narrow(model, NARROW[precision], group)
        rewrites += onnxruntime_weights.FOLDED if group else onnxruntime_weights.REWRITES
    elif precision == "int8":
        rewrites += (*INTEGER[target.device], onnxruntime_weights.multiply)
    for rewrite in rewrites:
        model, _ = rewrite(model)
    progress(f"{graph.kind}: writing", 0.2)
    ir.save(model, output / "model.onnx", external_data="model.onnx.data")
    return replace(graph, file=f"{output.name}/model.onnx", properties={})


def pack_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Attention over four axes → Attention or MultiHeadAttention over three; the module's head tells which."""
    modified = False
    for node in list(model.graph):
        found = _match(node) if (node.domain, node.op_type) == ("", "Attention") else None
        if found is None:
            continue
        packed = _multi_head_attention(node, found) if _is_long(node, found) else _packed_attention(node, found)
        if packed.domain:
            model.opset_imports[packed.domain] = 1
        model.graph.insert_before(node, packed)
        result = packed.outputs[0]
        result.shape, result.type = found.result.shape, found.result.type
        result.name = f"{node.outputs[0].name}_packed"
        ir.convenience.replace_all_uses_with(found.result, result, replace_graph_outputs=True)
        modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


REWRITES: tuple[Rewrite, ...] = (pack_attention,)
INTEGER: dict[str, tuple[Rewrite, ...]] = {
    "cpu": (multiply, convolve, make_unsigned),
    "arm64": (multiply, convolve),
}


@dataclass(frozen=True)
class _Packed:
    """An Attention with its Transposes and Reshapes: the packed tensors on both sides, and its sizes."""

    operands: tuple[ir.Value, ir.Value, ir.Value]  # query, key, value: [B,S,H·D], [B,L,H·D], [B,L,H·Dv]
    result: ir.Value  # [B,S,H·Dv]
    heads: int
    head: int  # D
    queries: int | None  # S and L, where they are fixed
    keys: int | None


def _match(node: ir.Node) -> _Packed | None:
    """Find the packed tensors around an Attention, or None where the graph has another form."""
    past = any(value is not None for value in node.inputs[4:])
    if (
        past
        or len([output for output in node.outputs if output.name and (output.uses() or output.is_graph_output())]) != 1
    ):
        return None
    operands = [_operand(value) for value in node.inputs[:3]]
    result = _result(node.outputs[0])
    query, key, value = node.inputs[:3]
    if result is None or query is None or key is None or value is None or any(found is None for found in operands):
        return None
    heads = {_sizes(value)[1] for value in (query, key, value)}
    head = _sizes(query)[3]
    if len(heads) != 1 or not isinstance(number := heads.pop(), int) or not isinstance(head, int):
        return None  # grouped queries, or sizes that are not fixed
    queries, keys = (size if isinstance(size := _sizes(value)[2], int) else None for value in (query, key))
    return _Packed(tuple(operands), result, number, head, queries, keys)  # type: ignore[arg-type]  # no None: see above


def _operand(value: ir.Value | None) -> ir.Value | None:
    """x of Transpose(Reshape(x)), if that only splits x's last axis into heads and moves these forward."""
    transpose = value.producer() if value is not None else None
    if value is None or not _is(transpose, "Transpose") or _permutation(transpose) != HEADS_FIRST:
        return None
    reshape = transpose.inputs[0].producer()  # type: ignore[union-attr]
    packed = reshape.inputs[0] if _is(reshape, "Reshape") else None  # type: ignore[union-attr]
    return packed if packed is not None and _is_packed(packed, value) else None


def _result(value: ir.Value) -> ir.Value | None:
    """y of y = Reshape(Transpose(value)), if that undoes what ``_operand`` describes and nothing else uses value."""
    transpose = _only_user(value)
    if not _is(transpose, "Transpose") or _permutation(transpose) != HEADS_FIRST:
        return None
    reshape = _only_user(transpose.outputs[0])  # type: ignore[union-attr]
    packed = reshape.outputs[0] if _is(reshape, "Reshape") else None  # type: ignore[union-attr]
    return packed if packed is not None and _is_packed(packed, value) else None


def _is_packed(packed: ir.Value, value: ir.Value) -> bool:
    """Whether [B,S,H·D] and [B,H,S,D] are the shapes of ``packed`` and ``value``."""
    if packed.shape is None or value.shape is None or len(packed.shape) != 3 or len(value.shape) != 4:
        return False
    batch, heads, tokens, head = _sizes(value)
    return isinstance(heads, int) and isinstance(head, int) and _sizes(packed) == [batch, tokens, heads * head]


def _is_long(node: ir.Node, found: _Packed) -> bool:
    plain = len([value for value in node.inputs if value is not None]) == 3 and not _number(node, "is_causal", 0)
    return (
        plain
        and not _number(node, "softcap", 0.0)
        and found.heads > 1
        and found.head <= WIDEST_HEAD
        and (found.queries or 0) * (found.keys or 0) >= LONG
    )


def _packed_attention(node: ir.Node, found: _Packed) -> ir.Node:
    heads = [ir.AttrInt64("q_num_heads", found.heads), ir.AttrInt64("kv_num_heads", found.heads)]
    inputs = [*found.operands, *node.inputs[3:]]
    return ir.Node("", "Attention", inputs, [*node.attributes.values(), *heads], name=node.name)


def _multi_head_attention(node: ir.Node, found: _Packed) -> ir.Node:
    attributes: list[ir.Attr] = [ir.AttrInt64("num_heads", found.heads)]
    if "scale" in node.attributes:
        attributes.append(node.attributes["scale"])  # both operators default to 1/√D
    return ir.Node(MICROSOFT, "MultiHeadAttention", found.operands, attributes, name=node.name)


def _is(node: ir.Node | None, operator: str) -> bool:
    return node is not None and (node.domain, node.op_type) == ("", operator)


def _permutation(node: ir.Node | None) -> list[int] | None:
    permutation = node.attributes.get("perm") if node is not None else None
    return list(permutation.as_ints()) if permutation is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def _number(node: ir.Node, name: str, default: float) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _sizes(value: ir.Value) -> list[int | str | None]:
    """A shape as numbers and names: two free dimensions of one name are equal."""
    assert value.shape is not None
    return [size if isinstance(size, int) else size.value for size in value.shape]
