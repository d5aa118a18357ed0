"""The gate: a bundle is compared with the torch model in fp32, and is built only if it is inside its band.

The torch model goes once through the same pipeline as a device will, one graph in memory at a time, and every call of
a graph is recorded. Then each bundle is asked three things: does each graph alone give the same on the recorded inputs
(so at every timestep of the run), do the latents of a free run stay together step by step, and is the image the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import reference
from exporter.checkpoint import Checkpoint
from runtimes import cascade, example, subject
from runtimes.accuracy import BANDS, Agreement, compare, psnr, ssim
from runtimes.accuracy import band as band_of
from runtimes.errors import DexportError, GateError, Progress, silent
from runtimes.manifest import Graph, Model
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.safetensors import write
from runtimes.session import Session, run_batched

Array = NDArray[Any]
STEPS = 6  # of each way of the free run: enough timesteps to see drift, few enough for a large model on a CPU


@dataclass(frozen=True)
class Call:
    """One recorded call of a graph."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Reference:
    """What the torch model gives in fp32: calls by graph, the free run's latents after each step, and the image."""

    request: Request
    calls: Mapping[str, tuple[Call, ...]]
    latents: tuple[Array, ...]
    image: Array


@dataclass(frozen=True)
class Proof:
    """What the manifest records of a bundle's agreement; its image and seconds a model call, where it was run."""

    accuracy: Mapping[str, Any]
    image: Array | None
    seconds: float | None


class TorchSession:
    """A graph's torch module behind the session protocol; every call is kept in ``calls``."""

    max_batch: int | None = None

    def __init__(
        self, checkpoint: Checkpoint, name: str, graph: Graph, calls: list[Call], size: tuple[int, int] | None = None
    ) -> None:
        """Load the reference module of graph ``name``, for pictures of a size in pixels or of the checkpoint's own."""
        self._module = reference.load(checkpoint, name, size)
        self._name = name
        self._graph = graph
        self._calls = calls

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the module in fp32 and record the call."""
        import torch

        try:
            with torch.inference_mode():
                result = self._module(*(torch.from_numpy(inputs[tensor.name]) for tensor in self._graph.inputs))
        except IndexError as error:
            labels = inputs.get("labels")
            what = "does not run" if labels is None else f"does not take the label {labels.max()}"
            raise DexportError(f"the torch model of graph {self._name} {what} ({error})") from error
        values = result if isinstance(result, tuple) else (result,)
        outputs = {tensor.name: value.numpy() for tensor, value in zip(self._graph.outputs, values, strict=True)}
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise DexportError(
                    f"the torch model itself gives NaN or infinity for {name!r} of graph {self._name}, in fp32; the "
                    "checkpoint is damaged or its training diverged"
                )
        self._calls.append(Call(dict(inputs), outputs))
        return outputs


def one_at_a_time(load: Callable[[str], Session]) -> Callable[[str], Session]:
    """Return an opener that lets go of a graph before it opens the next: memory for the largest is enough."""
    opened: dict[str, Session] = {}

    def open_graph(name: str) -> Session:
        if name not in opened:
            opened.clear()
            opened[name] = load(name)
        return opened[name]

    return open_graph


def record(checkpoint: Checkpoint, model: Model, hub: Path, progress: Progress = silent) -> Reference:
    """Run the torch model through the pipeline and keep all that the gate compares with."""
    calls: dict[str, list[Call]] = {name: [] for name in model.graphs}
    last = model.stages[-1]
    size = (last.sample[1] * last.factor, last.sample[2] * last.factor)
    open_graph = one_at_a_time(lambda name: TorchSession(checkpoint, name, model.graphs[name], calls[name], size))
    request = example.request(model, example.one(model), steps=cascade.few(model.stages, STEPS))
    pipeline = Pipeline(model, hub, open_graph)
    latents = []
    for step in pipeline.generate(request):
        progress(f"reference: step {step.index + 1}/{step.total}", step.index / (step.total + 1))
        latents.append(step.sample)
    image = pipeline.decode(latents[-1])
    encoder = cascade.main(model.stages)[0].encoder
    if encoder is not None:
        open_graph(encoder).run({"image": image})
    progress("reference: done", 1.0)
    return Reference(request, {name: tuple(kept) for name, kept in calls.items()}, tuple(latents), image)


def write_golden(reference_: Reference, file: Path) -> None:
    """Write one call of each graph, one row of its batch, as the device's self-test."""
    tensors = {}
    for name, calls in reference_.calls.items():
        call = calls[len(calls) // 2]  # of a denoiser: in the middle of the trajectory
        for side, values in (("inputs", call.inputs), ("outputs", call.outputs)):
            for tensor, value in values.items():
                tensors[f"{name}/{side}/{tensor}"] = value[-1:]
    write(file, tensors)


def prove(
    reference_: Reference,
    model: Model,
    folder: Path,
    precision: str,
    open_graph: Callable[[str], Session],
    progress: Progress = silent,
) -> Proof:
    """Compare the graphs that ``open_graph`` gives with the reference; GateError if any is outside the band."""
    band = BANDS[precision]
    graphs: dict[str, Any] = {}
    failures, seconds = [], []
    for index, (name, calls) in enumerate(sorted(reference_.calls.items())):
        progress(f"gate: {name}", index / (len(reference_.calls) + 1))
        session = open_graph(name)
        least = band_of(model.graphs[name], precision).graph
        found = []
        for call in calls:
            begin = time.perf_counter()
            outputs = run_batched(session, call.inputs)
            if model.graphs[name].kind == "denoiser":
                seconds.append(time.perf_counter() - begin)
            for tensor, expected in call.outputs.items():
                agreement = compare(expected, outputs[tensor])
                found.append(_record(tensor, call, agreement))
                if not agreement.sqnr_db >= least:  # so that NaN fails
                    failures.append(
                        f"graph {name}{_at(call)}: SQNR {agreement.sqnr_db:.1f} dB, at least {least:g} are needed"
                    )
        graphs[name] = found
        del session  # or it would stand in memory beside the next one, while that is opened
    if failures:  # a free run of broken graphs says no more, and may end in NaN
        raise _failed(precision, failures)
    progress("gate: free run", len(reference_.calls) / (len(reference_.calls) + 1))
    pipeline = Pipeline(model, folder, open_graph)
    steps = [step.sample for step in pipeline.generate(reference_.request)]
    drift = [compare(expected, actual).sqnr_db for expected, actual in zip(reference_.latents, steps, strict=True)]
    image = pipeline.decode(steps[-1])
    quality = psnr(reference_.image, image)
    if not drift[-1] >= band.latents:
        failures.append(f"last latents: SQNR {drift[-1]:.1f} dB, at least {band.latents:g} are needed")
    if not quality >= band.image:
        failures.append(f"image: PSNR {quality:.1f} dB, at least {band.image:g} are needed")
    if failures:
        raise _failed(precision, failures)
    accuracy = {
        "gate": "passed",
        "reference": "torch fp32",
        **subject.settings(model, reference_.request, 0),
        "steps": reference_.request.steps,
        "band": asdict(band),
        "graphs": graphs,
        "latents_sqnr_db": [round(value, 2) for value in drift],
        "image": {"psnr_db": round(quality, 2), "ssim": round(ssim(reference_.image, image), 6)},
    }
    return Proof(accuracy, image, float(np.median(seconds)))


def not_run(why: str) -> Proof:
    """The proof that is owed where the engine cannot run on the machine that builds it."""
    return Proof({"gate": "not run", "why": why, "next": "run `dexport verify` on the device"}, None, None)


def _failed(precision: str, failures: list[str]) -> GateError:
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return GateError(f"the gate for {precision} failed: {failures[0]}{more}; this bundle was not written; try fp32")


def _at(call: Call) -> str:
    return f" at timestep {call.inputs['timestep'][0]:g}" if "timestep" in call.inputs else ""


def _record(tensor: str, call: Call, agreement: Agreement) -> dict[str, Any]:
    """One comparison, rounded so that a manifest does not change with the last bits of a sum."""
    place = {"timestep": float(call.inputs["timestep"][0])} if "timestep" in call.inputs else {}
    return place | {
        "output": tensor,
        "max_abs": float(f"{agreement.max_abs:.3g}"),
        "relative": float(f"{agreement.relative:.3g}"),
        "sqnr_db": round(agreement.sqnr_db, 2),
    }
