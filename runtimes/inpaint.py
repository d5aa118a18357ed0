"""Masks: the part of a picture that stays is put back after every step, as noisy as the sample is there.

Any model can so be made to paint into a hole, without having been trained for it, as diffusers' inpainting pipelines do
with such a model. RePaintScheduler has a table of its own for this, which is left as it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from runtimes.errors import DexportError
from runtimes.image import to_array
from runtimes.session import Array
from runtimes.table import Row

EDGE = 0.5  # of a mask's brightness: from here on it is painted; diffusers' own


def keep(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a whole way to a picture, of which each that ends a step puts the known part back."""
    if any(row.known for row in rows):
        return rows
    after = [*(row.level for row in rows[1:]), (1.0, 0.0)]  # () inside of a step
    return tuple(replace(row, known=level) for row, level in zip(rows, after, strict=True))


def kept(mask: Image.Image, size: tuple[int, int], factor: int) -> Array:
    """What of a sample stays: [1, 1, h, w], 1 there and 0 where the mask is white.

    size: height and width of the picture in pixels, of which the mask is cut like the picture itself; each element of
    the sample goes by the first of its ``factor`` x ``factor`` pixels, as in diffusers.
    """
    painted = to_array(mask.convert("L"), size).mean(axis=1, keepdims=True) >= EDGE
    if not painted.any():
        raise DexportError("the mask is black all over, so nothing would be painted; make white what is to change")
    stays: Array = 1.0 - painted[:, :, ::factor, ::factor].astype(np.float64)
    return stays
