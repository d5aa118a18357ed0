"""Models of several ways out of noise: what one way ends with is an input of the denoisers after it.

A prior draws an embedding of which a decoder draws the picture; a small picture is what superresolution goes by. A way
is the stages that make it, from noise to a result, each going on with the sample of the one before. All but the last
way end in a stage that ``gives`` something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from runtimes import samplers
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Model, Stage
from runtimes.session import Array

if TYPE_CHECKING:
    from runtimes.request import Request

Way = tuple[Stage, ...]
NEGATIVE = "negative_"  # before the name of what is given, in a decoder's outputs: of the call with the negative prompt
MAIN = ""  # the main way, among settings by name
APART = 2**64  # between the seeds of two ways, beyond all seeds that a user gives


@dataclass(frozen=True)
class Given:
    """What a way has made, a row for each picture: for the calls with the prompt, and with the negative one."""

    with_prompt: Array
    without: Array


def ways(stages: Sequence[Stage]) -> list[Way]:
    """The stages by the way that they make."""
    found: list[Way] = []
    begin = 0
    for index, stage in enumerate(stages, 1):
        if stage.gives is not None or index == len(stages):
            found.append(tuple(stages[begin:index]))
            begin = index
    return found


def main(stages: Sequence[Stage]) -> Way:
    """The way that a request's steps, guidance, sampler and picture are of: the last one that is guided, or the first.

    So of a prior and a decoder it is the decoder, and of a picture and its superresolution the picture.
    """
    every = ways(stages)
    return next((way for way in reversed(every) if way[0].guidance.kind != "none"), every[0])


def setting(stages: Sequence[Stage], way: Way, asked: Any) -> Any:
    """What a request asks of a way, or None: the value of its name; of the main way also one without a name."""
    if isinstance(asked, Mapping):
        return asked.get(way[0].name, asked.get(MAIN) if way == main(stages) else None)
    return asked if way == main(stages) else None


def check_names(stages: Sequence[Stage], what: str, asked: Any) -> None:
    """Raise DexportError where a setting names what is no way of the model."""
    names = [way[0].name for way in ways(stages)]
    for name in asked if isinstance(asked, Mapping) else ():
        if name not in (*names, MAIN):
            raise DexportError(f"{what}: there is no stage {name!r:.60}; there is {' and '.join(names)}")


def few(stages: Sequence[Stage], steps: int) -> int | dict[str, int]:
    """What to ask for in a short run of the whole: the main way makes ``steps``, and the others at most as many."""
    every, chosen = ways(stages), main(stages)
    steps = samplers.listed(chosen[0].scheduler) or steps  # a list of timesteps is as long as it is
    if len(every) == 1:
        return steps
    return {way[0].name: steps if way == chosen else min(steps, way[0].steps) for way in every}


def described(asked: Any) -> str:
    """A setting that may be by name, in words: "6", "prior 6, decoder 6"."""
    if isinstance(asked, Mapping):
        return ", ".join(f"{name} {described(value)}" for name, value in asked.items())
    return str(asked)


def seeds(first: int, count: int, index: int) -> list[int]:
    """The seeds of ``count`` pictures for the way ``index``, so that no two ways have the same noise."""
    return [first + place + index * APART for place in range(count)]


def requests(request: Request, way: Way) -> list[Request]:
    """What a way draws: the request, and where it gives that too, the negative prompt as if it were the prompt."""
    if not way[-1].gives_negative or not request.negative_prompt:
        return [request]
    unguided = {way[0].name: 1.0}
    return [request, replace(request, prompts=[request.negative_prompt] * len(request.prompts), guidance=unguided)]


def given(stage: Stage, results: Sequence[Mapping[str, Array]]) -> dict[str, Given]:
    """What a stage gives, if it does, from what its decoder makes of each of ``requests``, by name."""
    name = stage.gives
    if name is None:
        return {}
    outputs, *negative = results
    without = negative[0][name] if negative else outputs.get(NEGATIVE + name, outputs[name])
    return {name: Given(outputs[name], without)}


def conditioning(denoiser: Graph, made: Mapping[str, Given], *, without: bool) -> dict[str, Array]:
    """The inputs of a denoiser that ways before it made."""
    names = [tensor.name for tensor in denoiser.inputs if tensor.name in made]
    return {name: made[name].without if without else made[name].with_prompt for name in names}


def is_free(model: Model, stage: Stage) -> bool:
    """Whether a stage's samples may have other sizes than the default."""
    sample = next(tensor for tensor in model.graphs[stage.denoiser].inputs if tensor.name == "sample")
    return any(isinstance(side, str) for side in sample.shape[2:])


def multiple(model: Model) -> int:
    """What the sides of a picture of another size must be multiples of, in pixels."""
    return lcm(*(stage.factor * stage.multiple for stage in model.stages if is_free(model, stage)))


def sizes(model: Model) -> dict[str, int]:
    """The default size of each free dimension of the model's graphs but the batch."""
    last = model.stages[-1]
    height, width = last.sample[-2:]
    found = {"image_height": height * last.factor, "image_width": width * last.factor}
    for stage in reversed(model.stages):
        sample = next(tensor for tensor in model.graphs[stage.denoiser].inputs if tensor.name == "sample")
        found |= {
            side: size for side, size in zip(sample.shape[1:], stage.sample, strict=True) if isinstance(side, str)
        }
    return found
