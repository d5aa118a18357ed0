"""What a graph's activations are like on a real run: statistics taken inside the graph, so that none is ever stored.

Reductions are added to the graph as outputs, after each value that is watched: its least and greatest element, for
each channel the greatest magnitude, the mean and the mean square, and a histogram. The histogram's bins are logarithmic
and the same for every value, so one pass is enough, the range need not be known before, and histograms of any calls add
up. Memory does not grow with the number of calls, but for two numbers a value and call: which call saw which range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from calibration.graph import add_constant, make_wait
from runtimes import strict_json
from runtimes.bundle import hash_file
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.safetensors import read_header, write
from runtimes.session import Session

Array = NDArray[Any]
OCTAVE = 16  # bins from one power of two to the next: each is 4.4 % wider than the last
LOWEST, HIGHEST = (
    -24,
    24,
)  # powers of two; below the first a value is as good as 0, above the second none is meant to be
HALF = OCTAVE * (HIGHEST - LOWEST)  # bins of one sign
BINS = 2 * HALF  # magnitudes of positive values, then of negative ones
KINDS = ("bounds", "peaks", "means", "powers", "histogram")
ABOUT = "about"  # the tensor with what is no array, as JSON
VERSION = 1


def magnitudes() -> Array:
    """The middle of each bin of one sign, float64 [HALF]; the first stands for 0."""
    middle = 2.0 ** (LOWEST + (np.arange(HALF) + 0.5) / OCTAVE)
    middle[0] = 0.0
    return middle


@dataclass(frozen=True)
class Call:
    """One call of the observed graph."""

    prompt: str
    timestep: float


@dataclass(frozen=True)
class Observed:
    """One value over all calls.

    bounds: least and greatest element of each call, float32 [calls, 2]. peaks, means, powers: of each channel the
    greatest magnitude, the mean and the mean square, float32 [channels]. histogram: int64 [BINS].
    """

    bounds: Array
    peaks: Array
    means: Array
    powers: Array
    histogram: Array

    @property
    def peak(self) -> float:
        """The greatest magnitude of all calls."""
        return float(np.abs(self.bounds).max())


@dataclass(frozen=True)
class Statistics:
    """Statistics of one graph's values by name, and where they come from.

    source: sha256 of the graph and its weights. settings: of the run (sampler, steps, guidance, seed).
    """

    source: str
    settings: Mapping[str, Any]
    calls: tuple[Call, ...]
    values: Mapping[str, Observed]

    def save(self, file: Path) -> None:
        """Write to ``file``, as safetensors, whole or not at all."""
        about = {
            "version": VERSION, "source": self.source, "settings": dict(self.settings),
            "calls": [asdict(call) for call in self.calls],
        }  # fmt: skip
        tensors = {ABOUT: np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)}
        for name, value in self.values.items():
            tensors |= {f"{kind}/{name}": getattr(value, kind) for kind in KINDS}
        partial = file.with_name(f".{file.name}.partial")
        try:
            write(partial, tensors)
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DexportError(f"{file}: the statistics cannot be written ({error.strerror})") from error


def load(file: Path, source: str) -> Statistics:
    """Read statistics that were taken of the graph with hash ``source``; DexportError for any others."""
    header = read_header(file)
    if not _is_whole(header):
        raise DexportError(f"{file}: these are no calibration statistics; make them with: dexport calibrate")
    try:
        about = strict_json.loads(header[ABOUT].load().tobytes())
        version, settings = about["version"], dict(about["settings"])
        calls = tuple(Call(str(call["prompt"]), float(call["timestep"])) for call in about["calls"])
        taken_of = str(about["source"])
        if not calls:
            raise ValueError("no calls")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DexportError(f"{file}: what it says of itself is damaged; calibrate again") from error
    if version != VERSION:
        raise DexportError(f"{file}: statistics of version {version}; this dexport reads {VERSION}; calibrate again")
    if taken_of != source:
        raise DexportError(
            f"{file}: these statistics are of another model (sha256 {taken_of[:12]}…, this one is {source[:12]}…); "
            "calibrate this one"
        )
    names = [name.partition("/")[2] for name in header if name.startswith("bounds/")]
    try:
        values = {
            name: Observed(*(header[f"{kind}/{name}"].load() for kind in KINDS))
            for name in names
        }  # fmt: skip
    except KeyError as error:
        raise DexportError(f"{file}: {error.args[0]!r} is missing; calibrate again") from error
    for name, value in values.items():
        channels = value.peaks.shape
        whole = value.bounds.shape == (len(calls), 2) and value.histogram.shape == (BINS,) and len(channels) == 1
        floats = (value.bounds, value.peaks, value.means, value.powers)
        finite = all(array.dtype.kind == "f" and np.isfinite(array).all() for array in floats)
        counted = value.histogram.dtype.kind in "iu" and (value.histogram >= 0).all() and value.histogram.any()
        if not whole or not finite or not counted or {value.means.shape, value.powers.shape} != {channels}:
            raise DexportError(f"{file}: the statistics of {name!r} are damaged; calibrate again")
    return Statistics(taken_of, settings, calls, values)


def is_statistics(file: Path) -> bool:
    """Whether a file looks like saved statistics, of whatever model."""
    try:
        return _is_whole(read_header(file))
    except DexportError:
        return False


def _is_whole(header: Mapping[str, Any]) -> bool:
    return ABOUT in header and all(name.partition("/")[0] in (*KINDS, ABOUT) for name in header)


def hash_graph(file: Path, weights: Sequence[Path]) -> str:
    """The sha256 of a graph with its weights: what statistics belong to."""
    return hashlib.sha256("".join(hash_file(path) for path in (file, *weights)).encode()).hexdigest()


def watch(model: ir.Model, values: Mapping[str, int]) -> tuple[ir.Model, bool]:
    """Add the reductions of ``values`` (names, each with its axis of channels) to the graph, as further outputs."""
    named = {value.name: value for node in model.graph for value in node.outputs}
    named |= {value.name: value for value in model.graph.inputs}
    first = next(iter(model.graph))
    constants = _Constants(model)
    for name, axis in values.items():
        value = named[name]
        tape = Tape()
        outputs = _reduce(tape, value, axis, constants)
        producer = value.producer()
        if producer is None:
            model.graph.insert_before(first, tape.nodes)
        else:
            model.graph.insert_after(producer, tape.nodes)
        for kind, output in zip(KINDS, outputs, strict=True):
            output.name = f"{kind}/{name}"
            model.graph.outputs.append(output)
    return model, bool(values)


class _Constants:
    """Constants of a graph, each made once."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._made: dict[Any, ir.Value] = {}

    def __call__(self, value: Any, dtype: Any) -> ir.Value:
        key = (json.dumps(value), np.dtype(dtype).name)
        if key not in self._made:
            self._made[key] = add_constant(self._graph, f"watch_{len(self._made)}", np.asarray(value, dtype))
        return self._made[key]


def _reduce(tape: Tape, value: ir.Value, axis: int, constant: _Constants) -> tuple[ir.Value, ...]:
    """Bounds [2], peaks, means and powers [channels] and histogram [BINS] of a value."""
    assert value.shape is not None
    uses = list(value.uses())
    others = constant([index for index in range(len(value.shape)) if index != axis % len(value.shape)], np.int64)
    flat = tape.op("Reshape", [value, constant([-1], np.int64)])
    size = tape.op("Abs", [value])
    low = tape.op("ReduceMin", [flat], {"keepdims": 1})
    high = tape.op("ReduceMax", [flat], {"keepdims": 1})
    bounds = tape.op("Concat", [low, high], {"axis": 0})
    peaks = tape.op("ReduceMax", [size, others], {"keepdims": 0})
    means = tape.op("ReduceMean", [value, others], {"keepdims": 0})
    powers = tape.op("ReduceMean", [tape.op("Mul", [value, value]), others], {"keepdims": 0})
    octaves = tape.op("Mul", [tape.op("Log", [tape.op("Reshape", [size, constant([-1], np.int64)])]),
                              constant(OCTAVE / np.log(2), np.float32)])  # fmt: skip
    # Whole numbers are clipped, not fractions: of what is not finite the cast makes some whole number.
    place = tape.op("Cast", [tape.op("Add", [octaves, constant(-LOWEST * OCTAVE, np.float32)])],
                    {"to": ir.DataType.INT32.value})  # fmt: skip
    place = tape.op("Clip", [place, constant(0, np.int32), constant(HALF - 1, np.int32)])
    negative = tape.op("Less", [flat, constant(0, np.float32)])
    place = tape.op("Add", [place, tape.op("Where", [negative, constant(HALF, np.int32), constant(0, np.int32)])])
    ones = tape.op("Expand", [constant(1, np.int32), tape.op("Shape", [place])])
    empty = constant([0] * BINS, np.int32)
    histogram = tape.op("ScatterElements", [empty, place, ones], {"axis": 0, "reduction": "add"})
    make_wait(tape, value, uses, (bounds, peaks, means, powers, histogram))
    return bounds, peaks, means, powers, histogram


class Observer:
    """Sums up what the calls of a watched graph give; ``session`` is the graph as a pipeline knows it."""

    def __init__(self, inner: Session, graph: Graph, watched: Sequence[str]) -> None:
        """``inner`` runs the watched graph; ``graph`` is what it was before, ``watched`` the values' names."""
        self.max_batch = inner.max_batch
        self.prompt = ""  # of the calls that come
        self._inner, self._graph, self._watched = inner, graph, watched
        self._calls: list[Call] = []
        self._bounds: dict[str, list[Array]] = {name: [] for name in watched}
        self._peaks: dict[str, Array] = {}
        self._means: dict[str, Array] = {}  # sums over the calls, float64, like the next
        self._powers: dict[str, Array] = {}
        self._histograms: dict[str, Array] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph, keep its statistics and return its own outputs."""
        outputs = self._inner.run(inputs)
        call = Call(self.prompt, float(inputs["timestep"][0]) if "timestep" in inputs else 0.0)
        for name in self._watched:
            bounds, peaks, means, powers, histogram = (outputs[f"{kind}/{name}"] for kind in KINDS)
            if not (np.isfinite(bounds).all() and np.isfinite(means).all()):  # a runtime's maximum may pass over NaN
                raise DexportError(
                    f"{name!r} is not finite at timestep {call.timestep:g} (prompt {call.prompt!r:.60}): the model "
                    "cannot be calibrated; look at the checkpoint with: dexport inspect"
                )
            self._bounds[name].append(bounds)
            self._peaks[name] = np.maximum(self._peaks.get(name, peaks), peaks)
            self._means[name] = self._means.get(name, np.float64(0)) + means.astype(np.float64)
            self._powers[name] = self._powers.get(name, np.float64(0)) + powers.astype(np.float64)
            self._histograms[name] = self._histograms.get(name, np.int64(0)) + histogram.astype(np.int64)
        self._calls.append(call)
        return {tensor.name: outputs[tensor.name] for tensor in self._graph.outputs}

    def statistics(self, source: str, settings: Mapping[str, Any]) -> Statistics:
        """All that was seen."""
        if not self._calls:
            raise DexportError("the graph was not called: nothing was observed")
        values = {
            name: Observed(
                np.stack(self._bounds[name]).astype(np.float32), self._peaks[name].astype(np.float32),
                (self._means[name] / len(self._calls)).astype(np.float32),
                (self._powers[name] / len(self._calls)).astype(np.float32), self._histograms[name],
            )
            for name in self._watched
        }  # fmt: skip
        return Statistics(source, settings, tuple(self._calls), values)


def watched_graph(graph: Graph, values: Sequence[str]) -> Graph:
    """The description of a watched graph, for a session to open."""
    shapes: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "bounds": ("float32", (2,)), "peaks": ("float32", ("channels",)), "means": ("float32", ("channels",)),
        "powers": ("float32", ("channels",)),
        "histogram": ("int32", (BINS,)),
    }  # fmt: skip
    more = [Tensor(f"{kind}/{name}", *shapes[kind]) for name in values for kind in KINDS]
    return replace(graph, outputs=(*graph.outputs, *more))
