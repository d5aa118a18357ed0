"""SmoothQuant: move the large channels of an activation into the weight, where they cost nothing (Xiao et al. 2022).

    x·W = (x / s)·(s·W)        s_j = max|x_j|^α / max|W_j|^(1−α), for each input channel j

Every channel of x / s then has a range more like the others', but a weight's channels differ more. Which is better, and
for which α, follows from the statistics: with steps of Δ, rounding has the variance Δ²/12, so the output's error is

    Δx²/12 · Σ_jo (s_j·W_jo)²  +  Σ_o Δ_o²/12 · Σ_j E[x_j²]/s_j²        Δx = max_j max|x_j|/s_j / 127,
                                                                        Δ_o = max_j |s_j·W_jo| / 127

An input is smoothed by the α with the least error, if that is well below the error as it is. 1/s is folded into what
made x, so that the graph computes as much as before. Two places in a transformer allow that exactly:

    the scale and bias of a LayerNormalization or GroupNormalization
    the value projection before an attention: its output is a mean of values, channel by channel

A third, the linear half of a gated activation a · gelu(b), is left alone on purpose: its channels are quiet for most
prompts and loud for a few, and ranges that were fitted to each channel cut off what other prompts made.

Layers that read the same x share s. An x that something else reads too, or that was made otherwise (by a SiLU, say),
is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.graph import add_weight, free_name, readers, release, replace_input
from calibration.layers import Layer, along
from calibration.observe import Observed
from calibration.ranges import MOST, error_of

Array = NDArray[Any]
ALPHAS = (0.25, 0.4, 0.55, 0.7, 0.85)
WORTH = 0.5  # of the error as it is: smoothed is only what gets below
HEADROOM = 1.2  # for a channel's values beyond what was seen, which no other channel's range covers any more
LARGEST = 1e3  # the most that a channel is divided by
HEADS_FIRST = [0, 2, 1, 3]  # [B,S,H,D] ↔ [B,H,S,D]


def smooth(
    model: ir.Model, layers: Sequence[Layer], statistics: Mapping[str, Observed], scales: Mapping[str, float]
) -> tuple[ir.Model, dict[str, float]]:
    """Smooth inputs of ``layers``, where it can be folded and helps; return the model and these inputs' new scales.

    scales: of the inputs as they are.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(str(layer.input.name), []).append(layer)
    changed = {}
    for name, group in groups.items():
        if len(readers(group[0].input)) != len(group) or group[0].input.is_graph_output():
            continue
        fold = _place(group[0])
        if fold is None:
            continue
        observed = statistics[name]
        best = _best(group, observed, scales[name])
        if best is None:
            continue
        fold(1 / best)
        for layer in group:
            _scale(model.graph, layer.node, 1, best, layer.in_axis)
        changed[name] = float(np.float32(HEADROOM * (observed.peaks / best).max() / MOST))
    return model, changed


def _best(layers: Sequence[Layer], observed: Observed, scale: float) -> Array | None:
    """The factors s, float64 [in], with the least error of all layers together; None if there are none worth it."""
    weights = [_matrix(layer) for layer in layers]
    if any(weight.shape[1] != len(observed.peaks) for weight in weights):
        return None  # a grouped convolution
    peaks, powers = observed.peaks.astype(np.float64), observed.powers.astype(np.float64)
    together = np.max([np.abs(weight).max((0, 2)) for weight in weights], axis=0)
    some = (peaks > 0) & (together > 0)
    if not some.any():
        return None
    as_it_is = _error(weights, powers, np.ones(len(peaks)), error_of(observed, scale))
    least, best = WORTH * as_it_is, None
    for alpha in ALPHAS:
        factors = np.ones(len(peaks))
        factors[some] = peaks[some] ** alpha / together[some] ** (1 - alpha)
        # Made smaller are channels larger than most. A small one is not made larger: a value there beyond what was
        # seen, which the range as it was had room for, would be cut off.
        factors = np.clip(factors / np.median(factors[some]), 1, LARGEST)
        error = _error(weights, powers, factors, (HEADROOM * (peaks / factors).max() / MOST) ** 2 / 12)
        if error < least:
            least, best = error, factors
    return best


def _error(weights: Sequence[Array], powers: Array, factors: Array, activation: float) -> float:
    """The formula of the module's head, over all layers; activation: the variance of an input's rounding."""
    total = 0.0
    for weight in weights:  # [out, in, kernel]
        scaled = np.abs(weight) * factors.astype(np.float32)[None, :, None]
        total += activation * float(np.square(scaled).sum())
        steps = scaled.max((1, 2)).astype(np.float64) / MOST
        total += float(np.square(steps).sum() / 12) * float((powers / factors**2).sum()) * weight.shape[2]
    return total


def _matrix(layer: Layer) -> Array:
    """A layer's weight as [out, in, kernel], in memory."""
    tensor = layer.weight.const_value
    assert tensor is not None
    weight = np.array(tensor.numpy())
    release(tensor)
    return weight.T[:, :, None] if layer.out_axis else weight.reshape(*weight.shape[:2], -1)


def _place(layer: Layer) -> Callable[[Array], None] | None:
    """What multiplies each channel of a layer's input by a factor where the input is made, or None."""
    graph = layer.node.graph
    node = layer.input.producer()
    assert graph is not None
    if node is None or node.domain:
        return None
    assert layer.weight.const_value is not None
    channels = layer.weight.const_value.shape.numpy()[layer.in_axis]
    rank = len(layer.input.shape) if layer.input.shape is not None else 0
    if node.op_type == "LayerNormalization":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        return _norm(graph, node, channels) if rank and axis % rank == layer.channel == rank - 1 else None
    if node.op_type == "GroupNormalization":
        return _norm(graph, node, channels) if layer.channel == 1 else None
    if node.op_type == "Reshape":
        return _attention(graph, node, channels) if layer.channel == rank - 1 else None
    return None


def _norm(graph: ir.Graph, node: ir.Node, channels: int) -> Callable[[Array], None] | None:
    if not all(_constant(node, index, (channels,)) for index in range(1, len(node.inputs))):
        return None

    def fold(factors: Array) -> None:
        for index in range(1, len(node.inputs)):
            _scale(graph, node, index, factors, 0)

    return fold


def _attention(graph: ir.Graph, node: ir.Node, channels: int) -> Callable[[Array], None] | None:
    """Reshape(Transpose(Attention(q, k, v = Transpose(Reshape(x·Wv))))), with a value for each of the channels.

    There are fewer where queries share a value's head. A channel stays itself if both Transposes only swap heads and
    tokens.
    """
    attention = _chain(node, "Transpose", "Attention")
    values = attention.inputs[2] if attention is not None and len(attention.inputs) > 2 else None
    transpose = values.producer() if values is not None and _read_once(values) else None
    linear = _chain(transpose, "Reshape", "MatMul") if transpose is not None else None
    if linear is None or transpose is None or transpose.op_type != "Transpose":
        return None
    matrix, back = linear.inputs[1], node.inputs[0].producer() if node.inputs[0] is not None else None
    width = matrix.shape[1] if matrix is not None and matrix.shape is not None and len(matrix.shape) == 2 else None
    if width != channels or not _constant(linear, 1) or not (_swaps_heads(back) and _swaps_heads(transpose)):
        return None
    return lambda factors: _scale(graph, linear, 1, factors, 1)


def _chain(node: ir.Node | None, *operators: str) -> ir.Node | None:
    """The node that is reached from ``node`` by its first inputs through ``operators``, each read by one node only."""
    for operator in operators:
        value = node.inputs[0] if node is not None else None
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator or not _read_once(value):
            return None
    return node


def _swaps_heads(node: ir.Node | None) -> bool:
    permutation = node.attributes.get("perm") if node is not None else None
    return permutation is not None and list(permutation.as_ints()) == HEADS_FIRST


def _read_once(value: ir.Value | None) -> bool:
    return value is not None and len(readers(value)) == 1 and not value.is_graph_output()


def _constant(node: ir.Node, index: int, shape: tuple[int, ...] | None = None) -> bool:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return shape is None or tuple(value.const_value.shape) == shape


def _scale(graph: ir.Graph, node: ir.Node, index: int, factors: Array, axis: int) -> None:
    """Multiply a node's constant input by factors along an axis; another node may go on reading the old constant."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None

    def change(array: Array) -> Array:
        product: Array = (array * along(factors, axis, array.ndim)).astype(np.float32)
        return product

    name = free_name(graph, f"{value.name}.{node.name}")  # a node may read one constant twice
    replace_input(node, index, add_weight(graph, name, value.const_value, change))
