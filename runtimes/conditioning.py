"""The values that a manifest has for further inputs of a denoiser, such as the sizes that SDXL is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.errors import DexportError
from runtimes.manifest import Graph, Stage
from runtimes.session import Array

SIZES = ("image_height", "image_width")  # what a value may name instead of a number
DEEPEST = 8  # lists in lists


def constants(
    stage: Stage, graph: Graph, size: tuple[int, int], count: int, *, negative: bool = False
) -> dict[str, Array]:
    """The stage's values for the inputs of its denoiser ``graph``, each ``count`` times along the batch.

    size: height and width of the picture in pixels. negative: for the call with the negative prompt.
    """
    values = {**stage.inputs, **(stage.negative if negative else {})}
    rows = {}
    for tensor in graph.inputs:
        if tensor.name in values:
            row = array(values[tensor.name], tensor.dtype, size)
            rows[tensor.name] = np.repeat(row[None], count, axis=0)
    return rows


def array(value: Any, dtype: str, size: tuple[int, int]) -> Array:
    """A manifest's value, numbers and names of ``SIZES`` in lists, as an array; DexportError if it is none."""
    try:
        with np.errstate(over="raise"):
            result = np.asarray(_filled(value, dict(zip(SIZES, size, strict=True)), DEEPEST), dtype)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise DexportError(f"not numbers of {dtype} or {' and '.join(SIZES)}") from error
    return result


def _filled(value: Any, sizes: Mapping[str, int], depth: int) -> Any:
    if isinstance(value, list | tuple):
        if not depth:
            raise ValueError("lists in lists without end")
        return [_filled(item, sizes, depth - 1) for item in value]
    return sizes[value] if isinstance(value, str) else value
