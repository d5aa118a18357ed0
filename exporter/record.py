"""The reference of a build: what diffusers' own pipeline does, and that our reading of the checkpoint follows it.

diffusers' pipeline runs a few steps of its own ``__call__``. Then our pipeline goes the same way with the torch modules
of our graphs: its loop is given diffusers' outputs, step by step, and must come to the same timesteps and samples; at
some of the steps, at the first and the last among them, the torch modules are called too, and must give the same
output. The first thing in which the two part is the error. The calls of the torch modules are kept: a bundle's graphs
are compared with them one by one.

A model that diffusers has no class for is compared with its own torch modules alone, and its manifest says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import ensemble, oracle, oracle_run, reference
from exporter.checkpoint import Checkpoint
from exporter.families import Shape
from exporter.oracle_run import Run
from exporter.recall import Recall
from runtimes import cascade, example, loop, samplers, subject
from runtimes.accuracy import compare, psnr
from runtimes.errors import DexportError, GateError, Progress, silent
from runtimes.manifest import Graph, Model, Stage
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import Session
from runtimes.verify import prompt_tokens

Array = NDArray[Any]
STEPS = 3  # of each chain of stages at default settings: enough timesteps to see drift, few for a large model on a CPU
RUNGE_KUTTA = 4  # steps are the least for the warm-up of PNDM, as DDPMs have it
FEW = 2  # at other settings
# A start from an image in steps and strength of which no product is whole, since families round it in their own ways.
IMAGE_STEPS, IMAGE_STRENGTH = 3, 0.6
LONG_PROMPT = (
    "an old wooden boat on a calm lake in the morning, mountains behind it in the mist, soft light, highly detailed"
)
NEGATIVE_PROMPT = "blurry, dark"
OTHER_GUIDANCE = 3.0
# What our reading must reach against diffusers' in fp32, in dB. Both round to float32 at every step, and some of
# diffusers' schedulers lose digits in it: the samples of the two are 60 dB apart at worst, and 110 as a rule.
SAMPLES, OUTPUTS, IMAGES = 55.0, 60.0, 45.0
# Which of a stage's calls the torch modules are asked for too, as parts of its way, by the name of the case; else the
# first.
EVALUATED = {"default settings": (0.0, 1.0), "other settings": (1.0,)}
TIMESTEP = 0.02  # the largest difference of two timesteps, where some are interpolated in float32


@dataclass(frozen=True)
class Call:
    """One recorded call of a graph."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """One run of the reference: its name, the request, the latents after each step of our loop, and the image.

    image: [B, 3, H, W], or a video; of the first case alone.
    """

    name: str
    request: Request
    latents: tuple[Array, ...]
    image: Array | None


@dataclass(frozen=True)
class Reference:
    """What a bundle must follow: the cases, that at default settings first, and calls of torch modules by graph.

    oracle: whose runs these are, for the manifest. subject: the prompt, class or number at default settings. tokens: of
    its prompt, by the text graphs' inputs. left: cases that diffusers' own class does not run, with what it says.
    """

    oracle: str
    subject: str
    cases: tuple[Case, ...]
    calls: Mapping[str, tuple[Call, ...]]
    tokens: Mapping[str, Array]
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """The request at default settings."""
        return self.cases[0].request

    @property
    def image(self) -> Array:
        """The image at default settings, [B, 3, H, W], or the video."""
        image = self.cases[0].image
        assert image is not None
        return image


class TorchSession:
    """A graph's torch module behind the session protocol; every call is kept in ``calls``."""

    max_batch: int | None = None

    def __init__(
        self, checkpoint: Checkpoint, name: str, graph: Graph, calls: list[Call], size: tuple[int, int] | None = None,
        recall: Recall | None = None,
    ) -> None:  # fmt: skip
        """Load the reference module of graph ``name``, for images of a size in pixels or of the checkpoint's own.

        recall: knows what its components gave elsewhere.
        """
        self._module = reference.load(checkpoint, name, size)
        if recall is not None:
            recall.attach(dict(self._module.named_children()))
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


@dataclass(frozen=True)
class Asked:
    """A case to run: its name, what is asked for, and what of it is said to diffusers beyond what its defaults are.

    kind: diffusers' class for it, where that is another one than the checkpoint's.
    """

    name: str
    request: Request
    explicit: frozenset[str]
    kind: str | None = None


def record(checkpoint: Checkpoint, model: Model, hub: Path, progress: Progress = silent) -> Reference:
    """Run diffusers' pipeline and ours with the torch modules, and keep all that the gate compares with.

    Raises GateError with the first thing in which our reading of the checkpoint parts from diffusers' own.
    """
    calls: dict[str, list[Call]] = {name: [] for name in model.graphs}
    apart = oracle.unfollowed(checkpoint)
    # The reading is proven by another sampler then, and the bundle of this one by the torch modules.
    source = ensemble.with_own_sampler(checkpoint) if apart else checkpoint
    pipes, why = oracle.pipelines(source)
    recall = Recall()
    for pipe in pipes:
        recall.attach(pipe.components)
    open_graph = functools.cache(  # all at once, since they hold no weights
        lambda name: TorchSession(source, name, model.graphs[name], calls[name], size(model), recall if pipes else None)
    )
    cases: list[Case] = []
    left: dict[str, str] = {}
    if pipes:
        height, width = size(model) or checkpoint.family.default_shape(checkpoint)
        stages = ensemble.stages(source, Shape(height, width, free=False)) if apart else model.stages
        cases, left = _followed(source, replace(model, stages=stages), hub, pipes, open_graph, calls, progress)
    if apart or not pipes:
        kept = {stage.denoiser: len(calls[stage.denoiser]) for stage in model.stages} if pipes else {}
        cases = [_alone(next(_asked(checkpoint, model, [])), Pipeline(model, hub, open_graph), progress)]
        _cut(calls, kept)
        left |= {"sampler": apart} if apart else {}
    encoder = cascade.main(model.stages)[0].encoder
    if encoder is not None and not calls[encoder]:
        open_graph(encoder).run({"image": np.array(cases[0].image)})
    progress("reference: done", 1.0)
    named = " and ".join(type(pipe).__name__ for pipe in pipes)
    whose = f"diffusers {named}" if pipes else f"torch modules alone: {why}"
    tokens = prompt_tokens(Pipeline(model, hub, open_graph).prompts, model.stages, cases[0].request)
    found = {name: tuple(own) for name, own in calls.items()}
    return Reference(whose, example.one(model), tuple(cases), found, tokens, left)


def _followed(
    checkpoint: Checkpoint, model: Model, hub: Path, pipes: Sequence[Any], open_graph: Callable[[str], Session],
    calls: Mapping[str, list[Call]], progress: Progress,
) -> tuple[list[Case], dict[str, str]]:  # fmt: skip
    """The cases as diffusers' pipelines run them and ours followed, and those that they do not run, with why."""
    asked = list(_asked(checkpoint, model, pipes))
    cases: list[Case] = []
    left: dict[str, str] = dict(_left(checkpoint, model, pipes))
    kept: dict[str, int] = {}
    for index, one in enumerate(asked):
        share = _within(progress, index / len(asked), 1 / len(asked))
        ours = Pipeline(model, hub, open_graph)
        try:
            used = [oracle.with_class(pipes[0], one.kind)] if one.kind else pipes
            run = oracle_run.run(
                used, ours, one.request, explicit=one.explicit,
                decoded=not cases or len(cascade.ways(model.stages)) > 1, progress=_within(share, 0, 0.7),
            )  # fmt: skip
        except DexportError as error:
            if not one.kind:
                raise
            left[one.name] = str(error)  # as of Stable Diffusion 3's inpainting for other than 16 channels
            continue
        whose, evaluated = f"{type(used[-1]).__name__}, {one.name}", EVALUATED.get(one.name, (0.0,))
        follower = Following(model, hub, open_graph, run, whose, evaluated)
        cases.append(follower.follow(one.name, one.request, _within(share, 0.7, 0.3)))
        del run, follower
        if len(cases) == 1:
            kept = {stage.denoiser: len(calls[stage.denoiser]) for stage in model.stages}
        _cut(calls, kept)
    return cases, left


def _cut(calls: Mapping[str, list[Call]], kept: Mapping[str, int]) -> None:
    """Leave the first calls of denoisers, which stand for all: those at default settings."""
    for name, count in kept.items():
        del calls[name][count:]


def _asked(checkpoint: Checkpoint, model: Model, pipes: Sequence[Any]) -> Iterator[Asked]:
    """The cases to run; without diffusers' pipelines, the first one alone."""
    said = frozenset({"size"} if size(model) != checkpoint.family.default_shape(checkpoint) else ())
    default = said | ({"guidance"} if checkpoint.guidance is not None else frozenset())
    main = cascade.main(model.stages)[0]
    least = RUNGE_KUTTA if _warms_up(main.scheduler) else 1
    few = cascade.few(model.stages, max(STEPS, least))
    is_img2img = main.strength is not None
    request = example.request(model, example.one(model), steps=few)
    if is_img2img:
        request = example.from_image(model, example.one(model), steps=few, strength=IMAGE_STRENGTH)
    yield Asked("default settings", request, default)
    if not pipes:
        return
    settings: dict[str, Any] = {"steps": cascade.few(model.stages, max(FEW, least))}
    if main.guidance.kind != "none":
        settings["guidance"] = OTHER_GUIDANCE
    subjects = example.one(model) if model.stages[0].text is None or checkpoint.chunks > 1 else LONG_PROMPT
    # Kandinsky makes what it gives for the negative prompt in the same batch, so its steps are not ours.
    gives_negative = any(stage.gives_negative for stage in model.stages)
    takes_negative = "negative_prompt" in inspect.signature(pipes[0].__call__).parameters
    if main.guidance.kind == "cfg" and takes_negative and not gives_negative:
        settings["negative_prompt"] = NEGATIVE_PROMPT
    if main.guidance.kind != "none" or subjects != example.one(model):
        if is_img2img:
            other = example.from_image(model, subjects, strength=0.9, **settings)
        else:
            other = example.request(model, subjects, **settings)
        yield Asked("other settings", other, said | {"guidance"})
    without: dict[str, Any] = {"guidance": 1.0} if main.guidance.kind == "cfg" else {}  # half the work
    for task, kind in _tasks(model, pipes).items():
        if not _why_not(checkpoint, kind):
            begun = example.from_image(
                model, example.one(model), masked=task == "inpainting",
                steps=cascade.few(model.stages, IMAGE_STEPS), strength=IMAGE_STRENGTH, **without,
            )  # fmt: skip
            yield Asked(task, begun, said | {"guidance"}, kind)  # classes of one family have other defaults of it


def _tasks(model: Model, pipes: Sequence[Any]) -> dict[str, str]:
    """diffusers' classes for a start from an image, by task, where that is not what the model does anyway."""
    main = cascade.main(model.stages)[0]
    begins = main.encoder is None or main.strength is not None or subject.shown(model) or subject.paints(model)
    return {} if begins or len(pipes) > 1 else oracle_run.tasks(type(pipes[0]).__name__)


def _left(checkpoint: Checkpoint, model: Model, pipes: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The tasks that diffusers has no right class for, and why."""
    for task, kind in _tasks(model, pipes).items():
        if why := _why_not(checkpoint, kind):
            yield task, why


def _why_not(checkpoint: Checkpoint, kind: str) -> str:
    """Why a start from an image is not compared with diffusers' class for it; "" where it is."""
    if checkpoint.hints:
        return f"{kind} knows none of the networks that steer it"
    if _warms_up(checkpoint.scheduler):
        return f"{kind} begins between the calls of a Runge-Kutta step, ours with a whole one"
    return oracle.known_fault(checkpoint, kind)


def _warms_up(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler begins with Runge-Kutta steps, as DDPMs have PNDM."""
    return scheduler["_class_name"] == "PNDMScheduler" and not scheduler.get("skip_prk_steps")


def size(model: Model) -> tuple[int, int] | None:
    """Height and width in pixels of the images that a model makes."""
    last = model.stages[-1]
    return (last.sample[-2] * last.factor, last.sample[-1] * last.factor) if len(last.sample) > 2 else None


def _alone(asked: Asked, pipeline: Pipeline, progress: Progress) -> Case:
    """The torch modules through our own pipeline, where diffusers has none."""
    latents = []
    for step in pipeline.generate(asked.request):
        progress(f"reference: step {step.index + 1}/{step.total}", step.index / (step.total + 1))
        latents.append(step.sample)
    return Case(asked.name, asked.request, tuple(latents), pipeline.decode(latents[-1], asked.request))


class Following(Pipeline):
    """Our pipeline on diffusers' way: its loop is given diffusers' outputs, and must come to diffusers' samples."""

    def __init__(
        self, model: Model, folder: Path, open_graph: Callable[[str], Session], run: Run, whose: str,
        evaluated: Sequence[float],
    ) -> None:  # fmt: skip
        """Follow ``run``; ``whose``: what an error calls it; ``evaluated``: which of a stage's calls are made."""
        super().__init__(model, folder, open_graph)
        self._run, self._whose, self._done, self._evaluated = run, whose, 0, evaluated

    def follow(self, name: str, request: Request, progress: Progress) -> Case:
        """The run as our loop has it. Raises GateError where the two part."""
        steps, run = [], self._run
        self._check_size(request)
        self._check_timesteps(request)
        for step in self.generate(request):
            progress(f"reference: step {step.index + 1}/{step.total}", step.index / (step.total + 1))
            steps.append(step.sample)
        last = run.laid_out(run.latents, steps[-1].shape)
        self._compare("the latents", last, steps[-1], SAMPLES)
        if run.image is None or last is None:
            return Case(name, request, tuple(steps), None)
        mine = self.decode(last, request)
        theirs = np.broadcast_to(run.image, mine.shape)  # grey images have one channel
        if not psnr(theirs, mine) >= IMAGES:
            raise self._parted("the decoded image", f"{psnr(theirs, mine):.1f} dB PSNR")
        return Case(name, request, tuple(steps), np.array(theirs))

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


def _within(progress: Progress, start: float, part: float) -> Progress:
    return lambda what, share: progress(what, start + part * share)
