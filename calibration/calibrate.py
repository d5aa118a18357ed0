"""Calibration: run the hub's own pipeline on real prompts and observe what goes through its denoiser.

The run is the deployed one, with its sampler, all its timesteps and its guidance, seeded; with and without the prompt
are two calls, so that each call's range belongs to one prompt and one timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from calibration import observe, scores
from calibration import prompts as own
from calibration.layers import find
from calibration.observe import Observer, Statistics
from calibration.recipe import candidates
from calibration.split import split
from runtimes import example
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Model
from runtimes.pipeline import Pipeline
from runtimes.session import Session, require

MOST_STEPS = 100  # a chain of 1000 goes over the same noise levels again and again


def calibrate(
    model: Model,
    hub: Path,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Statistics:
    """Observe the denoiser of a hub on ``prompts``; prompt i starts from the noise of ``seed`` + i.

    ``prompts``: some of ours by default. ``steps``: of the sampler, the model's own by default, but at most
    ``MOST_STEPS``; fewer are faster and still go over all noise levels.
    """
    require("onnxruntime")
    name = model.stages[0].denoiser
    graph = model.graphs[name]
    stage = model.stages[0]
    steps = steps or min(stage.steps, MOST_STEPS)
    if prompts is None:
        prompts = own.defaults(model)[0]
    elif stage.text is not None:
        own.check(list(prompts), "the prompts")
    observed, values = instrument(hub / graph.file)
    watched = observe.watched_graph(graph, list(values))
    opened: dict[str, Session] = {}

    def open_graph(wanted: str) -> Session:
        if wanted not in opened:
            opened[wanted] = OnnxRuntimeSession(hub / model.graphs[wanted].file, model.graphs[wanted], None)
        return opened[wanted]

    progress("calibration: opening the denoiser", 0.0)
    inner = OnnxRuntimeSession(hub / graph.file, watched, None, content=ir.to_proto(observed).SerializeToString())
    del observed
    observer = Observer(inner, graph, list(values))
    opened[name] = observer
    pipeline = Pipeline(model, hub, open_graph)
    for index, prompt in enumerate(prompts):
        observer.prompt = prompt
        request = example.request(model, prompt, steps=steps, seed=seed + index, guidance_batch="sequential")
        for step in pipeline.generate(request):
            done = (index + (step.index + 1) / step.total) / len(prompts)
            progress(f"calibration: prompt {index + 1}/{len(prompts)}, step {step.index + 1}/{step.total}", done)
    settings = {
        "steps": steps, "seed": seed, "guidance": stage.guidance.scale,
        "sampler": stage.scheduler["_class_name"], "prompts": list(prompts),
    }  # fmt: skip
    return observer.statistics(source(model, hub), settings)


def instrument(file: Path) -> tuple[ir.Model, dict[str, int]]:
    """The graph as it will be quantized, with reductions; and what is observed: value name to axis of channels."""
    model, _ = split(ir.load(file))
    free, left = candidates(model)
    if not free:
        why = next((f" ({name}: {reason})" for name, reason in left.items()), "")
        raise DexportError(f"{file}: no layer of it can be quantized{why}; build it in another precision")
    layers, _ = find(model)
    values = {str(layer.input.name): layer.channel for layer in layers}
    for layer in layers:
        if layer.kind == "conv":  # whose kernels in some runtimes give 8-bit numbers
            values.setdefault(str(layer.output.name), layer.channel)
    for one in scores.find(model, layers):
        values |= {str(value.name): scores.CHANNEL for value in one.operands}
    model, _ = observe.watch(model, values)
    return model, values


def source(model: Model, hub: Path) -> str:
    """The hash that statistics of this hub's denoiser carry."""
    file = hub / model.graphs[model.stages[0].denoiser].file
    return observe.hash_graph(file, [path for path in [file.with_name(f"{file.name}.data")] if path.exists()])
