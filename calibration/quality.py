"""How good a quantized model's pictures are: against the float model's, at the same seeds.

The float model is the hub in fp32 on ONNX Runtime, which the gate has shown to be the torch model's equal to 100 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.prompts import JUDGED
from runtimes import example, samplers
from runtimes.accuracy import compare, psnr
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Model
from runtimes.pipeline import Pipeline
from runtimes.session import Session, run_batched

Array = NDArray[Any]
STEPS = 10  # model calls a picture, at most: enough for errors to add up
SEED = 1_000  # far from the seeds of a calibration


@dataclass(frozen=True)
class Budget:
    """What quality a quantized model must reach: the median PSNR of its pictures in dB."""

    psnr: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``psnr=36``."""
        name, _, value = str(text).partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if name.strip().lower() != "psnr" or not 0 < number < 200:
            raise DexportError(f"{text!r} is no budget; give the pictures' least median PSNR in dB, like psnr=36")
        return cls(number)


@dataclass(frozen=True)
class Judged:
    """What the float model gave: pictures by prompt; of the first one each denoiser call, and the latents by step."""

    prompts: tuple[str, ...]
    steps: int
    pictures: tuple[Array, ...]
    calls: tuple[tuple[dict[str, Array], Array], ...]
    latents: tuple[Array, ...]


@dataclass(frozen=True)
class Quality:
    """PSNR of each picture in dB; SQNR in dB of the denoiser's output at each call, on the float model's inputs, and of
    the latents after each step of a free run, where errors add up.
    """

    psnr: tuple[float, ...]
    sqnr: tuple[float, ...]
    latents: tuple[float, ...]

    @property
    def median(self) -> float:
        """The pictures' median PSNR in dB."""
        return float(np.median(self.psnr))


class Recorder:
    """A session that keeps the inputs and the output of its calls while ``on``."""

    def __init__(self, inner: Session) -> None:
        self.max_batch = inner.max_batch
        self.on = True
        self.calls: list[tuple[dict[str, Array], Array]] = []
        self._inner = inner

    def run(self, inputs: Any) -> dict[str, Array]:
        """Run, and keep the call."""
        outputs = run_batched(self._inner, inputs)
        if self.on:
            self.calls.append((dict(inputs), outputs["output"]))
        return outputs


def draw_float(
    model: Model, hub: Path, prompts: Sequence[str] = JUDGED, progress: Progress = silent, steps: int | None = None
) -> Judged:
    """Draw ``prompts`` with the hub in fp32; ``steps``: the model's own, but at most ``STEPS``, by default."""
    name = model.stages[0].denoiser
    recorder: list[Recorder] = []

    def load(wanted: str) -> Session:
        session = OnnxRuntimeSession(hub / model.graphs[wanted].file, model.graphs[wanted], None)
        if wanted != name:
            return session
        recorder.append(Recorder(session))
        return recorder[0]

    steps = steps or samplers.listed(model.stages[0].scheduler) or min(STEPS, model.stages[0].steps)
    pictures, latents = _draw(model, hub, load, prompts, steps, progress, recorder)
    return Judged(tuple(prompts), steps, tuple(pictures), tuple(recorder[0].calls), tuple(latents))


def judge(
    judged: Judged, model: Model, folder: Path, load: Callable[[str], Session], progress: Progress = silent
) -> Quality:
    """Compare the graphs that ``load`` gives by name with the float model."""
    load = memoize(load)
    pictures, latents = _draw(model, folder, load, judged.prompts, judged.steps, progress, [])
    denoiser = load(model.stages[0].denoiser)
    sqnr = tuple(compare(output, run_batched(denoiser, inputs)["output"]).sqnr_db for inputs, output in judged.calls)
    found = tuple(psnr(a, b) for a, b in zip(judged.pictures, pictures, strict=True))
    drift = tuple(compare(a, b).sqnr_db for a, b in zip(judged.latents, latents, strict=True))
    return Quality(found, sqnr, drift)


def _draw(
    model: Model, folder: Path, load: Callable[[str], Session], prompts: Sequence[str], steps: int,
    progress: Progress, recorder: list[Recorder],
) -> tuple[list[Array], list[Array]]:  # fmt: skip
    """The pictures of ``prompts``, one after the other, and the first one's latents; only its calls are recorded."""
    pipeline, pictures = Pipeline(model, folder, memoize(load)), []
    latents: list[Array] = []
    for index, prompt in enumerate(prompts):
        request = example.request(model, prompt, steps=steps, seed=SEED + index, guidance_batch="sequential")
        for step in pipeline.generate(request):
            done = (index + (step.index + 1) / step.total) / len(prompts)
            progress(f"picture {index + 1}/{len(prompts)}, step {step.index + 1}/{step.total}", done)
            if index == 0:
                latents.append(step.sample)
        pictures.append(pipeline.decode(step.sample))
        if recorder:
            recorder[0].on = False
    return pictures, latents
