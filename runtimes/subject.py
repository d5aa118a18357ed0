"""What a picture is of: a prompt, a class, or nothing that anyone chooses; and a picture that the model is shown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from runtimes.errors import DexportError
from runtimes.image import to_array, upright
from runtimes.manifest import Graph, Labels, Model, Stage
from runtimes.session import Array

if TYPE_CHECKING:
    from runtimes.request import Request

SHOWN = 5  # names in an error


def check(model: Model, request: Request) -> None:
    """Raise DexportError if the request names what the model does not take, or leaves out what it needs."""
    stage = model.stages[0]
    if stage.text is not None and not request.prompts:
        raise DexportError("no prompt given; give one with --prompt")
    if stage.text is None and (request.prompts or request.negative_prompt):
        instead = "; name a class with --class" if stage.labels else ""
        raise DexportError(f"this model takes no prompt: leave it out{instead}")
    numbers(stage.labels, request.labels)
    if shown(model) and request.image is None:
        raise DexportError("this model draws what it is shown: give a picture with --image")
    if paints(model) and (request.image is None or request.mask is None):
        raise DexportError("this model paints into a picture: give it with --image, and with --mask where to paint")
    if shown(model) and (request.strength is not None or request.mask is not None):
        raise DexportError("this model is shown the picture and does not start from it: leave strength and mask out")


def count(request: Request) -> int:
    """How many pictures are asked for."""
    return max(len(request.prompts), len(listed(request.labels)), 1) * request.images


def alike(one: Stage, other: Stage) -> bool:
    """Whether two stages can draw one picture: by the same prompt, the same class, or neither."""
    return (one.text is None, one.labels) == (other.text is None, other.labels)


def needs_nothing(stage: Stage) -> bool:
    """Whether a stage goes by neither a prompt nor a class, as one may that goes by what others made."""
    return stage.text is None and stage.labels is None


def shown(model: Model) -> bool:
    """Whether a denoiser takes a picture beside its sample."""
    return any(_takes_picture(model.graphs[stage.denoiser]) for stage in model.stages)


def paints(model: Model) -> bool:
    """Whether a denoiser was trained to paint into a picture: it is told where, and what is around."""
    return any(tensor.name == "mask" for stage in model.stages for tensor in model.graphs[stage.denoiser].inputs)


def _takes_picture(denoiser: Graph) -> bool:
    return any(tensor.name == "image" for tensor in denoiser.inputs)


def conditioning(
    stage: Stage, denoiser: Graph, request: Request, size: tuple[int, ...], *, without: bool = False
) -> dict[str, Array]:
    """The inputs ``labels`` [B] and ``image`` [B, 3, *size] of a stage's denoiser, as far as it takes them.

    without: what stands for no class in place of the request's, for guidance.
    """
    rows: dict[str, Array] = {}
    labels, total = stage.labels, count(request)
    if labels is not None:
        own = np.repeat(np.array(numbers(labels, request.labels), np.int64), request.images)
        rows["labels"] = np.full(total, labels.null, np.int64) if without else own
    if _takes_picture(denoiser) and request.image is not None:
        rows["image"] = np.repeat(to_array(request.image, (size[0], size[1])), total, axis=0)
    return rows


def fitting(image: Image.Image, multiple: int) -> tuple[int, int]:
    """Height and width of a picture, cut to multiples."""
    width, height = upright(image).size
    if min(width, height) < multiple:
        raise DexportError(f"the picture is {height}x{width} pixels; this model needs {multiple} at least on each side")
    return height - height % multiple, width - width % multiple


def settings(model: Model, request: Request, index: int) -> dict[str, Any]:
    """What picture ``index`` is of, for its metadata."""
    labels, which = model.stages[0].labels, index // request.images
    if labels is not None:
        number = numbers(labels, request.labels)[which]
        return {"class": number} | ({"class_name": labels.names[str(number)]} if str(number) in labels.names else {})
    if not request.prompts:
        return {}
    return {"prompt": request.prompts[which]}


def listed(labels: int | str | Sequence[int | str]) -> list[int | str]:
    """The classes of a request, which may be one alone."""
    return [labels] if np.ndim(labels) == 0 else list(labels)  # type: ignore[arg-type, list-item]


def numbers(labels: Labels | None, asked: int | str | Sequence[int | str]) -> list[int]:
    """The numbers of the classes asked for, each by its number or by one of its names.

    Raises DexportError for none, where the model has classes, for some where it has none, and for unknown ones.
    """
    wanted = listed(asked)
    if labels is None:
        if wanted:
            raise DexportError("this model has no classes: leave --class out")
        return []
    if not wanted:
        raise DexportError(f"no class given; give one with --class, {_range(labels)}")
    names = _by_name(labels.names)
    return [_number(labels, names, one) for one in wanted]


def _number(labels: Labels, names: Mapping[str, Sequence[int]], asked: int | str) -> int:
    text = str(asked).strip()
    if text.isascii() and text.isdigit():
        if int(text) >= labels.count:
            raise DexportError(f"there is no class {text:.20}; take {_range(labels)}")
        return int(text)
    found = names.get(text.lower(), ())
    if len(found) > 1:
        raise DexportError(f"{text!r} is the name of the classes {' and '.join(map(str, found))}; give the number")
    if not found:
        raise DexportError(f"there is no class {text!r:.60}; {_near(names, text.lower()) or f'take {_range(labels)}'}")
    return found[0]


def _by_name(names: Mapping[str, str]) -> dict[str, list[int]]:
    """The numbers of each name, of the whole list of names too, in lower case."""
    found: dict[str, list[int]] = {}
    for number, text in names.items():
        for name in {text.strip().lower(), *(part.strip().lower() for part in text.split(","))} - {""}:
            found.setdefault(name, []).append(int(number))
    return {name: sorted(found) for name, found in found.items()}


def _near(names: Mapping[str, Sequence[int]], text: str) -> str:
    """Names like ``text``: those that hold it as a whole, then those that are spelled almost so."""
    holding = sorted((name for name in names if text and text in name), key=len)
    near = dict.fromkeys([*holding, *difflib.get_close_matches(text, names, SHOWN)])
    shown_ = [f"{name!r} ({names[name][0]})" for name in near if "," not in name][:SHOWN]
    return f"near it are {', '.join(shown_)}" if shown_ else ""


def _range(labels: Labels) -> str:
    return f"a number from 0 to {labels.count - 1}" + (" or a name" if labels.names else "")
