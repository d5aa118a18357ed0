"""The scores of long attention, Q·Kᵀ, in 8 bits: queries and keys pass a pair of Q and DQ, each with one scale.

    Q ─ Q ─ DQ ─┐
    K ─ Q ─ DQ ─┴ Attention ─        the softmax, and its product with the values, stay floats
    V ──────────┘

With many tokens nothing of a denoiser takes as long as its attention, and on OpenVINO's CPU an integer product makes it
faster: a call of a UNet of Stable Diffusion 1.5's size, of which five self-attentions at 4096 tokens were 37 %, took
1.75 s in place of 2.02 (2 cores with AVX-512 VNNI; quantizing the values too saved nothing more). With few tokens it
was not tried: there is little to save. ONNX Runtime and TensorRT have no such kernels: their attention is one operator
of floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from calibration.layers import Layer
from calibration.numbers import INT8, Numbers
from calibration.quantize import quantize_activation

LONG = 1024 * 1024  # queries × keys, from which attention takes a good part of the time
CHANNEL = 3  # of queries and keys [B, heads, tokens, channels]


@dataclass(frozen=True, eq=False)
class Scores:
    """An Attention whose queries and keys may be quantized. name: of the layer that makes the queries."""

    name: str
    node: ir.Node

    @property
    def operands(self) -> tuple[ir.Value, ir.Value]:
        """Queries and keys."""
        query, key = self.node.inputs[:2]
        assert query is not None and key is not None
        return query, key


def find(model: ir.Model, layers: Sequence[Layer]) -> list[Scores]:
    """The long attentions whose queries one of ``layers`` makes, in the graph's order."""
    makers = {layer.node: layer.name for layer in layers}
    found = []
    for node in model.graph:
        if (node.domain, node.op_type) != ("", "Attention"):
            continue
        shapes = [value.shape if value is not None else None for value in node.inputs[:2]]
        if any(shape is None or len(shape) != 4 for shape in shapes):
            continue
        queries, keys = (shape[2] for shape in shapes if shape is not None)
        name = _maker(node, makers)
        if isinstance(queries, int) and isinstance(keys, int) and queries * keys >= LONG and name is not None:
            found.append(Scores(name, node))
    return found


def write(
    model: ir.Model, scores: Sequence[Scores], scales: Mapping[str, float], numbers: Numbers = INT8
) -> tuple[ir.Model, bool]:
    """Quantize queries and keys; ``scales``: of both, by the value's name."""
    for one in scores:
        for index, value in enumerate(one.operands):
            quantized = quantize_activation(one.node, value, scales[str(value.name)], numbers)
            one.node.replace_input_with(index, quantized)
    return model, bool(scores)


def _maker(node: ir.Node, makers: Mapping[ir.Node, str]) -> str | None:
    """The layer that is reached from an attention's queries by first inputs."""
    before: ir.Node | None = node
    while before is not None and before not in makers:
        value = before.inputs[0] if before.inputs else None
        before = value.producer() if value is not None else None
    return makers[before] if before is not None else None
