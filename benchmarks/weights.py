"""Narrow weights on a checkpoint's text encoder: size, SQNR and time against fp32, in ONNX Runtime and OpenVINO.

    python benchmarks/checkpoints.py /tmp/sd15
    python benchmarks/weights.py /tmp/sd15

For each checkpoint and runtime a line for w8 and w4, compiled as a build does it: the files' size as a share of fp32's,
the SQNR of the conditioning for random tokens against fp32 in the same runtime, and the median time of a call with one
prompt. All three sessions are open, and take turns. The target of w8 is a share of 0.30 at most, with 35 dB or more;
the exit code is 1 where it is missed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from exporter import hub
from exporter.compile import compile_graph
from runtimes.accuracy import compare
from runtimes.manifest import Graph
from runtimes.session import Array, Session, backend
from runtimes.target import Target

ROUNDS, CALLS = 7, 4  # of a round's calls the first is not counted: another session's threads may still be spinning
PRECISIONS = ("fp32", "w8", "w4")
SHARE, SQNR = 0.30, 35.0  # what w8 is to reach


@dataclass
class Case:
    """One compiled graph with what was measured of it."""

    session: Session
    size: int
    output: Array
    seconds: list[float]


def compile_case(
    source: Path, graph: Graph, folder: Path, runtime: str, precision: str, inputs: Mapping[str, Array]
) -> Case:
    """Compile one hub graph, open it and run it once."""
    folder.mkdir(parents=True)
    built = compile_graph(source, graph, folder, Target(runtime, "cpu"), precision)
    size = sum(path.stat().st_size for path in folder.iterdir())
    session = backend(runtime).open(folder.parent / built.file, built, "cpu", None, None)
    return Case(session, size, next(iter(session.run(inputs).values())), [])


def measure(checkpoint: Path, work: Path) -> bool:
    """Print the lines of one checkpoint; return whether w8 meets its target."""
    graph = hub.export(checkpoint, work / "hub", graphs=["text"]).graphs["text"]
    source, met = work / "hub" / graph.file, True
    tokens = graph.inputs[0]
    shape = [size if isinstance(size, int) else 1 for size in tokens.shape]
    table = next(node.inputs[0] for node in ir.load(source).graph if node.op_type == "Gather")
    assert table is not None and table.shape is not None
    inputs = {tokens.name: np.random.default_rng(0).integers(0, table.shape.numpy()[0], shape).astype(tokens.dtype)}
    for runtime in ("onnxruntime", "openvino"):
        cases = {
            precision: compile_case(source, graph, work / runtime / precision, runtime, precision, inputs)
            for precision in PRECISIONS
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
            met &= name != "w8" or (share <= SHARE and noise >= SQNR)
            print(f"{checkpoint.parent.name + '/' + checkpoint.name:<16}{runtime:<18}{name:<6}{share:7.3f}{noise:9.1f}"
                  f" dB{1000 * median(case.seconds):9.2f} ms{speed:7.2f}", flush=True)  # fmt: skip
    return met


def main() -> None:
    """Measure each checkpoint in a folder that is removed after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    options = parser.parse_args()
    print(f"{platform.machine()}; share of fp32's bytes, SQNR against fp32, median time, share of fp32's time")
    met = True
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as work:
            good = measure(checkpoint, Path(work))
        # In a small model the graph itself is a larger share of the file.
        print(f"{checkpoint}: w8's target, {SHARE:g} at most with {SQNR:g} dB or more: {'met' if good else 'MISSED'}")
        met &= good
    sys.exit(not met)


if __name__ == "__main__":
    main()
