"""Where a graph leaves the range of fp16: measured in one run, and kept in float32 as islands.

fp16 ends at 65504, and some models go beyond: the residuals of SDXL's VAE, T5's feed-forward. There fp16 holds
infinity, the next norm makes NaN of it, and the picture is black. So the graph is run once in float32, and the greatest
magnitude of every value is taken inside it. Nodes that touch a value near the limit stay float32
(``calibration.precision.cast`` takes their names); all others are narrow. bf16 has the range of float32 and needs none.

What counts is a value as it is stored. Kernels multiply and add up in float32, whatever they write, so sums within a
MatMul, Conv or Attention may go beyond the limit as long as the result does not: what lies between two nodes is
measured, and nothing else. Values are measured in float32 too, and no rounding matters to a comparison with a margin.

Nothing is stored for it: each value becomes one number as soon as it is made. That takes more than the order of the
nodes in the file. ONNX Runtime orders them by itself, and leaves reductions that only the last output needs to the end:
40 convolutions in a row then took 21 times their memory. So every other reader of a value takes it through a Reshape,
which copies nothing, to a shape that is known only after the reduction: 1.3 times, in 1.15 times the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass
from onnx_ir.tape import Tape

from calibration.graph import add_constant, make_wait, release
from calibration.layers import SUFFIXES
from calibration.precision import LIMITS, MASKED, beyond
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.session import Session

Array = NDArray[Any]
OUTPUT = "peaks"  # the watched graph's further output, float32 [values]
LARGEST = float(np.finfo(np.float32).max)
MARGIN = 2.0  # how much higher another prompt, picture or size may reach than those that were measured
FACTORS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Gather"})  # no mask is a constant of these
UNDEFINED = frozenset({"Log", "Reciprocal", "Div", "Pow", "Sqrt"})  # of 0, or by it: infinite or no number
# What is masked ends in a softmax; what is infinite ends there too, or in a Where: any of the others would make all of
# its output infinite or no number.
ENDS = frozenset({
    "Softmax", "LogSoftmax", "Attention", "Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "GroupNormalization",
    "LayerNormalization", "RMSNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare",
})  # fmt: skip


def watch_peaks(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Add an output with the greatest magnitude of each float value, and return the values' names in its order.

    The model is changed in place. Its own outputs stay the same, but for the last bits where a runtime fuses other
    nodes than before. What is masked does not count (``calibration.precision.MASKED``), nor what is infinite or no
    number in float32 already, as log(0) is in T5's table of distances: something selects it away, or the model would
    give the same.
    """
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    graph = model.graph
    constants = (
        add_constant(graph, "watch_flat", np.array([-1], np.int64)),
        add_constant(graph, "watch_masked", np.float32(MASKED)),
        add_constant(graph, "watch_largest", np.float32(LARGEST)),
        add_constant(graph, "watch_zero", np.float32(0)),
    )
    partly = _may_be_passed_over(graph)
    found: dict[str, tuple[ir.Value, ir.Value]] = {}  # greatest and least element
    first = next(iter(graph))
    inputs = list(graph.inputs)
    for value in inputs + [value for node in list(graph) for value in node.outputs if node.op_type != "Constant"]:
        empty = value.shape is not None and 0 in value.shape
        if value.dtype != ir.DataType.FLOAT or empty or not value.name:
            continue
        tape = Tape()
        found[value.name] = _reduce(tape, value, value in partly, constants)
        producer = value.producer()
        if producer is None:
            graph.insert_before(first, tape.nodes)
        else:
            graph.insert_after(producer, tape.nodes)
    tape = Tape()
    highs, lows = (tape.op("Concat", list(side), {"axis": 0}) for side in zip(*found.values(), strict=True))
    peaks = tape.op("Max", [highs, tape.op("Neg", [lows])])
    peaks.name, peaks.shape, peaks.type = OUTPUT, ir.Shape([len(found)]), ir.TensorType(ir.DataType.FLOAT)
    graph.extend(tape.nodes)
    graph.outputs.append(peaks)
    return model, list(found)


def _reduce(tape: Tape, value: ir.Value, partly: bool, constants: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The greatest and the least element of a value, each [1]; all its other readers are made to wait for them.

    partly: not all of its elements count.
    """
    flat, masked, largest, zero = constants
    uses = list(value.uses())
    counted = value
    if partly:  # elsewhere this would be time and memory for nothing
        counts = tape.op("And", [tape.op("Greater", [value, masked]), tape.op("LessOrEqual", [value, largest])])
        counted = tape.op("Where", [counts, value, zero])
    line = tape.op("Reshape", [counted, flat])
    high = tape.op("ReduceMax", [line], {"keepdims": 1})
    low = tape.op("ReduceMin", [line], {"keepdims": 1})
    if uses and value.producer() is not None:
        make_wait(tape, value, uses, (low, high))
    return high, low


def _may_be_passed_over(graph: ir.Graph) -> set[ir.Value]:
    """The values with elements that may be masked, infinite or no number, as far as these can reach."""
    constants = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    constants += [node.outputs[0] for node in graph if node.op_type == "Constant"]
    # A weight of a layer is no mask, and there are gigabytes of them to read.
    reached = {value for value in constants if any(use.node.op_type not in FACTORS for use in value.uses())
               and _least(value) <= MASKED}  # fmt: skip
    for node in graph:
        undefined = node.op_type in UNDEFINED and not (node.op_type == "Div" and _is_constant(node.inputs[1]))
        if undefined or (node.op_type not in ENDS and any(value in reached for value in node.inputs)):
            reached.update(value for value in node.outputs if value.dtype == ir.DataType.FLOAT)
    return reached


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _least(value: ir.Value) -> float:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return 0.0
    least = float(np.min(tensor.numpy(), initial=0))
    release(tensor)
    return least


def watched_graph(graph: Graph, names: Sequence[str]) -> Graph:
    """The description of a watched graph, for a session to open."""
    return replace(graph, outputs=(*graph.outputs, Tensor(OUTPUT, "float32", (len(names),))))


class PeakObserver:
    """A session of a watched graph that passes for one of the graph itself, and keeps the peaks of all calls."""

    def __init__(self, inner: Session, graph: Graph, names: Sequence[str]) -> None:
        """``inner`` runs the watched graph; ``graph`` is what it was before, ``names`` are from ``watch_peaks``."""
        self.max_batch = inner.max_batch
        self._inner, self._graph, self._names = inner, graph, names
        self._peaks: Array | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph, keep its peaks and return its own outputs."""
        outputs = self._inner.run(inputs)
        peaks = np.where(np.isnan(outputs[OUTPUT]), np.float32(np.inf), outputs[OUTPUT])
        self._peaks = peaks if self._peaks is None else np.maximum(self._peaks, peaks)
        return {tensor.name: outputs[tensor.name] for tensor in self._graph.outputs}

    def peaks(self) -> dict[str, float]:
        """The greatest magnitude of each value, by its name."""
        if self._peaks is None:
            raise DexportError("the graph was not called: no peak was seen; run it once on real inputs")
        return dict(zip(self._names, self._peaks.tolist(), strict=True))


@dataclass(frozen=True)
class Island:
    """Nodes that stay float32 together, in the graph's order; what runs between them is never narrow.

    first, last: names for a reader, of the modules that the nodes came from; peak: the greatest magnitude in it.
    """

    nodes: tuple[str, ...]
    first: str
    last: str
    peak: float

    def __str__(self) -> str:
        count = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        return f"{self.first} to {self.last}: values up to {self.peak:.3g}, {count} in float32"


def islands(
    model: ir.Model, peaks: Mapping[str, float], limit: float = LIMITS["fp16"], margin: float = MARGIN
) -> tuple[frozenset[str], list[Island]]:
    """The names of the nodes that must stay float32, and a report of them.

    ``model``: the graph as it was before ``watch_peaks``; ``peaks``: of ``PeakObserver``. A node must if it reads or
    writes a value whose peak times ``margin`` exceeds ``limit``, or reads a weight that does. So both ends of such a
    value are float32, and so is it. Norms and the like, which are so anyway, are named too where they end an island.
    """
    graph = model.graph
    over = {name: peak for name, peak in peaks.items() if peak * margin > limit}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            wrong = beyond(value.const_value, limit)  # a constant is as large as it is: no margin
            if wrong is not None:
                over[name] = abs(wrong)
    known = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    if strange := sorted(set(peaks) - known):
        raise DexportError(f"the peak of {strange[0]!r} is of another graph; take the peaks of this one")
    kept = [node for node in graph if any(v is not None and v.name in over for v in (*node.inputs, *node.outputs))]
    if any(not node.name for node in kept):
        raise DexportError("a node near the limit of fp16 has no name; export the graph again")
    found = []
    for group in _connected(kept):
        peak = max(over.get(str(v.name), 0.0) for node in group for v in (*node.inputs, *node.outputs) if v is not None)
        names = tuple(str(node.name) for node in group)
        found.append(Island(names, _readable(group[0]), _readable(group[-1]), peak))
    return frozenset(str(node.name) for node in kept), found


def _connected(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Nodes, in the graph's order, in groups: one reads what another writes, or both read the same input."""
    group_of: dict[ir.Node, list[ir.Node]] = {}
    reader: dict[ir.Value, ir.Node] = {}
    place = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        group_of[node] = [node]
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            other = value.producer() or reader.setdefault(value, node)
            if other in group_of and group_of[other] is not group_of[node]:
                joined = sorted(group_of[other] + group_of[node], key=place.__getitem__)
                group_of.update((member, joined) for member in joined)
    return [group for node, group in group_of.items() if group[0] is node]


def _readable(node: ir.Node) -> str:
    """The module that a node came from; of one without weights, the module that it follows."""
    before: ir.Node | None = node
    while before is not None:
        for value in before.inputs:
            if value is not None and value.is_initializer() and "." in str(value.name):
                name = str(value.name)
                for suffix in (*SUFFIXES, ".bias"):
                    name = name.removesuffix(suffix)
                return name if before is node else f"{node.op_type} after {name}"
        before = next((made for value in before.inputs if value is not None and (made := value.producer())), None)
    return str(node.name)
