"""A quantized bundle's denoiser: calibrated once, then quantized, compiled and judged until the budget is met."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration import mixed, prompts, quality, recipe
from calibration.calibrate import calibrate, source
from calibration.coverage import coverage
from calibration.mixed import SURE, Gain
from calibration.numbers import NUMBERS
from calibration.observe import Statistics, is_statistics
from calibration.observe import load as load_statistics
from calibration.quality import Budget
from calibration.ranges import OBSERVERS
from calibration.recipe import Done, Recipe
from calibration.split import split
from exporter import hub as hubs
from exporter.tries import Calibrated, Tries
from runtimes.backends.openvino import HINT
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Model, Stage
from runtimes.target import Target

PRECISIONS = tuple(NUMBERS)
BESIDE = {"onnxruntime": "fp32", "openvino": "bf16", "tensorrt": "fp16"}
"""What the graphs beside the denoiser compute in, and what of it is not quantized, by backend."""
SIMULATED = "simulated on ONNX Runtime: the same 8-bit numbers, fp32 beside them"
BUDGET = "psnr=30"  # what is asked for where the user asks for nothing
KEPT = "more noise for each second that 8 bits save than in any block that is quantized"
KEPT_UNTIMED = "more noise for its multiplications than in any block that is quantized; nothing was timed"
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
class Made:
    """The denoiser as it was compiled, and what the manifest tells of it."""

    graph: Graph
    report: dict[str, Any]


def check(stages: Sequence[Stage]) -> None:
    """Raise DexportError for a model that is not calibrated by drawing out of noise with one denoiser."""
    if len(stages) > 1 or any(stage.strength is not None for stage in stages):
        raise DexportError(
            f"{', '.join(PRECISIONS)} is for models that draw out of noise with one denoiser: not with a refiner, a "
            "prior or a consistency decoder; take fp32, bf16 or fp16"
        )


def prepare(model: Model, hub: Path, settings: Settings, progress: Progress = silent) -> Calibrated:
    """Calibrate, or load the statistics, and draw the pictures that the quantized model is judged by."""
    _check_layers(model, hub)
    statistics = _statistics(model, hub, settings, lambda what, share: progress(what, share * 0.7))
    kept = settings.split(model)[1]
    judged = quality.draw_float(model, hub, kept, lambda what, share: progress(f"float {what}", 0.7 + share * 0.3))
    return Calibrated(hub, model, statistics, judged, settings.recipe)


def make(
    calibrated: Calibrated, budget: Budget, model: Model, output: Path, target: Target, precision: str,
    max_batch: int, cache: Path | None, progress: Progress = silent, islands: Collection[str] = frozenset(),
) -> Made:  # fmt: skip
    """Quantize and compile the denoiser into ``output``/denoiser for a target.

    ``model``: with the other graphs as they were compiled into ``output``. ``islands``: nodes of the denoiser that stay
    float32 where the rest of it is fp16. The budget is kept, by leaving blocks in floating point if need be. Where this
    machine cannot run the target, what is judged is the quantized graph on ONNX Runtime. Raises GateError where the
    budget cannot be met.
    """
    with tempfile.TemporaryDirectory(prefix=".quantized-", dir=output.parent) as work:
        tries = Tries(calibrated, (model, output), target, precision, Path(work), (max_batch, cache, islands), progress)
        plan = mixed.search(budget, tries.judge, tries.costs, tries.race)
        graph, place, plan = tries.settle(plan, budget)
        floats = "fp32" if graph.properties.get(HINT) == "f32" else BESIDE[target.backend]
        report = _report(calibrated, budget, plan, tries.done[plan.chosen.keep], floats, precision)
        if not tries.here:
            report["simulated"] = SIMULATED
        folder = output / calibrated.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(place / calibrated.name, folder)
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
    _check_layers(model, Path(hub_folder))
    statistics = calibrate(model, Path(hub_folder), settings.split(model)[0], steps=steps, progress=progress)
    statistics.save(output)
    return statistics


def _check_layers(model: Model, hub: Path) -> None:
    """Raise DexportError for a denoiser of which nothing can be in 8 bits."""
    layers, left = recipe.candidates(split(ir.load(hub / model.graphs[model.stages[0].denoiser].file))[0])
    if not layers:
        why = f" ({'; '.join(sorted(set(left.values())))})" if left else ""
        raise DexportError(
            f"this model's denoiser has no layer for 8 bits: all that multiplies stays in floating point{why}; take "
            "fp32, bf16 or fp16"
        )


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


def _report(
    calibrated: Calibrated, budget: Budget, plan: mixed.Plan, done: Done, floats: str, precision: str
) -> dict[str, Any]:
    covered, judged, found = coverage(calibrated.statistics), calibrated.judged, plan.chosen.quality
    timesteps = [float(inputs["timestep"][0]) for inputs, _ in judged.calls]
    return {
        "budget_psnr_db": budget.psnr,
        "prompts": list(judged.prompts),
        "steps": judged.steps,
        "observer": calibrated.recipe.observer,
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
        "blocks": blocks(plan, done, floats, precision),
        "calibration": {
            **dict(calibrated.statistics.settings), "calls": covered.calls, "late": round(covered.late, 4),
            "by_timestep": {f"{t:g}": count for t, count in covered.by_timestep.items()},
            "by_prompt": covered.by_prompt,
        },
        **_layers(done, NOT_FASTER, plan.chosen.layers),
    }  # fmt: skip


def blocks(plan: mixed.Plan, done: Done, floats: str, precision: str) -> list[dict[str, Any]]:
    """Each block that could be quantized, and each layer that counts by itself: what became of it, and its figures."""
    chosen, costs = plan.chosen, plan.costs
    if costs is None:
        return [{"name": name, "precision": precision} for name in dict.fromkeys(map(recipe.block, done.quantized))]
    found, why_kept = [], KEPT if costs.timed else KEPT_UNTIMED
    for name in sorted(costs.noise, key=costs.share, reverse=True):
        kept, slow = name in chosen.keep, name in costs.slow
        found.append({
            "name": name, "precision": floats if kept else precision,
            "noise": _short(costs.share(name)), **({"saved_seconds": _short(costs.saved[name])} if costs.timed else {}),
            "sqnr_db": {f"{t:g}": round(-10 * float(np.log10(max(n, 1e-20))), 1) for t, n in costs.noise[name].items()},
            **({"why": NOT_FASTER if slow else why_kept} if kept else {}),
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
