"""The self-test of a bundle: on any device, the proof that it was published with.

``golden.safetensors`` holds what the original model gave: for each graph one call, and for a short run the tokens of
its prompt and the latents after each step. Graphs are tested one by one, so that a fault has a place; the run is the
whole pipeline, with the manifest's sampler, guidance and tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import example
from runtimes.accuracy import EXACT_DB, Agreement, compare
from runtimes.bundle import GOLDEN, load_manifest
from runtimes.errors import IntegrityError, Progress, silent
from runtimes.manifest import Model, SelfTest, Stage, Tensor
from runtimes.pipeline import Pipeline
from runtimes.prompts import Prompts
from runtimes.request import Request
from runtimes.safetensors import Entry, read_header, write
from runtimes.session import Array, Session, one_at_a_time, require, run_batched
from runtimes.target import Target

SAME, OTHER = Agreement(0.0, 0.0, EXACT_DB, True), Agreement(float("inf"), float("inf"), -EXACT_DB, True)
# What tokenizers treat in ways of their own: capitals, accents, composed or not, digits, signs, two spaces.
ODD = "A Dog's  CAT, naïve café e\u0301: 3.50 £, 1/2 & #7 № 東京 🍎 isn't it?"
RUN = "run"  # what a check calls the short run, in place of a graph


@dataclass(frozen=True)
class Check:
    """One output of one graph, or what the short run came to, against the golden values."""

    graph: str
    output: str
    agreement: Agreement
    least_db: float

    @property
    def passed(self) -> bool:
        """Whether the output is finite and inside the band of the bundle's precision."""
        return self.agreement.finite and self.agreement.sqnr_db >= self.least_db


def golden_request(model: Model, test: SelfTest) -> Request:
    """What the short run of a self-test was asked for."""
    settings: dict[str, Any] = {"steps": dict(test.steps)}
    if test.strength is None:
        return example.request(model, test.subject, **settings)
    return example.from_image(model, test.subject, strength=test.strength, **settings)


def prompt_tokens(prompts: Prompts, stages: Sequence[Stage], request: Request) -> dict[str, Array]:
    """The ids of a request's prompts and of ``ODD`` by the text graphs' inputs, int64 [B + 1, chunks * length]."""
    found: dict[str, Array] = {}
    for stage in stages:
        if stage.text is not None:
            ids = prompts.tokenize(stage, [*request.prompts, ODD], weighted=request.prompt_weights).ids
            found |= {name: row.reshape(len(row), -1) for name, row in ids.items()}
    return found


def write_golden(
    file: Path, calls: Mapping[str, tuple[Mapping[str, Array], Mapping[str, Array]]], tokens: Mapping[str, Array],
    latents: Sequence[Array],
) -> None:  # fmt: skip
    """Write the golden values: inputs and outputs of one call of each graph, and the tokens and latents of the run.

    Of a call the last row of its batch is kept.
    """
    tensors = {
        _place(graph, side, name): value[-1:]
        for graph, call in calls.items()
        for side, values in zip(("inputs", "outputs"), call, strict=True)
        for name, value in values.items()
    }
    tensors |= {_place(RUN, "tokens", name): value for name, value in tokens.items()}
    tensors |= {_place(RUN, "latents", str(i)): value.astype(np.float32) for i, value in enumerate(latents)}
    write(file, tensors)


def _place(owner: str, side: str, name: str) -> str:
    return f"{owner}/{side}/{name}"


def verify(
    folder: Path | str, *, threads: int | None = None, cache: Path | None = None, progress: Progress = silent
) -> list[Check]:
    """Check a bundle's files, then run each graph on its golden inputs and the short run, here, on this device.

    The expected values are the original model's in fp32, so this is the proof on the device itself. Returns one
    ``Check`` for each output of a graph, each tokenizer and each step of the run; an empty list where the bundle has no
    golden values.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, progress=lambda what, share: progress(what, share / 3))
    if manifest.self_test is None:
        return []
    bands = manifest.self_test.bands
    entries = read_header(folder / GOLDEN)
    target = Target.parse(manifest.target)
    runtime = require(target.backend)
    graphs = manifest.model.graphs

    def load(name: str) -> Session:
        return runtime.open(folder / graphs[name].file, graphs[name], target.device, threads, cache)

    open_graph = one_at_a_time(load)
    checks = []
    for index, (name, graph) in enumerate(sorted(graphs.items())):
        progress(f"running {name}", 1 / 3 + index / len(graphs) / 3)
        inputs = {tensor.name: _golden(entries, _place(name, "inputs", tensor.name), tensor) for tensor in graph.inputs}
        outputs = run_batched(open_graph(name), inputs)
        for tensor in graph.outputs:
            expected = _golden(entries, _place(name, "outputs", tensor.name), tensor)
            agreement = compare(expected, outputs[tensor.name])
            checks.append(Check(name, tensor.name, agreement, bands.graphs[name]))
    pipeline = Pipeline(manifest.model, folder, open_graph)
    checks += _run(pipeline, manifest.self_test, entries, lambda what, at: progress(what, (2 + at) / 3))
    progress("done", 1.0)
    return checks


def _run(pipeline: Pipeline, test: SelfTest, entries: Mapping[str, Entry], progress: Progress) -> list[Check]:
    """The short run: its tokens, which must be the golden ones, and its latents after each step."""
    model, checks = pipeline.model, []
    request = golden_request(model, test)
    for name, ids in prompt_tokens(pipeline.prompts, model.stages, request).items():
        expected = _golden(entries, _place(RUN, "tokens", name), Tensor(name, "int64", ids.shape))
        is_same = np.array_equal(expected, ids)
        checks.append(Check(RUN, f"tokens of {name}", SAME if is_same else OTHER, EXACT_DB))
    for step in pipeline.generate(request):
        progress(f"step {step.index + 1}/{step.total}", (step.index + 1) / step.total)
        wanted = Tensor("latents", "float32", step.sample.shape)
        expected = _golden(entries, _place(RUN, "latents", str(step.index)), wanted)
        agreement = compare(expected, step.sample)
        checks.append(Check(RUN, f"latents after step {step.index + 1}", agreement, test.bands.latents))
    return checks


def _golden(entries: Mapping[str, Entry], name: str, tensor: Tensor) -> Array:
    """Read a golden tensor; IntegrityError unless it is there, finite, and of the tensor's type and shape."""
    if name not in entries:
        raise IntegrityError(f"{GOLDEN}: it has no tensor {name!r}; build the bundle anew")
    entry = entries[name]
    fits = len(entry.shape) == len(tensor.shape) and all(
        size > 0 and (isinstance(wanted, str) or size == wanted)
        for size, wanted in zip(entry.shape, tensor.shape, strict=True)
    )
    value = entry.load()
    if not fits or value.dtype != tensor.dtype:
        raise IntegrityError(
            f"{GOLDEN}: {name!r} is {value.dtype} {list(entry.shape)} where {tensor.dtype} {list(tensor.shape)} is "
            "wanted; build the bundle anew"
        )
    if not entry.finite():
        raise IntegrityError(f"{GOLDEN}: {name!r} holds NaN or infinity; build the bundle anew")
    return value
