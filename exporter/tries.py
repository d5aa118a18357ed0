"""Tries of a plan of mixed precision: the denoiser with some blocks in floating point, built for a target and judged.

Where this machine cannot run the target, what is judged is the same quantized graph on ONNX Runtime, and blocks are
weighed by their multiplications in place of seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from calibration import quality, recipe, sensitivity
from calibration.mixed import Costs, Gain, Plan
from calibration.numbers import NUMBERS, with_half_scales
from calibration.observe import Statistics
from calibration.quality import Budget, Judged, Quality
from calibration.recipe import Done, Recipe
from calibration.split import split
from exporter import compile as compilers
from exporter import latency
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import Progress
from runtimes.manifest import Graph, Model
from runtimes.session import Session, require, runs_here
from runtimes.target import Target

Keep = frozenset[str]  # blocks and layers that stay in floating point


@dataclass(frozen=True)
class Calibrated:
    """A hub's denoiser with all that quantizing it for any target needs."""

    hub: Path
    model: Model
    statistics: Statistics
    judged: Judged
    recipe: Recipe

    @property
    def name(self) -> str:
        """The denoiser's graph."""
        return self.model.stages[0].denoiser

    @property
    def graph(self) -> Graph:
        """As it is in the hub."""
        return self.model.graphs[self.name]

    @property
    def file(self) -> Path:
        """The hub's float graph."""
        return self.hub / self.graph.file


class Tries:
    """The tries for one target, each built once; ``done`` says what became of the layers of each."""

    def __init__(
        self, calibrated: Calibrated, beside: tuple[Model, Path], target: Target, precision: str, work: Path,
        compiling: tuple[int, Path | None, Collection[str]], progress: Progress,
    ) -> None:  # fmt: skip
        """Take what is quantized and for what.

        beside: the model with its other graphs as they were compiled into a folder. work: a folder for the tries.
        compiling: the largest batch, the cache, and the nodes that stay float32 where the rest is fp16.
        """
        self.done: dict[Keep, Done] = {}
        self.here = runs_here(target)
        self._calibrated, self._target, self._precision, self._work = calibrated, target, precision, work
        self._model, self._beside = beside
        self._max_batch, self._cache, self._islands = compiling
        self._progress = progress
        self._built: dict[Keep, tuple[Graph, Path]] = {}
        numbers, half = NUMBERS[precision], compilers.computes_in_fp16(target, precision)
        self._recipe = replace(
            calibrated.recipe,
            dynamic=compilers.dynamic(target) and recipe.is_dynamic(ir.load(calibrated.file)),
            scores=compilers.integer_scores(target),
            numbers=with_half_scales(numbers) if half else numbers,
        )

    def built(self, keep: Keep) -> tuple[Graph, Path]:
        """The compiled denoiser, and the folder that its file's path is relative to."""
        if keep not in self._built:
            folder = self._work / f"{len(self._built)}" / self._calibrated.name
            folder.mkdir(parents=True)
            with tempfile.TemporaryDirectory(prefix="hub-", dir=self._work) as quantized:
                graph = compilers.compile_graph(
                    self._write(keep, Path(quantized)), self._calibrated.graph, folder, self._target, self._precision,
                    max_batch=self._max_batch, islands=self._islands,
                    cache=None if self.here else self._cache,  # most tries are made once and never again
                )  # fmt: skip
            self._built[keep] = graph, folder.parent
        return self._built[keep]

    def judge(self, keep: Keep) -> Quality:
        """Draw with it: on the target, or its quantized graph on ONNX Runtime."""
        what = f"{len(keep)} blocks and layers in floating point" if keep else "everything in 8 bits"
        self._progress(f"{self._target} {self._precision}: {what}", min(0.9, 0.3 * len(self.done)))
        known = self._calibrated
        if self.here:
            return quality.judge(known.judged, self._model, self._beside, self._opener(*self.built(keep)))
        with tempfile.TemporaryDirectory(prefix="simulated-", dir=self._work) as quantized:
            return quality.judge(
                known.judged, known.model, known.hub, self._simulated(self._write(keep, Path(quantized)))
            )

    def costs(self) -> Costs:
        """What 8 bits cost in noise, and save."""
        known, calls = self._calibrated, self._calibrated.judged.calls
        saved: dict[str, float] = {}
        slow: tuple[str, ...] = ()
        if self.here:
            gains = latency.measure(
                known.file, known.graph, known.statistics, self._recipe, calls[0][0], self._target, self._precision,
                self._work, self._progress,
            )  # fmt: skip
            slow = tuple(name for name, gain in gains.items() if gain.slow)
            savings = {name: gain.saved for name, gain in gains.items()}
        else:
            savings = {layer.name: layer.work for layer in recipe.candidates(split(ir.load(known.file))[0])[0]}
        for name, each in savings.items():
            unit = name if name in slow else recipe.block(name)
            saved[unit] = saved.get(unit, 0.0) + each
        noise = sensitivity.noise(
            known.file, known.graph, known.statistics, self._recipe, calls, self._progress, apart=slow
        )
        return Costs(noise, dict.fromkeys(noise, 0.0) | saved, slow, timed=self.here)

    def race(self, first: Keep, second: Keep) -> Gain:
        """What the second saves of the first one's seconds a call; nothing where neither can be timed."""
        if not self.here:
            return Gain(0.0, 0.0)
        self._progress(f"{self._target} {self._precision}: timing two good tries in turns", 0.9)
        return self._race(self.built(first), self.built(second))

    def settle(self, plan: Plan, budget: Budget) -> tuple[Graph, Path, Plan]:
        """The chosen try under the properties that are fastest here, its folder, and the plan with its own quality."""
        graph, place = self.built(plan.chosen.keep)
        for other in compilers.alternatives(graph, self._target, self._precision) if self.here else ():
            self._progress(f"{self._target} {self._precision}: timing other settings in turns", 0.95)
            if self._race((graph, place), (other, place)).faster:
                found = quality.judge(self._calibrated.judged, self._model, self._beside, self._opener(other, place))
                if found.median >= budget.psnr:
                    graph, plan = other, replace(plan, chosen=replace(plan.chosen, quality=found))
        return graph, place, plan

    def _write(self, keep: Keep, folder: Path) -> Path:
        """The quantized graph, in ``folder``."""
        known = self._calibrated
        graph, self.done[keep] = recipe.apply(ir.load(known.file), known.statistics, replace(self._recipe, keep=keep))
        file = folder / "model.onnx"
        ir.save(graph, file, external_data=f"{file.name}.data", size_threshold_bytes=1024)
        return file

    def _race(self, *built: tuple[Graph, Path]) -> Gain:
        sessions = [self._opener(graph, place)(self._calibrated.name) for graph, place in built]
        return latency.race(sessions, self._calibrated.judged.calls[0][0])

    def _opener(self, graph: Graph, place: Path) -> Callable[[str], Session]:
        """What opens each graph on the target: this denoiser, and those beside it."""
        runtime, graphs = require(self._target.backend), self._model.graphs

        def load(wanted: str) -> Session:
            own = wanted == self._calibrated.name
            file = place / graph.file if own else self._beside / graphs[wanted].file
            return runtime.open(file, graph if own else graphs[wanted], self._target.device, None, None)

        return load

    def _simulated(self, quantized: Path) -> Callable[[str], Session]:
        """The hub on ONNX Runtime, with the quantized graph in the denoiser's place."""
        known = self._calibrated

        def load(wanted: str) -> Session:
            graph = known.model.graphs[wanted]
            return OnnxRuntimeSession(quantized if wanted == known.name else known.hub / graph.file, graph, None)

        return load
