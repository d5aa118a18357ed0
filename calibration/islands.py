"""Which nodes of a hub must stay float32 where fp16 is computed in: found by running its own pipeline on real prompts.

All graphs are watched (calibration/overflow.py) in the deployed run: the model's sampler over all its noise levels in
few steps, its guidance, its decoder, and its encoder on the pictures that were drawn. The hub runs in float32 on ONNX
Runtime, one graph in memory at a time, one image a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.overflow import LARGEST, MARGIN, Island, PeakObserver, islands, watch_peaks, watched_graph
from calibration.precision import LIMITS
from calibration.prompts import few
from calibration.split import split
from runtimes import cascade, example
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import Progress, silent
from runtimes.manifest import Model
from runtimes.pipeline import Pipeline
from runtimes.session import Session, require

PROMPTS = 4  # MARGIN is for what others would add
STEPS = 4  # from pure noise to a picture; what lies between two of them has magnitudes between theirs


@dataclass(frozen=True)
class Kept:
    """What of one graph stays float32. nodes: names for calibration.precision.cast; peak: the graph's greatest."""

    nodes: frozenset[str]
    islands: tuple[Island, ...]
    peak: float


@dataclass(frozen=True)
class Found:
    """What a run has shown of each graph, by name."""

    prompts: tuple[str, ...]
    steps: int | Mapping[str, int]
    graphs: Mapping[str, Kept]

    def nodes(self, name: str) -> frozenset[str]:
        """The nodes of a graph that stay float32; a graph that no picture needs has none."""
        return self.graphs[name].nodes if name in self.graphs else frozenset()

    def report(self) -> dict[str, Any]:
        """What a manifest tells of it, rounded so that the last bits of a sum do not change it."""
        return {
            "limit": LIMITS["fp16"], "margin": MARGIN, "prompts": list(self.prompts), "steps": self.steps,
            "graphs": {
                name: {
                    "peak": _rounded(kept.peak),
                    "islands": [
                        {"first": one.first, "last": one.last, "nodes": len(one.nodes), "peak": _rounded(one.peak)}
                        for one in kept.islands
                    ],
                }
                for name, kept in sorted(self.graphs.items())
            },
        }  # fmt: skip


def find(
    model: Model, hub: Path, prompts: Sequence[str] | None = None, *, quantized: bool = False,
    progress: Progress = silent,
) -> Found:  # fmt: skip
    """Run the first of ``prompts`` (ours if None) through a hub, and find the islands of each graph.

    ``quantized``: the denoiser's nodes are to be those of the graph that is quantized (calibration/split.py).
    """
    require("onnxruntime")
    first = cascade.main(model.stages)[0]
    watched: dict[str, PeakObserver] = {}  # the graph that is in memory
    peaks: dict[str, dict[str, float]] = {}

    def as_compiled(name: str) -> ir.Model:
        graph = ir.load(hub / model.graphs[name].file)
        return split(graph)[0] if quantized and name == first.denoiser else graph

    def put_away() -> None:
        for name, observer in watched.items():
            before = peaks.get(name, {})
            peaks[name] = {value: max(peak, before.get(value, 0.0)) for value, peak in observer.peaks().items()}
        watched.clear()

    def open_graph(name: str) -> Session:
        if name not in watched:
            put_away()
            graph = model.graphs[name]
            changed, names = watch_peaks(as_compiled(name))
            content = ir.to_proto(changed).SerializeToString()
            del changed
            inner = OnnxRuntimeSession(hub / graph.file, watched_graph(graph, names), None, content=content)
            watched[name] = PeakObserver(inner, graph, names)
            watched[name].max_batch = 1
        return watched[name]

    chosen = tuple(prompts[:PROMPTS]) if prompts else few(model, PROMPTS)
    steps = cascade.few(model.stages, min(STEPS, first.steps))
    pipeline = Pipeline(model, hub, open_graph)
    for step in pipeline.generate(example.request(model, chosen, steps=steps)):
        progress(f"fp16: looking for overflows, step {step.index + 1}/{step.total}", (step.index + 1) / step.total)
    images = pipeline.decode(step.sample)
    if first.encoder is not None:
        pipeline.encode(images)
    put_away()
    graphs = {name: _kept(as_compiled(name), found) for name, found in peaks.items()}
    return Found(chosen, steps, graphs)


def _kept(graph: ir.Model, peaks: Mapping[str, float]) -> Kept:
    nodes, found = islands(graph, peaks)
    return Kept(nodes, tuple(found), max(peaks.values(), default=0.0))


def _rounded(number: float) -> float:
    return float(f"{min(number, LARGEST):.3g}")  # JSON has no infinity
