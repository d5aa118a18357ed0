"""Which block of a quantized model costs how much: the noise in the output when it alone is quantized.

Every activation of every block passes a switch in one graph, so one session answers for all blocks:

    x' = x + switch_b·(DQ(Q(x)) − x)

Only activations are switched: a weight in 8 bits with a scale for each output channel makes a tenth of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration import ranges, scores
from calibration.graph import add_constant, add_node
from calibration.layers import Layer
from calibration.numbers import NEAREST_ZERO, Numbers
from calibration.observe import Statistics
from calibration.ranges import MOST
from calibration.recipe import Recipe, block, candidates
from calibration.split import split
from calibration.weights import GROUP
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import Progress, silent
from runtimes.manifest import Graph, Tensor

Array = NDArray[Any]
SWITCHES = "dexport.switches"
CALLS = 3  # timesteps: early, in the middle and late


def noise(
    file: Path, graph: Graph, statistics: Statistics, recipe: Recipe,
    calls: Sequence[tuple[Mapping[str, Array], Array]], progress: Progress = silent, *, apart: Collection[str] = (),
) -> dict[str, dict[float, float]]:  # fmt: skip
    """For each block, by timestep, the share of noise in the output's power, at some of ``calls`` (inputs and output).

    apart: layers that count by themselves, under their own names, and not with their blocks.
    """
    model, blocks = switched(file, statistics, recipe, apart)
    described = replace(graph, inputs=(*graph.inputs, Tensor(SWITCHES, "float32", (len(blocks),))))
    session = OnnxRuntimeSession(file, described, None, content=ir.to_proto(model).SerializeToString())
    chosen = [calls[int(place)] for place in np.linspace(0, len(calls) - 1, min(CALLS, len(calls)))]
    shares: dict[str, dict[float, float]] = {name: {} for name in blocks}
    for number, (inputs, _) in enumerate(chosen):
        timestep = float(inputs["timestep"][0])
        exact = session.run({**inputs, SWITCHES: np.zeros(len(blocks), np.float32)})["output"].astype(np.float64)
        for index, name in enumerate(blocks):
            done = (number * len(blocks) + index) / (len(chosen) * len(blocks))
            progress(f"sensitivity: {name}", done)
            switches = np.zeros(len(blocks), np.float32)
            switches[index] = 1
            output = session.run({**inputs, SWITCHES: switches})["output"]
            shares[name][timestep] = float(np.square(output - exact).sum() / np.square(exact).sum())
    return shares


def switched(
    file: Path, statistics: Statistics, recipe: Recipe, apart: Collection[str] = ()
) -> tuple[ir.Model, list[str]]:
    """The graph with a switch at each activation, and the blocks in the order of the switches' input; see ``noise``."""
    model, _ = split(ir.load(file))
    layers = [layer for layer in candidates(model)[0] if statistics.values[str(layer.input.name)].peak]
    unit = {layer.name: layer.name if layer.name in apart else block(layer.name) for layer in layers}
    blocks = list(dict.fromkeys(unit.values()))
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(blocks)]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(switches)
    made: dict[tuple[str, str], ir.Value] = {}
    # Every operand that is rounded: its reader, its place there, its unit, and the group that shares a scale, if any.
    places = [(layer.node, 0, unit[layer.name], _group(layer) if recipe.dynamic else None) for layer in layers]
    for one in scores.find(model, layers) if recipe.scores else ():
        if all(statistics.values[str(value.name)].peak for value in one.operands):
            places += [(one.node, index, unit[one.name], None) for index in range(2)]
    for node, index, name, group in places:
        value = node.inputs[index]
        assert value is not None
        key = (str(value.name), name)
        if key not in made:
            scale = ranges.scale(statistics.values[key[0]], recipe.observer, recipe.numbers)
            switch = add_constant(model.graph, f"switch_{len(made)}_place", np.int64(blocks.index(name)))
            made[key] = _switch(node, value, (switches, switch), f"switch_{len(made)}", scale, recipe.numbers, group)
        node.replace_input_with(index, made[key])
    return model, blocks


def _group(layer: Layer) -> int | None:
    """How many inputs of a linear layer share a scale where the runtime rounds them; None for a convolution."""
    if layer.kind != "linear":
        return None
    assert layer.weight.const_value is not None
    width = int(layer.weight.const_value.shape.numpy()[layer.in_axis])
    return GROUP if width % GROUP == 0 else width


def _switch(
    node: ir.Node, value: ir.Value, switch: tuple[ir.Value, ir.Value], name: str, scale: float, numbers: Numbers,
    group: int | None,
) -> ir.Value:  # fmt: skip
    """The formula of the module's head for a value that ``node`` reads; ``switch``: all switches, and which."""
    graph = node.graph
    assert graph is not None

    def add(operator: str, inputs: Sequence[ir.Value], what: str, dtype: Any = ir.DataType.FLOAT) -> ir.Value:
        return add_node(node, operator, inputs, f"{name}_{what}", dtype)

    if group is not None:
        rounded = _round_in_groups(graph, add, value, name, group)
    else:
        factor = add_constant(graph, f"{name}_scale", np.float32(scale))
        zero = add_constant(graph, f"{name}_zero", numbers.round(np.zeros(())))
        held = add("QuantizeLinear", [value, factor, zero], "numbers", numbers.dtype)
        rounded = add("DequantizeLinear", [held, factor, zero], "rounded")
    error = add("Sub", [rounded, value], "error")
    part = add("Mul", [error, add("Gather", list(switch), "on")], "part")
    return add("Add", [value, part], "value")


def _round_in_groups(graph: ir.Graph, add: Callable[..., ir.Value], value: ir.Value, name: str, group: int) -> ir.Value:
    """What a runtime makes of a value that it rounds itself: 127 steps to the peak of each group of each token."""
    constants = {"rows": np.array([-1, group], np.int64), "last": np.array([1], np.int64),
                 "steps": np.float32(MOST), "least": np.float32(NEAREST_ZERO)}  # fmt: skip
    made = {key: add_constant(graph, f"{name}_{key}", one) for key, one in constants.items()}
    rows = add("Reshape", [value, made["rows"]], "rows_of")
    peak = add("ReduceMax", [add("Abs", [rows], "size"), made["last"]], "peak")
    scale = add("Max", [add("Div", [peak, made["steps"]], "step"), made["least"]], "dynamic_scale")
    whole = add("Mul", [add("Round", [add("Div", [rows, scale], "in_steps")], "whole"), scale], "rounded_rows")
    return add("Reshape", [whole, add("Shape", [value], "shape", ir.DataType.INT64)], "rounded")
