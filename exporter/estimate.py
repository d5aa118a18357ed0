"""What an export and a build of a checkpoint will need of this machine, without a weight read: memory, disk and time.

Memory and disk follow from the weights; time from the operations, which torch counts on tensors without values, and
from how fast this machine multiplies matrices. The factors were measured with benchmarks/export.py on checkpoints from
20 MB to 7 GB. It is an estimate: what a runtime does inside, and what else the machine does, is not known here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from exporter import ensemble, trace
from exporter.checkpoint import Checkpoint
from exporter.families import Shape
from exporter.record import STEPS
from exporter.weights import parameter_shapes

LIBRARIES = 0.7e9  # bytes that torch, diffusers and a runtime take by themselves
STREAMED = 2  # copies of the largest weight in fp32 while it is turned and written
SESSION = 1.2  # times a graph's weights in fp32, while a runtime loads and lays them out
TRACING = 0.024  # seconds for each tensor of weights
STARTING = 5.0  # seconds: imports, and graphs without many weights
WRITING = 4.0  # seconds for each GB of the hub, hashing and checking included
USED = 0.5  # of the speed of a matrix product: convolutions, attention, and all that is not multiplied
RUNS = 3  # of each model call: the reference, each graph alone, the free run


@dataclass(frozen=True)
class Graph:
    """A graph's weights in fp32, in bytes; the largest of them; how many; and operations of a call with one picture."""

    weights: int
    largest: int
    tensors: int
    flops: int


def measure(checkpoint: Checkpoint) -> dict[str, Graph]:
    """Look at each graph of a checkpoint, at its own picture size."""
    found = {}
    for name, spec in ensemble.specs(
        checkpoint, Shape(*checkpoint.family.default_shape(checkpoint), free=False)
    ).items():
        sizes = [4 * prod(shape) for shape in parameter_shapes(trace.build(spec)).values()]
        found[name] = Graph(sum(sizes), max(sizes, default=0), len(sizes), trace.flops(spec))
    return found


def needs(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes of memory and disk, and seconds of time: of an ``export``, and of a ``build`` in fp32 for one target."""
    graphs = measure(checkpoint)
    stages = ensemble.stages(checkpoint, Shape(*checkpoint.family.default_shape(checkpoint), free=False))
    calls = dict.fromkeys(graphs, 1)
    for stage in stages:
        calls[stage.denoiser] = STEPS * (2 if stage.guidance.kind == "cfg" else 1)
        if stage.fps is not None and stage.decoder is not None:
            calls[stage.decoder] = stage.sample[1]  # once for each frame
    disk = sum(graph.weights for graph in graphs.values())
    export = STARTING + TRACING * sum(graph.tensors for graph in graphs.values()) + WRITING * disk / 1e9
    flops = RUNS * sum(calls[name] * graph.flops for name, graph in graphs.items())
    return {
        "export": {
            "memory": int(LIBRARIES + STREAMED * max(graph.largest for graph in graphs.values())),
            "disk": disk,
            "time": round(export),
        },
        "build": {
            "memory": int(LIBRARIES + SESSION * max(graph.weights for graph in graphs.values())),
            "disk": 2 * disk,  # the hub and the bundle
            "time": round(export + WRITING * disk / 1e9 + flops / (USED * speed())),
        },
        "GFLOP a call": {name: float(f"{graph.flops / 1e9:.3g}") for name, graph in graphs.items()},
    }


def speed(side: int = 1024, repeats: int = 5) -> float:
    """Operations a second of this machine in a product of two fp32 matrices, the best of some."""
    one = torch.ones(side, side)
    torch.mm(one, one)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(one, one)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
