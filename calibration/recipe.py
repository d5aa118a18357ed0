"""From a hub graph and its statistics to the quantized hub: which layers, and everything that is done to them.

Some layers stay in floating point: they are few and small, and what they lose every other layer loses too.

    the first     no other layer comes before them: conv_in, the keys and values of the prompt
    the last      no other layer comes after them: conv_out
    the clock     what is computed from the timestep, and other plain numbers, alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from calibration import bias, quantize, ranges, smooth
from calibration import scores as attention
from calibration.layers import Layer, find
from calibration.numbers import INT8, Numbers
from calibration.observe import Statistics
from calibration.precision import from_numbers_alone
from calibration.split import split
from calibration.weights import DYNAMIC, GROUP, narrow
from runtimes.errors import DexportError

CONVOLUTIONAL = 0.1  # of the multiplications: in a UNet half or more, in a transformer the patches' embedding alone


@dataclass(frozen=True)
class Recipe:
    """How to quantize. observer: one of calibration.ranges. keep: names of blocks and of single layers that stay in
    floating point.

    dynamic: linear layers have their activations rounded by the runtime, token by token; see ``is_dynamic``. smooth:
    even out channels, where ``numbers`` are whole: floats err by the same share of small and large ones.
    scores: queries and keys of long attention are quantized too (calibration.scores).
    """

    observer: str = "mse"
    numbers: Numbers = INT8
    dynamic: bool = False
    smooth: bool = True
    correct_bias: bool = True
    scores: bool = False
    keep: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Done:
    """What became of each layer: quantized, smoothed (a value's name), or left, with the reason.

    dynamic: those of the quantized ones whose activations the runtime rounds. scores: the layers that make the queries
    of attentions whose scores are quantized.
    """

    quantized: tuple[str, ...]
    smoothed: tuple[str, ...]
    left: Mapping[str, str]
    dynamic: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()


def apply(model: ir.Model, statistics: Statistics, recipe: Recipe) -> tuple[ir.Model, Done]:
    """Quantize a hub graph; what ``statistics`` were observed of is this graph."""
    model, _ = split(model)
    layers, left = candidates(model)
    chosen: list[Layer] = []
    dynamic: list[Layer] = []
    scales: dict[str, float] = {}
    long = [
        one for one in attention.find(model, layers) if recipe.scores and block(one.name) not in recipe.keep
        and not _measure(one.name, one.operands, statistics, recipe, scales)
    ]  # fmt: skip
    for layer in layers:
        kept = layer.name in recipe.keep or block(layer.name) in recipe.keep
        why = "kept in floating point by the plan" if kept else None
        by_token = recipe.dynamic and layer.kind == "linear"
        why = why or (None if by_token else _measure(layer.name, _observed(layer), statistics, recipe, scales))
        if why:
            left[layer.name] = why
        elif by_token:
            dynamic.append(layer)
        else:
            chosen.append(layer)
    smoothed: dict[str, float] = {}
    if recipe.smooth and recipe.numbers.is_whole:
        model, smoothed = smooth.smooth(model, chosen, statistics.values, scales)
    if recipe.correct_bias:  # the means that were observed are those of inputs as they were
        as_they_were = [layer for layer in chosen if str(layer.input.name) not in smoothed]
        model, _ = bias.correct(model, as_they_were, statistics.values, recipe.numbers)
    model, _ = quantize.write(model, chosen, scales | smoothed, recipe.numbers)
    model, _ = attention.write(model, long, scales, recipe.numbers)
    model, modified = narrow(model, 8, GROUP, [layer.node for layer in dynamic])
    if modified:
        model.metadata_props[DYNAMIC] = str(GROUP)
    narrowed = tuple(layer.name for layer in dynamic if not layer.weight.is_initializer())
    left |= {layer.name: "small, or its weight is read elsewhere" for layer in dynamic if layer.weight.is_initializer()}
    quantized = (*(layer.name for layer in chosen), *narrowed)
    return model, Done(quantized, tuple(smoothed), left, narrowed, tuple(one.name for one in long))


def is_dynamic(model: ir.Model) -> bool:
    """Whether a graph's linear layers are better off with activations that are rounded token by token.

    In transformers some channels, and some tokens, are far larger than the others, so one scale for a whole activation
    rounds the rest to little (12 to 13 dB on SD3.5, as published). Convolutions have no kernels for it, and a graph of
    convolutions has less need: its linear layers stay static, as one scale is faster.
    """
    works = {"conv": 0.0, "linear": 0.0}
    for layer in find(model)[0]:
        works[layer.kind] += layer.work
    return works["conv"] < CONVOLUTIONAL * sum(works.values())


def candidates(model: ir.Model) -> tuple[list[Layer], dict[str, str]]:
    """The layers that may be quantized, and what is left with the reason."""
    layers, left = find(model)
    clock = from_numbers_alone(model.graph)
    before, after = _nearest(model, layers)
    free = []
    for layer in layers:
        if layer.node in clock:
            left[layer.name] = "computed from the timestep alone"
        elif layer.node not in before:
            left[layer.name] = "no layer before it"
        elif layer.node not in after:
            left[layer.name] = "no layer after it"
        else:
            free.append(layer)
    return free, left


def block(name: str) -> str:
    """The block that a layer belongs to: its module's path up to the second member of a list of modules.

    unet.down_blocks.0.resnets.1.conv1 → unet.down_blocks.0.resnets.1; transformer.blocks.3.ff.net.2 →
    transformer.blocks.3, since ``net`` is no list of blocks: their names are plurals.
    """
    parts, found = name.split("."), 0
    for index in range(1, len(parts)):
        if parts[index].isdigit() and parts[index - 1].endswith("s"):
            found = index
            if sum(part.isdigit() for part in parts[: index + 1]) == 2:
                break
    return ".".join(parts[: found + 1]) if found else name


def _observed(layer: Layer) -> tuple[ir.Value, ...]:
    """The values whose ranges a layer needs."""
    return (layer.input, layer.output) if layer.kind == "conv" else (layer.input,)


def _measure(
    who: str, values: Sequence[ir.Value], statistics: Statistics, recipe: Recipe, scales: dict[str, float]
) -> str | None:
    """Add the scales that a layer or an attention needs of values; return why it has none."""
    for value in values:
        name = str(value.name)
        if name in scales:
            continue
        if name not in statistics.values:
            raise DexportError(f"the statistics lack {name!r}, which {who} needs; calibrate again")
        observed = statistics.values[name]
        if observed.peak == 0:
            return "its input was only zeros" if value is values[0] else "its output was only zeros"
        scales[name] = ranges.scale(observed, recipe.observer, recipe.numbers)
    return None


def _nearest(model: ir.Model, layers: Sequence[Layer]) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes that come after some layer, and those that come before some layer."""
    nodes = list(model.graph)
    own = {layer.node for layer in layers}
    after: set[ir.Node] = set()
    for node in nodes:
        makers = [value.producer() for value in node.inputs if value is not None]
        if any(maker in own or maker in after for maker in makers if maker is not None):
            after.add(node)
    before: set[ir.Node] = set()
    for node in reversed(nodes):
        users = [use.node for value in node.outputs for use in value.uses()]
        if any(user in own or user in before for user in users):
            before.add(node)
    return after, before
