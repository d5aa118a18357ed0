"""A quantized bundle's denoiser: calibrated once, then quantized, compiled and judged until the budget is met."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration import mixed, prompts, quality, recipe, sensitivity
from calibration.calibrate import calibrate, source
from calibration.coverage import coverage
from calibration.mixed import SURE, Costs, Gain
from calibration.numbers import NUMBERS, with_half_scales
from calibration.observe import Statistics, is_statistics
from calibration.observe import load as load_statistics
from calibration.quality import Budget, Judged, Quality
from calibration.ranges import OBSERVERS
from calibration.recipe import Done, Recipe
from calibration.split import split
from exporter import compile as compilers
from exporter import hub as hubs
from exporter import latency
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.backends.openvino import HINT
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Model, Stage
from runtimes.session import Session, require
from runtimes.target import Target

PRECISIONS = tuple(NUMBERS)
BESIDE = {"onnxruntime": "fp32", "openvino": "bf16", "tensorrt": "fp16"}
"""What the graphs beside the denoiser compute in, and what of it is not quantized, by backend."""
SIMULATED = "simulated on ONNX Runtime: the same 8-bit numbers, fp32 beside them"
BUDGET = "psnr=30"  # what is asked for where the user asks for nothing
KEPT = "more noise for each second that 8 bits save than in any block that is quantized"
MULTIPLICATIONS = 1e12  # a second, on a target that cannot be timed: only the blocks' proportions count
NOT_FASTER = "8 bits make it no faster on the target"


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized, as the user decides.

    budget: "psnr=36", the least median PSNR of its pictures in dB. prompts: to calibrate and judge with, or the path of
    a file with one a line; None for some of our own. statistics: a file of an earlier calibration, reused if it is
    there and written if not. steps: of the sampler in the calibration; None for the model's own. observer: one of
    calibration.ranges.
    """

    budget: str = BUDGET
    prompts: Sequence[str] | Path | str | None = None
    statistics: Path | str | None = None
    steps: int | None = None
    observer: str = "mse"

    def checked(self) -> Settings:
        """What the words say; DexportError, before the long work, if they say nothing that can be done."""
        if self.observer not in OBSERVERS:
            raise DexportError(f"no observer {self.observer!r}; there are {', '.join(OBSERVERS)}")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise DexportError(f"the steps of a calibration must be a whole number from 1, not {self.steps!r:.60}")
        given = None
        if isinstance(self.prompts, str | Path):
            given = prompts.split(prompts.read(Path(self.prompts)), str(self.prompts))
        elif self.prompts is not None:
            given = prompts.split(list(self.prompts), "the prompts")
        file = Path(self.statistics) if self.statistics else None
        if file is not None:
            _check_place(file)
        return Settings(Budget.parse(self.budget), given, file, self.steps, Recipe(self.observer))


@dataclass(frozen=True)
class Settings:
    """A Quantization, read and checked. prompts: the user's, to calibrate with and to judge by."""

    budget: Budget
    prompts: tuple[tuple[str, ...], tuple[str, ...]] | None
    statistics: Path | None
    steps: int | None
    recipe: Recipe

    def check_for(self, stages: Sequence[Stage]) -> None:
        """Raise DexportError for prompts that a model of these stages does not take."""
        if self.prompts is not None and stages:
            prompts.check_taken(self.prompts[0] + self.prompts[1], stages[0])

    def split(self, model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The prompts to calibrate with, and those to judge by: the user's, or ours that suit the model."""
        return self.prompts or prompts.defaults(model)


@dataclass(frozen=True)
class Calibrated:
    """A hub's denoiser with all that quantizing it for any target needs."""

    hub: Path
    model: Model
    statistics: Statistics
    judged: Judged
    settings: Settings


@dataclass(frozen=True)
class Made:
    """The denoiser as it was compiled, and what the manifest tells of it."""

    graph: Graph
    report: dict[str, Any]


def check(stages: Sequence[Stage]) -> None:
    """Raise DexportError for a model that is not calibrated by drawing out of noise with one denoiser."""
    if len(stages) > 1 or any(stage.strength is not None for stage in stages):
        raise DexportError(
            f"{', '.join(PRECISIONS)} is for models that draw out of noise with one denoiser, and not for refiners; "
            "take another precision"
        )


def prepare(model: Model, hub: Path, settings: Settings, progress: Progress = silent) -> Calibrated:
    """Calibrate, or load the statistics, and draw the pictures that the quantized model is judged by."""
    statistics = _statistics(model, hub, settings, lambda what, share: progress(what, share * 0.7))
    kept = settings.split(model)[1]
    judged = quality.draw_float(model, hub, kept, lambda what, share: progress(f"float {what}", 0.7 + share * 0.3))
    return Calibrated(hub, model, statistics, judged, settings)


def make(
    calibrated: Calibrated, model: Model, output: Path, target: Target, precision: str, max_batch: int,
    cache: Path | None, progress: Progress = silent, islands: Collection[str] = frozenset(),
) -> Made:  # fmt: skip
    """Quantize and compile the denoiser into ``output``/denoiser for a target.

    ``model``: with the other graphs as they were compiled into ``output``. ``islands``: nodes of the denoiser that stay
    float32 where the rest of it is fp16. The budget is kept, by leaving blocks in floating point if need be. Where this
    machine cannot run the target, what is judged is the quantized graph on ONNX Runtime. Raises GateError where the
    budget cannot be met.
    """
    name = model.stages[0].denoiser
    hub_graph = calibrated.model.graphs[name]
    file = calibrated.hub / hub_graph.file
    here = runs_here(target)
    numbers = NUMBERS[precision]
    wanted = replace(
        calibrated.settings.recipe,
        dynamic=compilers.dynamic(target) and recipe.is_dynamic(ir.load(file)),
        scores=compilers.integer_scores(target),
        numbers=with_half_scales(numbers) if compilers.computes_in_fp16(target, precision) else numbers,
    )
    made: dict[frozenset[str], tuple[Graph, Path]] = {}
    done: dict[frozenset[str], Done] = {}
    with tempfile.TemporaryDirectory(prefix=".quantized-", dir=output.parent) as work:

        def write(keep: frozenset[str], folder: Path) -> Path:
            graph, done[keep] = recipe.apply(ir.load(file), calibrated.statistics, replace(wanted, keep=keep))
            onnx = folder / "model.onnx"
            ir.save(graph, onnx, external_data=f"{onnx.name}.data", size_threshold_bytes=1024)
            return onnx

        def compiled(keep: frozenset[str]) -> tuple[Graph, Path]:
            if keep not in made:
                folder = Path(work) / f"{len(made)}" / name
                folder.mkdir(parents=True)
                with tempfile.TemporaryDirectory(prefix="hub-", dir=work) as quantized:
                    graph = compilers.compile_graph(
                        write(keep, Path(quantized)), hub_graph, folder, target, precision, max_batch=max_batch,
                        islands=islands, cache=None if here else cache,  # most tries are made once and never again
                    )  # fmt: skip
                made[keep] = graph, folder.parent
            return made[keep]

        def opener(keep: frozenset[str]) -> Callable[[str], Session]:
            graph, place = compiled(keep)
            return _opener(model, output, target, name, place, graph)

        def attempt(keep: frozenset[str]) -> Quality:
            what = f"{len(keep)} blocks and layers in floating point" if keep else "everything in 8 bits"
            progress(f"{target} {precision}: {what}", min(0.9, 0.3 * len(done)))
            if here:
                return quality.judge(calibrated.judged, model, output, opener(keep))
            with tempfile.TemporaryDirectory(prefix="simulated-", dir=work) as quantized:
                load = _simulated(calibrated, name, write(keep, Path(quantized)))
                return quality.judge(calibrated.judged, calibrated.model, calibrated.hub, load)

        def costs() -> Costs:
            if here:
                return _costs(calibrated, wanted, file, hub_graph, target, precision, Path(work), progress)
            return _simulated_costs(calibrated, wanted, file, hub_graph, progress)

        def race(*keeps: frozenset[str]) -> Gain:
            if not here:
                return Gain(0.0, 0.0)
            progress(f"{target} {precision}: timing two good tries in turns", 0.9)
            return latency.race([opener(keep)(name) for keep in keeps], calibrated.judged.calls[0][0])

        plan = mixed.search(calibrated.settings.budget, attempt, costs, race)
        keep = plan.chosen.keep
        graph, place = compiled(keep)
        for other in compilers.alternatives(graph, target, precision) if here else ():
            progress(f"{target} {precision}: timing other settings in turns", 0.95)
            loads = [_opener(model, output, target, name, place, one) for one in (graph, other)]
            if latency.race([load(name) for load in loads], calibrated.judged.calls[0][0]).faster:
                found = quality.judge(calibrated.judged, model, output, loads[1])
                if found.median >= calibrated.settings.budget.psnr:
                    graph, plan = other, replace(plan, chosen=replace(plan.chosen, quality=found))
        floats = "fp32" if graph.properties.get(HINT) == "f32" else BESIDE[target.backend]
        report = _report(calibrated, plan, done[keep], floats, precision)
        if not here:
            report["simulated"] = SIMULATED
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(place / name, folder)
    return Made(graph, report)


def calibrate_hub(
    hub_folder: Path | str, output: Path | str, *, prompts: Sequence[str] | Path | str | None = None,
    steps: int | None = None, overwrite: bool = False, progress: Progress = silent,
) -> Statistics:  # fmt: skip
    """Calibrate a hub alone and write the statistics to the file ``output``, for ``Quantization.statistics``.

    ``prompts``, ``steps``: see ``Quantization``. As in a build, the last of the prompts are left to judge by.
    """
    output = Path(output)
    settings = Quantization(prompts=prompts, statistics=output, steps=steps).checked()
    if output.exists() and not overwrite:
        raise DexportError(f"{output} exists; choose another file, or say --overwrite")
    if output.exists() and not is_statistics(output):
        raise DexportError(f"{output} is no file of statistics; it is not overwritten: choose another file")
    model = hubs.load(Path(hub_folder))
    check(model.stages)
    settings.check_for(model.stages)
    statistics = calibrate(model, Path(hub_folder), settings.split(model)[0], steps=steps, progress=progress)
    statistics.save(output)
    return statistics


def _statistics(model: Model, hub: Path, settings: Settings, progress: Progress) -> Statistics:
    file = settings.statistics
    if file is not None and file.exists():
        return _reused(file, model, hub, settings)
    statistics = calibrate(model, hub, settings.split(model)[0], steps=settings.steps, progress=progress)
    if file is not None:
        statistics.save(file)
    return statistics


def _reused(file: Path, model: Model, hub: Path, settings: Settings) -> Statistics:
    """Statistics of an earlier calibration, if they do not contradict what is asked for now."""
    statistics = load_statistics(file, source(model, hub))
    steps = statistics.settings.get("steps")
    if settings.steps is not None and settings.steps != steps:
        raise DexportError(
            f"{file}: these statistics are of {steps!r:.20} steps, not {settings.steps}; leave --calibration-steps "
            "out, or name a new file"
        )
    known = {call.prompt for call in statistics.calls}
    if both := [prompt for prompt in settings.split(model)[1] if prompt in known]:
        raise DexportError(
            f"{file}: {both[0]!r:.60} was calibrated with and would be judged by; give prompts whose last quarter is "
            "new, or calibrate again with these"
        )
    return statistics


def _check_place(file: Path) -> None:
    """Raise DexportError unless statistics can be read from or written to ``file``."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir():
        raise DexportError(f"{file}: no place for statistics; name a file in a folder that exists")
    if not file.exists() and not os.access(folder, os.W_OK):
        raise DexportError(f"{file}: the folder cannot be written to; name a file in another one")


def _opener(
    model: Model, output: Path, target: Target, name: str, place: Path, graph: Graph
) -> Callable[[str], Session]:
    runtime = require(target.backend)

    def load(wanted: str) -> Session:
        if wanted == name:
            return runtime.open(place / graph.file, graph, target.device, None, None)
        return runtime.open(output / model.graphs[wanted].file, model.graphs[wanted], target.device, None, None)

    return load


def _simulated(calibrated: Calibrated, name: str, quantized: Path) -> Callable[[str], Session]:
    """The hub on ONNX Runtime, with the quantized graph in the denoiser's place."""

    def load(wanted: str) -> Session:
        graph = calibrated.model.graphs[wanted]
        return OnnxRuntimeSession(quantized if wanted == name else calibrated.hub / graph.file, graph, None)

    return load


def runs_here(target: Target) -> bool:
    """Whether this machine has a device that runs a target; "local" is whatever one there is."""
    here = [device.name for device in require(target.backend).devices()]
    return target.device in here or (target.device == "local" and bool(here))


def _costs(
    calibrated: Calibrated, wanted: Recipe, file: Path, graph: Graph, target: Target, precision: str, work: Path,
    progress: Progress,
) -> Costs:  # fmt: skip
    """What 8 bits cost in noise and save in seconds, measured."""
    statistics, calls = calibrated.statistics, calibrated.judged.calls
    gains = latency.measure(file, graph, statistics, wanted, calls[0][0], target, precision, work, progress)
    slow = tuple(name for name, gain in gains.items() if gain.slow)
    noise = sensitivity.noise(file, graph, statistics, wanted, calls, progress, apart=slow)
    saved: dict[str, float] = {}
    for name, gain in gains.items():
        unit = name if gain.slow else recipe.block(name)
        saved[unit] = saved.get(unit, 0.0) + gain.saved
    return Costs(noise, dict.fromkeys(noise, 0.0) | saved, slow)


def _simulated_costs(calibrated: Calibrated, wanted: Recipe, file: Path, graph: Graph, progress: Progress) -> Costs:
    """The same where no seconds can be measured: all layers are taken to be as fast."""
    noise = sensitivity.noise(file, graph, calibrated.statistics, wanted, calibrated.judged.calls, progress)
    saved: dict[str, float] = {}
    for layer in recipe.candidates(split(ir.load(file))[0])[0]:
        unit = recipe.block(layer.name)
        saved[unit] = saved.get(unit, 0.0) + layer.work / MULTIPLICATIONS
    return Costs(noise, dict.fromkeys(noise, 0.0) | saved)


def _report(calibrated: Calibrated, plan: mixed.Plan, done: Done, floats: str, precision: str) -> dict[str, Any]:
    covered, judged, found = coverage(calibrated.statistics), calibrated.judged, plan.chosen.quality
    timesteps = [float(inputs["timestep"][0]) for inputs, _ in judged.calls]
    return {
        "budget_psnr_db": calibrated.settings.budget.psnr,
        "prompts": list(judged.prompts),
        "steps": judged.steps,
        "observer": calibrated.settings.recipe.observer,
        "psnr_db": [round(value, 2) for value in found.psnr],
        "timesteps": timesteps,
        "sqnr_db": [round(value, 2) for value in found.sqnr],
        "latents_sqnr_db": [round(value, 2) for value in found.latents],
        "attempts": [
            {
                "kept": len(one.blocks), "not_faster": len(one.layers), "psnr_median_db": round(one.quality.median, 2),
                **_race(plan.races.get(len(one.blocks))),
            }
            for one in plan.attempts
        ],
        "kept": list(plan.chosen.blocks),
        "not_faster": list(plan.chosen.layers),
        "blocks": _blocks(plan, done, floats, precision),
        "calibration": {
            **dict(calibrated.statistics.settings), "calls": covered.calls, "late": round(covered.late, 4),
            "by_timestep": {f"{t:g}": count for t, count in covered.by_timestep.items()},
            "by_prompt": covered.by_prompt,
        },
        **_layers(done, NOT_FASTER, plan.chosen.layers),
    }  # fmt: skip


def _blocks(plan: mixed.Plan, done: Done, floats: str, precision: str) -> list[dict[str, Any]]:
    """Each block that could be quantized, and each layer that counts by itself: what became of it, and its figures."""
    chosen, costs = plan.chosen, plan.costs
    if costs is None:
        return [{"name": name, "precision": precision} for name in dict.fromkeys(map(recipe.block, done.quantized))]
    found = []
    for name in sorted(costs.noise, key=costs.share, reverse=True):
        kept, slow = name in chosen.keep, name in costs.slow
        found.append({
            "name": name, "precision": floats if kept else precision,
            "noise": _short(costs.share(name)), "saved_seconds": _short(costs.saved[name]),
            "sqnr_db": {f"{t:g}": round(-10 * float(np.log10(max(n, 1e-20))), 1) for t, n in costs.noise[name].items()},
            **({"why": NOT_FASTER if slow else KEPT} if kept else {}),
        })  # fmt: skip
    return found


def _race(gain: Gain | None) -> dict[str, Any]:
    return {} if gain is None else {"saved_seconds": _short(gain.saved), "doubt_seconds": _short(SURE * gain.error)}


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _layers(done: Done, why: str = "", names: Collection[str] = ()) -> dict[str, Any]:
    """How many layers are quantized, and which are not; ``why``: the reason for those of ``names``."""
    left = {name: why if name in names else reason for name, reason in done.left.items()}
    return {
        "quantized": len(done.quantized), "dynamic": len(done.dynamic), "scores": len(done.scores),
        "smoothed": len(done.smoothed), "left": left,
    }  # fmt: skip
