"""How small a fault does the gate see? One weight of the denoiser at a time is spoiled, as an export might spoil it.

    python benchmarks/faults.py
    python benchmarks/faults.py CHECKPOINT --every 5

Biases are left out, rows of a weight swapped, weights scaled by 1 % and by 10 %, the embedding of the timestep by 10 %.
Each spoiled graph is run by OpenVINO in f32 and in bf16, on the calls of the reference, and held to the bands that a
build measures; int8's band is asked with bf16's arithmetic, whose noise is below that of 8 bits. "hub" is the exported
graph in fp32, which a build of every precision holds to the torch model first. A fault counts as seen where a build
would have been refused. The constant bands are those of dexport before it measured them: 90, 34 and 16 dB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter import ensemble, gate, hub, record, spread  # the path above comes first
from runtimes.accuracy import compare
from runtimes.backends import openvino
from runtimes.manifest import Model
from runtimes.session import run_batched

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji" / "model"
CONSTANT = {"fp32": 90.0, "bf16": 34.0, "int8": 16.0}
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
Array = np.ndarray[Any, Any]


def faults(values: Mapping[str, Array]) -> Iterator[tuple[str, str, Array]]:
    """The kind of a fault, the weight that it is in, and what becomes of that."""
    for name, value in values.items():
        if name.endswith("bias") and value.any():
            yield "bias left out", name, np.zeros_like(value)
        if name.endswith("weight") and value.ndim > 1 and len(value) > 1:
            swapped = value.copy()
            swapped[[0, -1]] = swapped[[-1, 0]]
            yield "two rows swapped", name, swapped
            yield "weight 1 % larger", name, value * np.float32(1.01)
            yield "weight 10 % larger", name, value * np.float32(1.1)
        if name.endswith("time_embedding.linear_1.weight"):
            yield "timestep's projection 10 % larger", name, value * np.float32(1.1)


def agreements(file: Path, model: Model, name: str, calls: Any, hint: str) -> list[float]:
    """The SQNR in dB of a graph's outputs on each recorded call, by OpenVINO with a hint."""
    graph = replace(model.graphs[name], properties={"INFERENCE_PRECISION_HINT": hint})
    session = openvino.open(file, graph, "cpu", None, None)
    return [
        min(compare(value, run_batched(session, call.inputs)[tensor]).sqnr_db for tensor, value in call.outputs.items())
        for call in calls
    ]


def spoiled(file: Path, weight: str, value: Array) -> Path:
    """A graph beside ``file`` with one weight changed."""
    model = onnx.load(file)
    (tensor,) = (one for one in model.graph.initializer if one.name == weight)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), weight))
    wrong = file.with_name("wrong.onnx")
    onnx.save(model, wrong)
    return wrong


def count(checkpoint: Path, every: int, say: Callable[[str], None]) -> None:
    """Print how many faults of each kind each band sees."""
    with tempfile.TemporaryDirectory() as folder:
        source = ensemble.read(checkpoint)
        model = hub.export(source, Path(folder) / "hub")
        reference = record.record(source, model, Path(folder) / "hub")
        noise = spread.measure(source, model, reference, list(CONSTANT), record.size(model))
        name = model.stages[0].denoiser
        limits = {precision: spread.limits(noise, model, precision).calls[name] for precision in CONSTANT}
        file = Path(folder) / "hub" / model.graphs[name].file
        weights = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(file).graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        }
        calls = reference.calls[name]
        golden = gate.golden(calls)
        right = {hint: agreements(file, model, name, calls, hint) for hint in sorted(set(HINTS.values()))}
        for precision, values in limits.items():
            say(f"limits of the calls in {precision}, dB: {', '.join(f'{value:.1f}' for value in values)}")
        for hint, values in right.items():
            say(f"the right graph in {hint}, dB: {', '.join(f'{value:.1f}' for value in values)}")
        seen: dict[str, dict[str, int]] = {}
        for number, (kind, weight, value) in enumerate(faults(weights)):
            if number % every and not kind.startswith("timestep"):
                continue
            wrong = spoiled(file, weight, value)
            found = {hint: agreements(wrong, model, name, calls, hint) for hint in right}
            row = seen.setdefault(
                kind, dict.fromkeys(("faults", "hub", *CONSTANT, *(f"before: {p}" for p in CONSTANT)), 0)
            )
            row["faults"] += 1
            row["hub"] += found["f32"][golden] < limits["fp32"][golden]
            for precision, hint in HINTS.items():
                row[precision] += any(own < least for own, least in zip(found[hint], limits[precision], strict=True))
                row[f"before: {precision}"] += min(found[hint]) < CONSTANT[precision]
        for kind, row in seen.items():
            say(f"{kind}: " + ", ".join(f"{what} {number}" for what, number in row.items()))


def main() -> None:
    """Read the arguments, and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=EMOJI)
    parser.add_argument("--every", type=int, default=1, help="spoil every N-th weight alone")
    options = parser.parse_args()
    count(options.checkpoint, options.every, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
