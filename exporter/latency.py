"""What 8 bits save on the target: each layer alone, in floating point and in 8 bits, compiled and timed there.

Layers of a block that read the same value are cut out of the graph together, since they share its QuantizeLinear. The
two forms take turns, so that whatever else the machine does slows both. What is alike (operators, shapes, attributes)
is timed once. A layer alone does without what a runtime fuses into its neighbours, so the sum is an estimate, made to
compare blocks with one another; whole models race in the end of calibration/mixed.py's search.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration import recipe
from calibration.graph import add_node
from calibration.layers import Layer
from calibration.mixed import Gain
from calibration.observe import Statistics
from calibration.recipe import Recipe, block
from calibration.split import split
from exporter import compile as compilers
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import Progress, silent
from runtimes.manifest import Graph, Tensor
from runtimes.session import Session, require, run_batched
from runtimes.target import Target

Array = NDArray[Any]
WARM = 2  # calls before the timed ones: runtimes compile and allocate in the first
FEWEST, MOST = 7, 300  # turns of a pair
SECONDS = 1.0  # for a pair, once it has had its fewest turns
QUANTILE = 0.2  # of the seconds: other work of the machine only ever adds, and to more than half of the calls at times
RESAMPLES = 200  # of a bootstrap


def measure(
    file: Path, graph: Graph, statistics: Statistics, chosen: Recipe, inputs: Mapping[str, Array], target: Target,
    precision: str, work: Path, progress: Progress = silent,
) -> dict[str, Gain]:  # fmt: skip
    """For each layer of a hub graph that may be quantized what 8 bits save on the target, which this machine runs.

    inputs: of a call, for the shapes. work: a folder for what is compiled, one layer at a time. What layers that were
    cut out together save is divided evenly among them.
    """
    model, _ = split(ir.load(file))
    groups = _groups(model, statistics)
    # Neither changes the time of a layer, and both read all weights.
    narrow, _ = recipe.apply(ir.load(file), statistics, replace(chosen, smooth=False, correct_bias=False))
    shapes = _shapes(file, graph, groups, inputs)
    known: dict[Any, Gain] = {}
    found: dict[str, Gain] = {}
    for index, group in enumerate(groups):
        shape = shapes[str(group[0].input.name)]
        key = (shape, tuple(_likeness(layer) for layer in group))
        if key not in known:
            progress(f"{target}: timing {group[0].name}", index / len(groups))
            known[key] = _time([_cut(form, group, shape) for form in (model, narrow)], shape, target, precision, work)
        each = known[key]
        parts = len(group)
        found |= dict.fromkeys(
            (layer.name for layer in group), Gain(each.seconds / parts, each.saved / parts, each.error / parts)
        )
    return found


def _groups(model: ir.Model, statistics: Statistics) -> list[list[Layer]]:
    """The layers that can be quantized, those of one block that read one value together."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in recipe.candidates(model)[0]:
        names = [str(value.name) for value in (layer.input, layer.output) if str(value.name) in statistics.values]
        if all(statistics.values[name].peak for name in names):  # else it stays in floating point anyway
            groups.setdefault((str(layer.input.name), block(layer.name)), []).append(layer)
    return list(groups.values())


def _likeness(layer: Layer) -> Any:
    """What a layer's time depends on, but for the shape of its input."""
    assert layer.weight.shape is not None
    attributes = sorted((name, str(attribute.value)) for name, attribute in layer.node.attributes.items())
    return layer.node.op_type, tuple(layer.weight.shape), layer.bias is not None, tuple(attributes)


def _shapes(
    file: Path, graph: Graph, groups: Sequence[Sequence[Layer]], inputs: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """The shape of each group's input in a call of the float graph."""
    model, _ = split(ir.load(file))
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(value.name): value for node in model.graph for value in node.outputs}
    names = list(dict.fromkeys(str(group[0].input.name) for group in groups))
    for name in names:
        reader = next(iter(values[name].uses())).node
        model.graph.outputs.append(add_node(reader, "Shape", [values[name]], f"shape/{name}", ir.DataType.INT64))
    described = replace(graph, outputs=tuple(Tensor(f"shape/{name}", "int64", ("axes",)) for name in names))
    session = OnnxRuntimeSession(file, described, None, content=ir.to_proto(model).SerializeToString())
    outputs = session.run(inputs)
    return {name: tuple(int(size) for size in outputs[f"shape/{name}"]) for name in names}


def _cut(model: ir.Model, group: Sequence[Layer], shape: tuple[int, ...]) -> ir.Model:
    """The layers alone, from their input to their outputs with the biases added."""
    last = [_last(layer) for layer in group]
    graph = ir.convenience.extract(model.graph, [str(group[0].input.name)], [str(value.name) for value in last])
    graph.inputs[0].name = "sample"
    graph.inputs[0].shape = ir.Shape(shape)
    for index, value in enumerate(graph.outputs):
        value.name = f"output_{index}"
    return ir.Model(graph, ir_version=model.ir_version, metadata_props=dict(model.metadata_props))


def _last(layer: Layer) -> ir.Value:
    """A layer's output with its bias added."""
    if layer.bias is None or len(layer.node.inputs) > 2:
        return layer.output
    return next(iter(layer.output.uses())).node.outputs[0]


def _time(forms: Sequence[ir.Model], shape: tuple[int, ...], target: Target, precision: str, work: Path) -> Gain:
    """Compile the form in floating point and the one in 8 bits and let them take turns."""
    values = {"sample": np.random.default_rng(0).standard_normal(shape, np.float32)}
    with tempfile.TemporaryDirectory(prefix="layer-", dir=work) as folder:
        sessions = [_open(form, shape, target, precision, Path(folder) / str(at)) for at, form in enumerate(forms)]
        return race(sessions, values)


def _open(form: ir.Model, shape: tuple[int, ...], target: Target, precision: str, folder: Path) -> Session:
    """Both forms are compiled alike: as parts of a quantized model, which a layer that is kept is too."""
    output = folder / "compiled"
    output.mkdir(parents=True)
    ir.save(form, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    outputs = tuple(Tensor(str(value.name), "float32", ()) for value in form.graph.outputs)
    graph = Graph("denoiser", "model.onnx", (Tensor("sample", "float32", shape),), outputs)
    made = compilers.compile_graph(folder / "model.onnx", graph, output, target, precision)
    return require(target.backend).open(folder / made.file, made, target.device, None, None)


def race(sessions: Sequence[Session], inputs: Mapping[str, Array]) -> Gain:
    """Let two sessions take turns; what the second saves of the first one's seconds a call."""
    return _gain(_take_turns(sessions, inputs))


def _take_turns(sessions: Sequence[Session], inputs: Mapping[str, Array]) -> list[list[float]]:
    """Seconds of each session's call, by turn."""
    for session in sessions:
        for _ in range(WARM):
            run_batched(session, inputs)
    turns: list[list[float]] = []
    begin = time.perf_counter()
    while len(turns) < FEWEST or (len(turns) < MOST and time.perf_counter() - begin < SECONDS):
        turn = []
        for session in sessions:
            start = time.perf_counter()
            run_batched(session, inputs)
            turn.append(time.perf_counter() - start)
        turns.append(turn)
    return turns


def _gain(turns: Sequence[Sequence[float]]) -> Gain:
    """What the second form saves, turn by turn, and by the bootstrap its standard error."""
    seconds = np.array(turns)
    before, after = np.quantile(seconds, QUANTILE, axis=0)
    drawn = seconds[np.random.default_rng(0).integers(0, len(seconds), (RESAMPLES, len(seconds)))]
    quantiles = np.quantile(drawn, QUANTILE, axis=1)  # [resamples, 2]
    return Gain(float(before), float(before - after), float((quantiles[:, 0] - quantiles[:, 1]).std()))
