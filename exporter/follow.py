"""Our pipeline on the way of a run of diffusers' own: what it must come to at each step, and what parts first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.oracle_run import Run
from runtimes import cascade, loop, samplers
from runtimes.accuracy import compare, psnr
from runtimes.errors import GateError, Progress
from runtimes.manifest import Model, Stage
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import Session

Array = NDArray[Any]
# What our reading must reach against diffusers' in fp32, in dB. Both round to float32 at every step, and some of
# diffusers' schedulers lose digits in it: the samples of the two are 60 dB apart at worst, and 110 as a rule.
SAMPLES, OUTPUTS, IMAGES = 55.0, 60.0, 45.0
TIMESTEP = 0.02  # the largest difference of two timesteps, where some are interpolated in float32


class Following(Pipeline):
    """Our pipeline on diffusers' way: its loop is given diffusers' outputs, and must come to diffusers' samples."""

    def __init__(
        self, model: Model, folder: Path, open_graph: Callable[[str], Session], run: Run, whose: str,
        evaluated: Sequence[float],
    ) -> None:  # fmt: skip
        """Follow ``run``; ``whose``: what an error calls it; ``evaluated``: which of a stage's calls are made."""
        super().__init__(model, folder, open_graph)
        self._run, self._whose, self._done, self._evaluated = run, whose, 0, evaluated

    def follow(self, request: Request, progress: Progress) -> tuple[tuple[Array, ...], Array | None]:
        """The samples after each step as our loop has them, and diffusers' image. GateError where the two part."""
        steps, run = [], self._run
        self._check_size(request)
        self._check_timesteps(request)
        for step in self.generate(request):
            progress(f"reference: step {step.index + 1}/{step.total}", step.index / (step.total + 1))
            steps.append(step.sample)
        last = run.laid_out(run.latents, steps[-1].shape)
        self._compare("the latents", last, steps[-1], SAMPLES)
        if run.image is None or last is None:
            return tuple(steps), None
        mine = self.decode(last, request)
        theirs = np.broadcast_to(run.image, mine.shape)  # grey images have one channel
        if not psnr(theirs, mine) >= IMAGES:
            raise self._parted("the decoded image", f"{psnr(theirs, mine):.1f} dB PSNR")
        return tuple(steps), np.array(theirs)

    def _check_size(self, request: Request) -> None:
        mine, theirs = self._pixels(request), self._run.size
        if mine != theirs:
            raise self._parted(
                "the size of the image", f"{mine[0]}x{mine[1]} where diffusers has {theirs[0]}x{theirs[1]}"
            )

    def _check_timesteps(self, request: Request) -> None:
        mine = [
            row.t
            for _, runs in self.tables(request)
            for run in runs
            for _, table in run
            for row in table.rows
            if row.calls
        ]
        theirs = [step.t for step in self._run.steps]
        if len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=1e-5, atol=TIMESTEP):
            raise self._parted("the timesteps", f"{_listed(mine)} where diffusers has {_listed(theirs)}")

    def _check_tokens(self, stage: Stage, request: Request) -> None:
        if stage.text is None:
            return
        every = [(request.prompts, False)]
        if request.negative_prompt and stage.guidance.kind == "cfg":
            every.append(([request.negative_prompt], True))
        pads = {spec.input: spec.pad for spec in self.model.tokenizers}
        for prompts, negative in every:
            for name, ids in self.prompts.tokenize(stage, prompts, negative=negative).ids.items():
                for row in ids.reshape(-1, ids.shape[-1]):
                    mine = _trimmed(row, pads[name])
                    if not any(_trimmed(other, pads[name]) == mine for given in self._run.tokens for other in given):
                        near = [_trimmed(other, pads[name]) for given in self._run.tokens for other in given]
                        raise self._parted(
                            "the tokens",
                            f"{_listed(mine)} of {prompts[0]!r:.40} where diffusers has "
                            + " or ".join(_listed(other) for other in near[:3]),
                        )

    def _denoiser(
        self, stage: Stage, request: Request, table: samplers.Table, given: Mapping[str, cascade.Given]
    ) -> loop.Denoiser:
        model = super()._denoiser(stage, request, table, given)
        self._check_tokens(stage, request)
        count = sum(row.calls for row in table.rows)
        evaluated = {round(part * (count - 1)) for part in self._evaluated}
        first = self._done

        def follow(sample: Array, t: float, row: samplers.Row) -> Array:
            number = self._done - first
            step = self._run.steps[self._done]
            self._done += 1
            before = self._run.laid_out(step.before, sample.shape)
            what = "the start" if self._done == 1 else f"the sample of step {self._done}"
            self._compare(what, before, sample / row.scale, SAMPLES)
            theirs = step.output
            if number in evaluated and before is not None:
                mine = model((before * row.scale).astype(np.float32), t, row)
                self._compare(
                    f"output {self._done} (timestep {t:g})",
                    self._run.laid_out(theirs, sample.shape),
                    mine[:, : sample.shape[1]],
                    OUTPUTS,
                )
                twice = mine.shape[1] == 2 * sample.shape[1]
            else:
                twice = theirs.ndim == sample.ndim and theirs.shape[1] == 2 * sample.shape[1]
            if twice and theirs.ndim == sample.ndim:
                return np.asarray(theirs.float().numpy())
            found = self._run.laid_out(theirs, sample.shape)
            assert found is not None
            return found

        return follow

    def _compare(self, what: str, theirs: Array | None, mine: Array, least: float) -> None:
        if theirs is None:
            raise self._parted(what, f"its shape {list(mine.shape)} is another one")
        if not np.isfinite(theirs).all():
            raise GateError(
                f"diffusers' own pipeline ({self._whose}) comes to NaN or infinity: {what}; nothing was written: name "
                "another --sampler, or other options with --scheduler"
            )
        found = compare(theirs, np.asarray(mine))
        if not found.sqnr_db >= least:
            raise self._parted(what, f"{found.sqnr_db:.1f} dB, {least:g} are needed")

    def _parted(self, what: str, how: str) -> GateError:
        return GateError(
            f"our reading of the checkpoint parts from diffusers' own ({self._whose}) in {what}: {how}; nothing was "
            "written: please report it with the checkpoint's configuration"
        )


def _trimmed(ids: Any, pad: int) -> list[int]:
    """Ids without what fills up."""
    found: list[int] = np.asarray(ids).tolist()
    while found and found[-1] == pad:
        found.pop()
    while found and found[0] == pad:
        found.pop(0)
    return found


def _listed(numbers: Sequence[float]) -> str:
    """The first numbers of a list."""
    shown = ", ".join(f"{number:g}" for number in numbers[:8])
    return f"[{shown}{', …' if len(numbers) > 8 else ''}]"
