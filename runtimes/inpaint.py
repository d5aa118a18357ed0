"""Masks: the part of a picture that stays is put back after every step, as noisy as the sample is there.

Any model can so be made to paint into a hole, without having been trained for it, as diffusers' inpainting pipelines do
with such a model. RePaintScheduler has a table of its own for this, which is left as it is.

A denoiser that was trained for it is told the mask and the picture without the hole instead, as its inputs ``mask`` and
``masked_sample``, and what it makes of the rest is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from runtimes.errors import DexportError
from runtimes.image import grey, to_array
from runtimes.session import Array
from runtimes.table import Row

EDGE = 0.5  # of a mask's brightness: from here on it is painted; diffusers' own
GREY = np.float32(0.5)  # what a denoiser sees in place of the pixels that it is to paint; diffusers' own


def keep(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a whole way to an image, each of which puts the known part back.

    It is as noisy as the sample before the row that follows; within a step, where that row names no level, as at the
    step's end, as in diffusers.
    """
    if any(row.known for row in rows):
        return rows
    kept: list[Row] = []
    level: tuple[float, ...] = (1.0, 0.0)
    for row in reversed(rows):
        kept.append(replace(row, known=level))
        level = row.level or level
    return tuple(reversed(kept))


def kept(mask: Image.Image, size: tuple[int, int], factor: int) -> Array:
    """What of a sample stays: [1, 1, h, w], 1 there and 0 where the mask is white.

    size: height and width of the picture in pixels, of which the mask is cut like the picture itself; each element of
    the sample goes by the first of its ``factor`` x ``factor`` pixels, as in diffusers.
    """
    stays: Array = 1.0 - painted(mask, size)[:, :, ::factor, ::factor].astype(np.float64)
    return stays


def painted(mask: Image.Image, size: tuple[int, int]) -> Array:
    """Which pixels are painted: booleans [1, 1, H, W]. DexportError if none are."""
    brightness: Array = to_array(grey(mask), size)[:, :1]
    pixels: Array = brightness >= EDGE
    if not pixels.any():
        raise DexportError(
            f"the mask is black all over (at most {255 * brightness.max():.0f} of 255), so nothing would be painted; "
            "make white what is to change"
        )
    return pixels


def conditioning(
    image: Array, mask: Image.Image, factor: int, count: int, encode: Callable[[Array], Array]
) -> dict[str, Array]:
    """What a denoiser that was trained to paint is told: ``mask`` [B, 1, h, w], 1 to paint, and ``masked_sample``.

    image: the picture, [1, 3, H, W] in [0, 1]. encode: pictures to samples. Each ``count`` times along the batch.
    """
    hole = painted(mask, (image.shape[2], image.shape[3]))
    rows = {
        "mask": hole[:, :, ::factor, ::factor].astype(np.float32),
        "masked_sample": encode(np.where(hole, GREY, image)),
    }
    return {name: np.repeat(row, count, axis=0) for name, row in rows.items()}
