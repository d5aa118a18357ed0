"""A quantized bundle's denoiser: calibrated once, then quantized, compiled and judged until the budget is met."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration import mixed, prompts, quality, recipe, sensitivity
from calibration.calibrate import calibrate, source
from calibration.coverage import coverage
from calibration.observe import Statistics
from calibration.observe import load as load_statistics
from calibration.quality import Budget, Judged, Quality
from calibration.ranges import OBSERVERS
from calibration.recipe import Done, Recipe
from calibration.split import split
from exporter import compile as compilers
from exporter import hub as hubs
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Model
from runtimes.session import Session, require
from runtimes.target import Target

PRECISIONS = ("int8",)
BESIDE = {"onnxruntime": "fp32", "openvino": "bf16", "tensorrt": "fp32"}
"""What the graphs beside the denoiser compute in, and what of it is not quantized, by backend."""
BUDGET = "psnr=30"  # what is asked for where the user asks for nothing


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized, as the user decides.

    budget: "psnr=36", the least median PSNR of its pictures in dB. prompts: to calibrate and judge with, or a file with
    one a line; None for some of our own. statistics: a file of an earlier calibration, reused if it is there and
    written if not. steps: of the sampler in the calibration; None for the model's own. observer: one of
    calibration.ranges.
    """

    budget: str = BUDGET
    prompts: Sequence[str] | Path | None = None
    statistics: Path | None = None
    steps: int | None = None
    observer: str = "mse"

    def checked(self) -> Settings:
        """What the words say; DexportError, before the long work, if they say nothing that can be done."""
        if self.observer not in OBSERVERS:
            raise DexportError(f"no observer {self.observer!r}; there are {', '.join(OBSERVERS)}")
        if self.steps is not None and self.steps < 1:
            raise DexportError(f"the steps of a calibration must be 1 or more, not {self.steps}")
        given = self.prompts
        if isinstance(given, Path):
            given = prompts.read(given)
        elif given is not None:
            given = prompts.check(list(given), "the prompts")
        file = Path(self.statistics) if self.statistics else None
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise DexportError(f"{file}: no place for statistics; name a file in a folder that exists")
        return Settings(
            Budget.parse(self.budget), tuple(given) if given is not None else None, file, self.steps,
            Recipe(self.observer),
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A Quantization, read and checked."""

    budget: Budget
    prompts: tuple[str, ...] | None
    statistics: Path | None
    steps: int | None
    recipe: Recipe

    def check_for(self, model: Model) -> None:
        """Raise DexportError for prompts that ``model`` does not take."""
        if self.prompts is not None:
            prompts.check_taken(self.prompts, model)

    def split(self, model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The prompts to calibrate with, and those to judge by: of the user's the last quarter, but at most four."""
        if self.prompts is None:
            return prompts.defaults(model)
        count = min(len(prompts.JUDGED), max(1, len(self.prompts) // 4))
        return self.prompts[:-count], self.prompts[-count:]


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


def prepare(model: Model, hub: Path, settings: Settings, progress: Progress = silent) -> Calibrated:
    """Calibrate, or load the statistics, and draw the pictures that the quantized model is judged by."""
    statistics = _statistics(model, hub, settings, lambda what, share: progress(what, share * 0.7))
    kept = settings.split(model)[1]
    judged = quality.draw_float(model, hub, kept, lambda what, share: progress(f"float {what}", 0.7 + share * 0.3))
    return Calibrated(hub, model, statistics, judged, settings)


def make(
    calibrated: Calibrated, model: Model, output: Path, target: Target, precision: str, max_batch: int,
    cache: Path | None, progress: Progress = silent,
) -> Made:  # fmt: skip
    """Quantize and compile the denoiser into ``output``/denoiser for a target.

    ``model``: with the other graphs as they were compiled into ``output``. Where this machine can run the target the
    budget is kept, by leaving blocks in floating point if need be; elsewhere everything is quantized and nothing is
    measured. Raises GateError where the budget cannot be met.
    """
    name = model.stages[0].denoiser
    hub_graph = calibrated.model.graphs[name]
    file = calibrated.hub / hub_graph.file
    built: dict[frozenset[str], tuple[Graph, Done]] = {}
    with tempfile.TemporaryDirectory(prefix=".quantized-", dir=output.parent) as work:

        def compiled(keep: frozenset[str]) -> Path:
            folder = Path(work) / f"{len(keep)}" / name
            folder.mkdir(parents=True)
            chosen = replace(calibrated.settings.recipe, keep=keep)
            with tempfile.TemporaryDirectory(prefix="hub-", dir=work) as quantized:
                graph, done = recipe.apply(ir.load(file), calibrated.statistics, chosen)
                onnx = Path(quantized) / "model.onnx"
                ir.save(graph, onnx, external_data=f"{onnx.name}.data", size_threshold_bytes=1024)
                made = compilers.compile_graph(
                    onnx, hub_graph, folder, target, precision, max_batch=max_batch, cache=cache
                )
            built[keep] = made, done
            return folder.parent

        def attempt(keep: frozenset[str]) -> Quality:
            progress(f"{target} {precision}: {len(keep)} blocks in floating point", min(0.9, 0.3 * len(built)))
            place = compiled(keep)
            return quality.judge(
                calibrated.judged, model, output, _opener(model, output, target, name, place, built[keep][0])
            )

        def noise() -> Any:
            return sensitivity.noise(
                file, hub_graph, calibrated.statistics, calibrated.settings.recipe, calibrated.judged.calls, progress
            )

        if _runs_here(target):
            layers, _ = recipe.candidates(split(ir.load(file))[0])
            plan = mixed.search(calibrated.settings.budget, attempt, noise, mixed.work(layers))
            keep = frozenset(plan.chosen.keep)
            report = _report(calibrated, plan, built[keep][1])
        else:
            keep = frozenset()
            compiled(keep)
            report = {"budget": "not measured: this machine cannot run the target", **_layers(built[keep][1])}
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(Path(work) / f"{len(keep)}" / name, folder)
    return Made(built[keep][0], report)


def calibrate_hub(
    hub_folder: Path | str, output: Path | str, *, prompts: Sequence[str] | Path | None = None,
    steps: int | None = None, overwrite: bool = False, progress: Progress = silent,
) -> Statistics:  # fmt: skip
    """Calibrate a hub alone and write the statistics to the file ``output``, for ``Quantization.statistics``.

    ``prompts``, ``steps``: see ``Quantization``; all the prompts are used.
    """
    output = Path(output)
    settings = Quantization(prompts=prompts, statistics=output, steps=steps).checked()
    if output.exists() and not overwrite:
        raise DexportError(f"{output} exists; choose another file, or say --overwrite")
    model = hubs.load(Path(hub_folder))
    settings.check_for(model)
    statistics = calibrate(model, Path(hub_folder), settings.prompts, steps=steps, progress=progress)
    statistics.save(output)
    return statistics


def _statistics(model: Model, hub: Path, settings: Settings, progress: Progress) -> Statistics:
    file = settings.statistics
    if file is not None and file.exists():
        return load_statistics(file, source(model, hub))
    statistics = calibrate(model, hub, settings.split(model)[0], steps=settings.steps, progress=progress)
    if file is not None:
        statistics.save(file)
    return statistics


def _opener(
    model: Model, output: Path, target: Target, name: str, place: Path, graph: Graph
) -> Callable[[str], Session]:
    runtime = require(target.backend)

    def load(wanted: str) -> Session:
        if wanted == name:
            return runtime.open(place / graph.file, graph, target.device, None, None)
        return runtime.open(output / model.graphs[wanted].file, model.graphs[wanted], target.device, None, None)

    return load


def _runs_here(target: Target) -> bool:
    return target.device in [device.name for device in require(target.backend).devices()]


def _report(calibrated: Calibrated, plan: mixed.Plan, done: Done) -> dict[str, Any]:
    covered = coverage(calibrated.statistics)
    return {
        "budget_psnr_db": calibrated.settings.budget.psnr,
        "prompts": list(calibrated.judged.prompts),
        "steps": calibrated.judged.steps,
        "psnr_db": [round(value, 2) for value in plan.chosen.quality.psnr],
        "sqnr_db": [round(value, 2) for value in plan.chosen.quality.sqnr],
        "attempts": [
            {"kept": len(one.keep), "psnr_median_db": round(one.quality.median, 2)} for one in plan.attempts
        ],
        "kept": {name: float(f"{plan.noise[name]:.3g}") for name in plan.chosen.keep},
        "calibration": {
            **dict(calibrated.statistics.settings), "calls": covered.calls, "late": round(covered.late, 4),
            "by_timestep": {f"{t:g}": count for t, count in covered.by_timestep.items()},
            "by_prompt": covered.by_prompt,
        },
        **_layers(done),
    }  # fmt: skip


def _layers(done: Done) -> dict[str, Any]:
    return {"quantized": len(done.quantized), "smoothed": len(done.smoothed), "left": dict(done.left)}
