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

from calibration import ranges
from calibration.graph import add_constant, add_node
from calibration.layers import Layer
from calibration.numbers import NEAREST_ZERO
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
    for layer in layers:
        key = (str(layer.input.name), unit[layer.name])
        if key not in made:
            made[key] = _switch(model.graph, layer, switches, blocks.index(key[1]), statistics, recipe, len(made))
        layer.node.replace_input_with(0, made[key])
    return model, blocks


def _switch(
    graph: ir.Graph, layer: Layer, switches: ir.Value, index: int, statistics: Statistics, recipe: Recipe, number: int
) -> ir.Value:
    value, name = layer.input, f"switch_{number}"
    scale = add_constant(
        graph,
        f"{name}_scale",
        np.float32(ranges.scale(statistics.values[str(value.name)], recipe.observer, recipe.numbers)),
    )
    zero = add_constant(graph, f"{name}_zero", recipe.numbers.round(np.zeros(())))
    place = add_constant(graph, f"{name}_place", np.int64(index))

    def add(operator: str, inputs: Sequence[ir.Value], what: str, dtype: Any = ir.DataType.FLOAT) -> ir.Value:
        return add_node(layer.node, operator, inputs, f"{name}_{what}", dtype)

    if recipe.dynamic and layer.kind == "linear":
        assert layer.weight.const_value is not None
        width = int(layer.weight.const_value.shape.numpy()[layer.in_axis])
        rounded = _round_in_groups(graph, add, value, name, GROUP if width % GROUP == 0 else width)
    else:
        numbers = add("QuantizeLinear", [value, scale, zero], "numbers", recipe.numbers.dtype)
        rounded = add("DequantizeLinear", [numbers, scale, zero], "rounded")
    error = add("Sub", [rounded, value], "error")
    part = add("Mul", [error, add("Gather", [switches, place], "on")], "part")
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
