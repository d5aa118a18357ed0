"""Narrow weights on a checkpoint's text encoder: size, SQNR and time against fp32, in ONNX Runtime and OpenVINO.

    python benchmarks/checkpoints.py /tmp/sd15
    python benchmarks/weights.py /tmp/sd15 examples/emoji/model

For each checkpoint and runtime a line for int8 and int4: the files' size as a share of fp32's, the SQNR of the outputs
for random tokens against fp32 in the same runtime, and the median time of a call with one prompt. All three sessions
are open, and take turns. Under OpenVINO "exact" keeps its activations in float; by default it rounds them to 8 bits.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from calibration.weights import narrow
from exporter import hub
from exporter.compile import onnxruntime, onnxruntime_weights, openvino
from runtimes.accuracy import compare
from runtimes.backends.openvino import GROUP_SIZE
from runtimes.errors import silent
from runtimes.manifest import Graph
from runtimes.session import Array, Session, backend
from runtimes.target import Target

ROUNDS, CALLS = 7, 4  # of a round's calls the first is not counted: another session's threads may still be spinning
NARROW = {"fp32": None, "int8": 8, "int4": 4}


@dataclass
class Case:
    """One compiled graph with what was measured of it."""

    session: Session
    size: int
    output: Array
    seconds: list[float]


def compile_case(
    source: Path, graph: Graph, folder: Path, runtime: str, exact: bool, inputs: Mapping[str, Array]
) -> Case:
    """Compile one hub graph, open it and run it once."""
    folder.mkdir(parents=True)
    if runtime == "openvino":
        target = Target("openvino", "cpu")
        built = openvino.build(source, graph, folder, target, "fp32", 1, silent)
        if exact:
            built = replace(built, properties={**built.properties, GROUP_SIZE: "0"})
    else:
        model = ir.load(source)
        for rewrite in (*onnxruntime.REWRITES, *onnxruntime_weights.REWRITES):
            model, _ = rewrite(model)
        ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
        built = replace(graph, file=f"{folder.name}/model.onnx", properties={})
    size = sum(path.stat().st_size for path in folder.iterdir())
    session = backend(runtime).open(folder.parent / built.file, built, "cpu", None, None)
    return Case(session, size, next(iter(session.run(inputs).values())), [])


def measure(checkpoint: Path, work: Path) -> None:
    """Print the lines of one checkpoint."""
    graph = hub.export(checkpoint, work / "hub", graphs=["text"]).graphs["text"]
    sources = {}
    for name, bits in NARROW.items():
        sources[name] = work / "hub" / graph.file
        if bits is not None:
            model, _ = narrow(ir.load(work / "hub" / graph.file), bits)
            (work / name).mkdir()
            sources[name] = work / name / "model.onnx"
            ir.save(model, sources[name], external_data="model.onnx.data", size_threshold_bytes=hub.INLINE)
    tokens = graph.inputs[0]
    shape = [size if isinstance(size, int) else 1 for size in tokens.shape]
    table = next(node.inputs[0] for node in ir.load(work / "hub" / graph.file).graph if node.op_type == "Gather")
    assert table is not None and table.shape is not None
    inputs = {tokens.name: np.random.default_rng(0).integers(0, table.shape.numpy()[0], shape).astype(tokens.dtype)}
    for runtime, exact in (("onnxruntime", False), ("openvino", False), ("openvino", True)):
        label = f"{runtime}, exact" if exact else runtime
        cases = {
            name: compile_case(source, graph, work / label / name, runtime, exact, inputs)
            for name, source in sources.items()
        }
        for _ in range(ROUNDS):
            for case in cases.values():
                for call in range(CALLS):
                    start = time.perf_counter()
                    case.session.run(inputs)
                    if call:
                        case.seconds.append(time.perf_counter() - start)
        whole = cases["fp32"]
        for name, case in cases.items():
            share, speed = case.size / whole.size, median(case.seconds) / median(whole.seconds)
            noise = compare(whole.output, case.output).sqnr_db
            print(f"{checkpoint.parent.name + '/' + checkpoint.name:<16}{label:<18}{name:<6}{share:7.3f}{noise:9.1f} dB"
                  f"{1000 * median(case.seconds):9.2f} ms{speed:7.2f}")  # fmt: skip


def main() -> None:
    """Measure each checkpoint in a folder that is removed after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    options = parser.parse_args()
    print(f"{platform.machine()}; share of fp32's bytes, SQNR against fp32, median time, share of fp32's time")
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as work:
            measure(checkpoint, Path(work))


if __name__ == "__main__":
    main()
