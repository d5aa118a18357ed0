"""The gate: a bundle follows what diffusers' own pipeline did, within its bands, or it is not built.

The reference is recorded once (``exporter.record``). Then each bundle is asked: does each graph alone give what the
torch module gave, at the timesteps that were recorded; do the latents of free runs stay with diffusers' own, step by
step, at default settings and at others, from noise and from an image; and is the image the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import pieces, spread
from exporter.checkpoint import Checkpoint
from exporter.record import Call, Case, Reference, size
from exporter.spread import Limits
from runtimes import cascade, subject, verify
from runtimes.accuracy import Agreement, compare, psnr, ssim
from runtimes.errors import GateError, Progress, silent
from runtimes.manifest import Bands, Model, SelfTest
from runtimes.pipeline import Pipeline
from runtimes.session import Session, run_batched

Array = NDArray[Any]


@dataclass(frozen=True)
class Proof:
    """What the manifest records of a bundle's agreement; its image and seconds a model call, where it was run."""

    accuracy: Mapping[str, Any]
    image: Array | None
    seconds: float | None


def self_test(reference: Reference, model: Model, limits: Limits) -> SelfTest:
    """What a device is to run, and how near to the golden values it must come."""
    bands = Bands(
        {name: least[golden(reference.calls[name])] for name, least in limits.calls.items()}, limits.latents
    )  # fmt: skip
    request = reference.request
    steps = cascade.few(model.stages, 1) if request.steps is None else request.steps
    by_name = dict(steps) if isinstance(steps, Mapping) else {cascade.main(model.stages)[0].name: steps}
    begun = request.strength if cascade.main(model.stages)[0].strength is not None else None
    return SelfTest(reference.subject, by_name, bands, begun)


def write_golden(reference: Reference, file: Path) -> None:
    """Write the golden values of the self-test: a call of each graph, and the run at default settings."""
    chosen = {name: calls[golden(calls)] for name, calls in reference.calls.items()}
    calls = {name: (call.inputs, call.outputs) for name, call in chosen.items()}
    verify.write_golden(file, calls, reference.tokens, reference.cases[0].latents)


def golden(calls: Sequence[Call]) -> int:
    """Which of a graph's calls is the golden one.

    A text graph's is that of the prompt, which comes before the negative one; a denoiser's lies on the way.
    """
    return 1 if "timestep" in calls[0].inputs and len(calls) > 1 else 0


def prove(
    reference: Reference,
    model: Model,
    folder: Path,
    precision: str,
    limits: Limits,
    open_graph: Callable[[str], Session],
    progress: Progress = silent,
) -> Proof:
    """Compare the graphs that ``open_graph`` gives with the reference; GateError if any is outside its band."""
    total = len(reference.calls) + len(reference.cases)
    graphs: dict[str, Any] = {}
    failures, seconds = [], []
    opener = _Opener(model, open_graph)
    denoisers = [name for name, graph in model.graphs.items() if graph.kind == "denoiser"]
    # The denoiser comes last: all runs can then go on with it, as the others' outputs are known.
    for index, (name, calls) in enumerate(sorted(reference.calls.items(), key=lambda one: one[0] in denoisers)):
        progress(f"gate: {name}", index / total)
        session = opener(name)
        found = []
        for call, least in zip(calls, limits.calls[name], strict=True):
            begin = time.perf_counter()
            outputs = run_batched(session, call.inputs)
            if name in denoisers:
                seconds.append(time.perf_counter() - begin)
            for tensor, expected in call.outputs.items():
                agreement = compare(expected, outputs[tensor])
                found.append(_record(tensor, call, agreement) | {"least_db": least})
                if not agreement.sqnr_db >= least:  # so that NaN fails
                    failures.append(
                        f"graph {name}{_at(call)}: SQNR {agreement.sqnr_db:.1f} dB, at least {least:.1f} are needed"
                    )
        graphs[name] = found
        del session  # or it would stand in memory beside the next one, while that is opened
    if failures:  # a free run of broken graphs says no more, and may end in NaN
        raise _failed(precision, failures)
    pipeline = Pipeline(model, folder, opener)
    tokens = verify.prompt_tokens(pipeline.prompts, model.stages, reference.request)
    for name, ids in reference.tokens.items():
        if not np.array_equal(ids, tokens.get(name, ())):
            raise _failed(
                precision,
                [f"the tokens of {reference.subject!r}, or of unusual words, for {name} are not the reference's"],
            )
    cases: dict[str, Any] = {}
    latents: Array | None = None  # of the first case
    image: Array | None = None
    for index, case in enumerate(reference.cases):
        progress(f"gate: {case.name}", (len(reference.calls) + index) / total)
        drift, end = _follow(pipeline, case)
        latents = end if latents is None else latents
        if index == min(1, len(reference.cases) - 1):
            # Here, since the denoiser is let go of: what follows runs without guidance, so in another batch, and two
            # of its shapes would stand in memory at once.
            image = pipeline.decode(latents, reference.request)
        cases[case.name] = drift
        for step, sqnr in enumerate(drift, 1):
            if not sqnr >= limits.latents:
                what = f"{case.name}, latents after step {step}"
                failures.append(f"{what}: SQNR {sqnr:.1f} dB, at least {limits.latents:.1f} are needed")
    assert image is not None
    quality = psnr(reference.image, image)
    if not quality >= limits.image:
        failures.append(f"image: PSNR {quality:.1f} dB, at least {limits.image:.1f} are needed")
    if failures:
        raise _failed(precision, failures)
    accuracy = {
        "gate": "passed",
        "reference": reference.oracle,
        **({"not compared": dict(reference.left)} if reference.left else {}),
        **subject.settings(model, reference.request, 0),
        "steps": reference.request.steps,
        "band": {"latents": limits.latents, "image": limits.image},
        "graphs": graphs,
        "latents_sqnr_db": cases,
        "image": {"psnr_db": round(quality, 2), "ssim": round(ssim(reference.image, image), 6)},
    }
    return Proof(accuracy, image, min(seconds))  # a session's first call takes longer


def prove_hub(
    checkpoint: Checkpoint, reference: Reference, model: Model, hub: Path, progress: Progress = silent
) -> None:
    """Compare the exported graphs in fp32 with the torch model; GateError if one is not what was exported.

    In fp32 a fault of the export is seen that the noise of a narrower precision would hide.
    """
    for index, (name, calls) in enumerate(sorted(reference.calls.items())):
        progress(f"gate: {name} in fp32", index / len(reference.calls))
        call, graph = calls[golden(calls)], model.graphs[name]
        least = spread.least_in_fp32(checkpoint, name, graph, call, size(model))
        one_row = {tensor: np.ascontiguousarray(value[-1:]) for tensor, value in call.inputs.items()}
        outputs = pieces.run(hub / graph.file, one_row)
        for tensor, expected in call.outputs.items():
            found = compare(expected[-1:], outputs[tensor]).sqnr_db
            if not found >= least:
                raise GateError(
                    f"the exported graph {name} is not the torch model: SQNR {found:.1f} dB in fp32{_at(call)}, at "
                    f"least {least:.1f} are needed; nothing was written: please report it with the checkpoint's "
                    "configuration"
                )


class _Opener:
    """Opens graphs for runs that share much: but for denoisers, what a graph gave is not computed again."""

    def __init__(self, model: Model, open_graph: Callable[[str], Session]) -> None:
        self._model, self._open = model, open_graph
        self._known: dict[tuple[Any, ...], dict[str, Array]] = {}

    def __call__(self, name: str) -> Session:
        return (
            self._open(name) if self._model.graphs[name].kind == "denoiser" else _Known(name, self._open, self._known)
        )


class _Known:
    """A session that is opened only for inputs that are new, to the last bit."""

    max_batch: int | None = None

    def __init__(
        self, name: str, open_graph: Callable[[str], Session], known: dict[tuple[Any, ...], dict[str, Array]]
    ) -> None:
        self._name, self._open, self._known = name, open_graph, known

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        key = (self._name, *((name, value.shape, value.tobytes()) for name, value in sorted(inputs.items())))
        if key not in self._known:
            self._known[key] = run_batched(self._open(self._name), inputs)
        return self._known[key]


def _follow(pipeline: Pipeline, case: Case) -> tuple[list[float], Array]:
    """The SQNR in dB of a case's latents after each step of a free run, and the last ones."""
    steps = [step.sample for step in pipeline.generate(case.request)]
    drift = [round(compare(expected, actual).sqnr_db, 2) for expected, actual in zip(case.latents, steps, strict=True)]
    return drift, steps[-1]


def not_run(reference: Reference, why: str) -> Proof:
    """The proof that is owed where the engine cannot run on the machine that builds it."""
    owed = {"gate": "not run", "why": why, "next": "run `dexport verify` on the device", "reference": reference.oracle}
    return Proof(owed, None, None)


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
