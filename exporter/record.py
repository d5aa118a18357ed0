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
from exporter.follow import Following
from exporter.recall import Recall
from runtimes import cascade, example, subject
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Model
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
LONG_PROMPT = "An old wooden boat on Lake Zürich at 6:30, two  snow-capped MOUNTAINS in the mist behind it, soft light"
NEGATIVE_PROMPT = "blurry, dark"
OTHER_GUIDANCE = 3.0
# Which of a stage's calls the torch modules are asked for too, as parts of its way, by the name of the case; else the
# first.
EVALUATED = {"default settings": (0.0, 1.0), "other settings": (1.0,)}


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
    pipes, why = ([], apart) if oracle.unfollowed(source) else oracle.pipelines(source)
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
        share = _within(progress, 0, 0.7 if apart else 1)
        cases, left = _followed(source, replace(model, stages=stages), hub, pipes, open_graph, calls, share)
    if apart or not pipes:
        kept = {stage.denoiser: len(calls[stage.denoiser]) for stage in model.stages} if pipes else {}
        share = _within(progress, 0.7 if pipes else 0, 0.3 if pipes else 1)
        cases = [_alone(next(_asked(checkpoint, model, [])), Pipeline(model, hub, open_graph), share)]
        _cut(calls, kept)
        left |= {"sampler": apart} if pipes else {}
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
        cases.append(Case(one.name, one.request, *follower.follow(one.request, _within(share, 0.7, 0.3))))
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


def _within(progress: Progress, start: float, part: float) -> Progress:
    return lambda what, share: progress(what, start + part * share)
