"""How fast a bundle is on this machine: each graph alone, a step of the loop, and a whole image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from runtimes import bundle, cascade, example
from runtimes.conditioning import constants
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Stage
from runtimes.pipeline import Pipeline
from runtimes.session import Array, Session, require, run_batched
from runtimes.target import Target

FEWEST = 2  # steps of each way of a model with several; some samplers make no fewer


def bench(
    folder: Path | str,
    *,
    repeats: int = 5,
    threads: int | None = None,
    images: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time a bundle and return, ready for JSON::

        {"target", "precision", "threads", "images", "repeats", "steps",
         "graphs": {name: {"batch", "load_seconds", "first_seconds", "seconds", "best_seconds"}},
         "step_seconds", "image_seconds"}, and of a video its "frames"

    ``seconds`` is the median of ``repeats`` calls after the first, which some runtimes spend on compiling for the
    batch at hand. The denoiser's batch is ``2 * images`` where the model is guided. ``image_seconds`` is for all
    ``images`` (or videos) together with the checkpoint's own number of steps, graphs loaded and warm. Raises
    DexportError for a bad bundle.
    """
    if repeats < 1 or images < 1:
        raise DexportError(f"repeats and images must be 1 or more, not {repeats} and {images}")
    folder = Path(folder)
    manifest = bundle.load_manifest(folder)
    target = Target.parse(manifest.target)
    backend = require(target.backend)
    stages = {stage.denoiser: stage for stage in manifest.model.stages}
    sessions: dict[str, Session] = {}
    graphs: dict[str, Any] = {}
    for index, (name, graph) in enumerate(manifest.model.graphs.items()):
        progress(f"timing {name}", index / (len(manifest.model.graphs) + 1))
        begin = time.perf_counter()
        session = backend.open(folder / graph.file, graph, target.device, threads, None)
        load = time.perf_counter() - begin
        stage = stages.get(name, manifest.model.stages[0])
        batch = images * (2 if graph.kind == "denoiser" and stage.guidance.kind == "cfg" else 1)
        inputs = _inputs(graph, stage, cascade.sizes(manifest.model), batch)
        calls = [_seconds(session, inputs) for _ in range(repeats + 1)]
        sessions[name] = session
        graphs[name] = {
            "batch": batch,
            "load_seconds": load,
            "first_seconds": calls[0],
            "seconds": median(calls[1:]),
            "best_seconds": min(calls[1:]),
        }
    progress("timing an image", len(graphs) / (len(graphs) + 1))
    pipeline = Pipeline(manifest.model, folder, sessions.__getitem__)
    _warm(pipeline, images)
    return {
        "target": manifest.target,
        "precision": manifest.precision,
        "threads": threads,
        "images": images,
        "repeats": repeats,
        "graphs": graphs,
        **_image(pipeline, images),
        **({} if pipeline.fps is None else {"frames": manifest.model.stages[-1].sample[1]}),
    }


def _warm(pipeline: Pipeline, images: int) -> None:
    """Go each graph's way once with the shapes of the request that is timed: a new shape may cost a compilation."""
    model = pipeline.model
    request = example.request(model, example.one(model), images=images)
    if len(cascade.ways(model.stages)) > 1:
        *_, step = pipeline.generate(replace(request, steps=cascade.few(model.stages, FEWEST)))
    else:
        step = next(pipeline.generate(request))
    pipeline.decode(step.sample)


def _image(pipeline: Pipeline, images: int) -> dict[str, Any]:
    """Time one request, from its prompt to its pixels, and the steps in it."""
    request = example.request(pipeline.model, example.one(pipeline.model), images=images)
    begin = time.perf_counter()
    ends, sample = [], np.zeros(0)
    for step in pipeline.generate(request):
        ends.append(time.perf_counter())
        sample = step.sample
    pipeline.decode(sample)
    whole = time.perf_counter() - begin
    # The first step's time holds the text graph's too.
    steps = [after - before for before, after in pairwise(ends)] or [ends[0] - begin]
    return {"steps": len(ends), "step_seconds": median(steps), "image_seconds": whole}


def _inputs(graph: Graph, stage: Stage, sizes: Mapping[str, int], batch: int) -> Mapping[str, Array]:
    """Inputs of the right shapes whose values a model can see in use; speed does not depend on them further."""
    random = np.random.default_rng(0)
    free = {"batch": batch, **sizes, **{name: few[0] for name, few in graph.sizes.items()}}
    scales = {hint.scale: hint.default for hint in stage.hints}
    pictures = ("image", *(hint.input for hint in stage.hints))
    inputs: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [free[side] if isinstance(side, str) else side for side in tensor.shape]
        if tensor.name == "guidance":
            inputs[tensor.name] = np.full(shape, stage.guidance.scale, tensor.dtype)
        elif tensor.name in scales:
            inputs[tensor.name] = np.full(shape, scales[tensor.name], tensor.dtype)
        elif tensor.name == "timestep":
            inputs[tensor.name] = np.full(shape, 500, tensor.dtype)
        elif np.issubdtype(np.dtype(tensor.dtype), np.integer):
            inputs[tensor.name] = np.zeros(shape, tensor.dtype)
        elif tensor.name in pictures:
            inputs[tensor.name] = random.random(shape).astype(tensor.dtype)
        else:
            inputs[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
    if graph.kind == "denoiser":
        inputs |= constants(stage, graph, (free["image_height"], free["image_width"]), batch)
    return inputs


def _seconds(session: Session, inputs: Mapping[str, Array]) -> float:
    """The seconds that one call of ``session`` takes."""
    begin = time.perf_counter()
    run_batched(session, inputs)
    return time.perf_counter() - begin
