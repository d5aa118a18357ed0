"""What is asked of a pipeline, and whether a model can do it: before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from PIL import Image

from runtimes import cascade, guidance, hints, image, samplers, subject, video
from runtimes.errors import DexportError
from runtimes.manifest import Model, Start

Batching = Literal["batched", "sequential"]

# Beyond this a request is a slip of the keyboard, and would end in a machine without memory instead of one line.
MOST_IMAGES = 4096  # in one call


@dataclass(frozen=True)
class Request:
    """What to draw. None takes the checkpoint's default. Image i of the whole request uses seed + i.

    A model takes prompts, or labels (its classes, by number or name), or neither.
    """

    prompts: Sequence[str] = ()
    negative_prompt: str = ""
    labels: int | str | Sequence[int | str] = ()
    images: int = 1  # for each prompt or label
    # Of the main stage, where there are several that start from noise; or of each by its name: {"": 50, "prior": 25}.
    steps: int | Mapping[str, int] | None = None
    # Up to 1 the negative prompt is not used, and a step costs half. Several scales are spread over the steps. By name
    # as the steps.
    guidance: float | Sequence[float] | Mapping[str, float | Sequence[float]] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # the part of the steps that is guided
    guidance_rescale: float = 0.0  # 0 to 1: how far the contrast that guidance adds is taken back
    seed: int = 0
    sampler: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # options of the main stage's sampler, by name
    size: tuple[int, int] | None = None  # height and width in pixels, where the bundle is of dynamic shape
    # Start from this picture, made noisy by ``strength``; a model that is shown one (superresolution) goes by it.
    image: Image.Image | None = None
    mask: Image.Image | None = None  # paint only where it is white, and leave the rest of the picture as it is
    # 0 to 1: the part of the steps that is made of an image; if None, the model's own, with a mask and without
    strength: float | None = None
    fps: float | None = None  # of a video: frames that are shown in a second
    # Pictures that steer, by the names that the model has for them; "" is the name where it takes but one.
    hints: Mapping[str, Image.Image | hints.Hint] = field(default_factory=dict)
    guidance_batch: Batching = "batched"  # with and without prompt in one call, or in two that need less memory
    prompt_weights: bool = True  # whether brackets weigh words, as in (word:1.3); else they are text like any other


def check(model: Model, request: Request) -> None:
    """Raise DexportError for what the model does not take, for what it needs, and for what makes no sense."""
    subject.check(model, request)
    for name, hint in hints.chosen(model, request).items():
        image.check(f"hint {name}", hint.image)
    for name, number in (("images", request.images), ("seed", request.seed), *_by_name("steps", request.steps)):
        if not isinstance(number, Integral):
            raise DexportError(f"{name} must be a whole number, not {number!r:.80}")
    if request.images < 1:
        raise DexportError(f"images must be 1 or more, not {request.images}")
    if (count := subject.count(request)) > MOST_IMAGES:
        raise DexportError(f"{count} images are too many for one call; ask for {MOST_IMAGES} at most")
    for what, asked in (("steps", request.steps), ("guidance", request.guidance)):
        cascade.check_names(model.stages, what, asked)
    for _, steps in _by_name("steps", request.steps):
        if steps < 1:
            raise DexportError(f"steps must be 1 or more, not {steps}")
    if request.seed < 0:
        raise DexportError(f"a seed must be 0 or more, not {request.seed}")
    size: Any = request.size
    if size is not None and not (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, Integral) for side in size)
    ):
        raise DexportError(f"size must be height and width in pixels, not {size!r:.80}")
    video.check_request(model.stages[-1], request)
    _check_picture(model, request)
    _check_guidance(model, request)


def _by_name(what: str, asked: Any) -> list[tuple[str, Any]]:
    """The settings that there are, each with what it is called."""
    if isinstance(asked, Mapping):
        return [(f"{what} of {name or 'the main stage'}", value) for name, value in asked.items()]
    return [] if asked is None else [(what, asked)]


def _check_picture(model: Model, request: Request) -> None:
    """What is said of a picture to start from."""
    for name, picture in (("image", request.image), ("mask", request.mask)):
        if picture is not None:
            image.check(name, picture)
    if request.mask is not None and request.image is None:
        raise DexportError("a mask says where a picture may change; give --image too, or leave it out")
    if request.image is not None and not subject.shown(model) and cascade.main(model.stages)[0].encoder is None:
        raise DexportError("this bundle has no encoder to start from a picture with; leave --image out")
    share = _number("strength", 1.0 if request.strength is None else request.strength)
    if not 0 < share <= 1:
        raise DexportError(f"strength must be above 0 and at most 1, not {share}")
    if request.strength is not None and request.image is None:
        raise DexportError("strength is how much of a picture may change; give --image too, or leave it out")


def _check_guidance(model: Model, request: Request) -> None:
    rescale = _number("guidance_rescale", request.guidance_rescale)
    if not 0 <= rescale <= 1:
        raise DexportError(f"guidance_rescale must be a number from 0 to 1, not {rescale}")
    for way in cascade.ways(model.stages):
        if way[0].guidance.kind == "none" and (guidance.numbers(scale(model, request, way)) > 1).any():
            raise DexportError("this model was made to draw without guidance; leave it out")
    scales = guidance.numbers(scale(model, request, cascade.main(model.stages)))  # whose steps the interval is of
    if not (scales > 1).any() and guidance.numbers(request.guidance_interval).tolist() != [0.0, 1.0]:
        raise DexportError("guidance_interval is the part of the steps that is guided, and none is; leave it out")
    if request.guidance_batch not in ("batched", "sequential"):
        raise DexportError(f"guidance_batch is 'batched' or 'sequential', not {request.guidance_batch!r}")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise DexportError(f"{name} must be a number, not {value!r:.80}")
    return float(value)


def steps(model: Model, request: Request, way: cascade.Way) -> int:
    """A way's number of steps: what is asked for, or as many as a list of timesteps that is asked for has."""
    asked: int | None = cascade.setting(model.stages, way, request.steps)
    if asked is None and way == cascade.main(model.stages) and (request.sampler or request.scheduler):
        asked = samplers.listed(samplers.pick(way[0].scheduler, request.sampler, request.scheduler, image=True))
    return asked or way[0].steps


def scale(model: Model, request: Request, way: cascade.Way) -> float | Sequence[float]:
    """A way's scale of guidance, or several that are spread over its steps."""
    asked: float | Sequence[float] | None = cascade.setting(model.stages, way, request.guidance)
    return way[0].guidance.scale if asked is None else asked


def strength(model: Model, request: Request) -> float:
    """The part of the steps that is made of an image."""
    stage = cascade.main(model.stages)[0]
    own = stage.strength if stage.strength is not None and request.mask is None else start_rule(model, request).strength
    return float(own if request.strength is None else request.strength)


def start_rule(model: Model, request: Request) -> Start:
    """How the model starts from an image, with the request's mask or without one."""
    stage = cascade.main(model.stages)[0]
    return stage.image_to_image if request.mask is None else stage.inpaint


def unused(model: Model, request: Request) -> list[str]:
    """A warning for each setting that has nothing to act on."""
    main = cascade.main(model.stages)
    guided = [
        way
        for way in cascade.ways(model.stages)
        if way[0].guidance.kind == "cfg" and (guidance.numbers(scale(model, request, way)) > 1).any()
    ]
    left = {
        "the negative prompt": request.negative_prompt != "" and not guided,
        "guidance_rescale": request.guidance_rescale != 0 and main not in guided,
    }
    why = "guidance is off" if main[0].guidance.kind == "cfg" else "this model is not guided by a negative prompt"
    return [f"{why}: {name} was left out" for name, out in left.items() if out]
