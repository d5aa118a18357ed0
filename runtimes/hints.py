"""Hints: pictures that steer the denoiser, each by name, with a scale and a part of the steps.

A picture goes into the denoiser as it is (ControlNet), or once through a graph of the kind "hint" that makes further
inputs of the denoiser of it (T2I-Adapter, IP-Adapter). Either way the denoiser has an input for its scale, which is 0
outside of the hint's part of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from runtimes.check import LARGEST, NEGATIVE
from runtimes.errors import DexportError
from runtimes.guidance import numbers
from runtimes.image import to_array
from runtimes.manifest import HintInput, Model, Stage
from runtimes.session import Array, Session, run_batched
from runtimes.table import Row

if TYPE_CHECKING:
    from runtimes.request import Request

ONLY = ""  # the name of a picture for a model that takes only one
Inputs = dict[str, Array]


@dataclass(frozen=True)
class Hint:
    """A picture that steers: how strongly (None: as the model has it), and in which part of the steps."""

    image: Image.Image
    scale: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)


def taken(model: Model) -> tuple[HintInput, ...]:
    """The hints that a model takes, of all its stages."""
    return tuple({hint.name: hint for stage in model.stages for hint in stage.hints}.values())


def chosen(model: Model, request: Request) -> dict[str, Hint]:
    """The request's hints in the order of the model's; DexportError for one that is missing, unknown or of no sense."""
    wanted, given = [hint.name for hint in taken(model)], dict(request.hints)
    if given and not wanted:
        raise DexportError("this model takes no pictures as hints: leave --hint out")
    if ONLY in given and len(wanted) == 1:
        if wanted[0] in given:
            raise DexportError(f"there are two pictures for the hint {wanted[0]}; give one")
        given[wanted[0]] = given.pop(ONLY)
    if ONLY in given:
        raise DexportError(
            f"name the picture of each hint, like {wanted[0]}=picture.png; there are {', '.join(wanted)}"
        )
    if unknown := [name for name in given if name not in wanted]:
        raise DexportError(f"there is no hint {unknown[0]!r:.60}; this model takes {', '.join(wanted)}")
    if missing := [name for name in wanted if name not in given]:
        raise DexportError(
            f"no picture for the hint {' and '.join(missing)}; give one with --hint {missing[0]}=FILE (a scale of 0, "
            f"as in FILE:0, leaves it without effect)"
        )
    return {name: _checked(name, given[name]) for name in wanted}


def _checked(name: str, given: Any) -> Hint:
    hint = given if isinstance(given, Hint) else Hint(given)
    image, scale, ends = hint.image, numbers(hint.scale), numbers(hint.interval)
    if not isinstance(image, Image.Image):
        raise DexportError(f"hint {name}: give an image (PIL.Image.open gives one), or a Hint of it, not {image!r:.80}")
    if hint.scale is not None and not (scale.shape == () and abs(scale) <= LARGEST):
        raise DexportError(f"hint {name}: the scale must be a number up to {LARGEST:g}, not {hint.scale!r:.80}")
    if ends.shape != (2,) or not 0 <= ends[0] < ends[1] <= 1:
        raise DexportError(
            f"hint {name}: the interval must be two numbers that rise within 0 to 1, not {hint.interval!r:.80}"
        )
    return hint


def plan(rows: Iterable[Row], model: Model, request: Request, steered: Sequence[bool] = ()) -> tuple[Row, ...]:
    """The rows of a whole way to a picture with the scale of each hint: 0 for calls that are not wholly in its part.

    steered: for each row, whether its stage takes hints; all do if it is empty. The parts are of the calls that do.
    """
    rows, given = tuple(rows), chosen(model, request)
    if not given:
        return rows
    calls = [index for index, row in enumerate(rows) if row.calls and (not steered or steered[index])]
    scales = np.zeros((len(rows), len(given)))
    for column, (own, hint) in enumerate(zip(taken(model), given.values(), strict=True)):
        # Rounded, since a share of a whole number of calls may fall just beside it: 0.58 of 50.
        start, end = (round(float(share) * len(calls), 9) for share in hint.interval)
        held = calls[math.ceil(start) : math.floor(end)]
        if not held:
            raise DexportError(
                f"hint {own.name}: its interval, {hint.interval[0]:g} to {hint.interval[1]:g}, holds none of "
                f"{len(calls)} calls whole; widen it"
            )
        scales[held, column] = own.default if hint.scale is None else hint.scale
    return tuple(dataclasses.replace(row, hints=tuple(own)) for row, own in zip(rows, scales.tolist(), strict=True))


def encode(
    model: Model,
    stage: Stage,
    request: Request,
    open_graph: Callable[[str], Session],
    size: tuple[int, int],
    count: int,
) -> tuple[Inputs, Inputs]:
    """What the pictures fill of a stage's denoiser, ``count`` rows each: with the prompt, and with the negative one.

    size: height and width of the picture that is drawn, in pixels; a graph whose own is fixed takes that.
    """
    inputs: Inputs = {}
    given = chosen(model, request) if stage.hints else {}
    for hint in stage.hints:
        graph = model.graphs[stage.denoiser if hint.graph is None else hint.graph]
        sides = next(tensor.shape[2:] for tensor in graph.inputs if tensor.name == hint.input)
        height, width = (own if isinstance(side, str) else side for side, own in zip(sides, size, strict=True))
        picture = to_array(given[hint.name].image, (height, width), hint.resample)
        if hint.graph is None:
            inputs[hint.input] = picture
        else:
            inputs |= run_batched(open_graph(hint.graph), {hint.input: picture})
    rows = {name: np.repeat(value, count, axis=0) for name, value in inputs.items()}
    shown = {name: value for name, value in rows.items() if not _stands_in(name, rows)}
    return shown, {name: rows.get(f"{NEGATIVE}{name}", value) for name, value in shown.items()}


def _stands_in(name: str, rows: Mapping[str, Array]) -> bool:
    return name.startswith(NEGATIVE) and name.removeprefix(NEGATIVE) in rows


def scales(model: Model, stage: Stage, row: Row, batch: int) -> Inputs:
    """The scale inputs of a stage's denoiser at a row of the table, [batch] each."""
    own = {hint.name: scale for hint, scale in zip(taken(model), row.hints, strict=True)} if row.hints else {}
    return {hint.scale: np.full(batch, own[hint.name], np.float32) for hint in stage.hints}


def settings(model: Model, request: Request) -> dict[str, Any]:
    """Scale and interval of each hint, for a picture's metadata."""
    given = chosen(model, request)
    if not given:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for own, (name, hint) in zip(taken(model), given.items(), strict=True):
        found[name] = {"scale": float(own.default if hint.scale is None else hint.scale)}
        if tuple(hint.interval) != (0, 1):
            found[name]["interval"] = [float(end) for end in hint.interval]
    return {"hints": found}
