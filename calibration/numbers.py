"""The numbers that 8 bits hold: whole ones, or floats of 4 bits of exponent and 3 of mantissa (E4M3).

Both are used with a scale: a value x is held as the number nearest to x / scale. What differs is the error. Whole
numbers are as far apart everywhere. E4M3's (Micikevicius et al., "FP8 formats for deep learning", 2022) are 2^(e−3)
apart from 2^e to 2^(e+1), down to e = −6, and from there to 0 as far apart as there: so it errs by the same share of
small values and large ones. E4M3 ends at 448, without infinity; what is beyond is cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
NEAREST_ZERO = 1e-30  # the least scale: its reciprocal is a float32 too
HALF = np.finfo(np.float16)
LEAST_EXPONENT, MANTISSA = -6, 3  # of E4M3


@dataclass(frozen=True)
class Numbers:
    """One kind of numbers.

    most: the greatest; the least is its negative. round: float array in steps of its scale to numbers. spacing: how
    far apart the numbers are at a magnitude. widest: the widest range worth trying, of what was seen. half: whether
    scales must be fp16 too, for graphs that compute in it.
    """

    name: str
    dtype: ir.DataType
    most: float
    round: Callable[[Array], Array]
    spacing: Callable[[Array], Array]
    widest: float = 1.0
    half: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether they are whole numbers, as far apart everywhere."""
        return self.dtype == ir.DataType.INT8

    def scale(self, peak: Array | float) -> Array:
        """The scale, float32, with which magnitudes up to ``peak`` are not cut off."""
        return self.held(np.asarray(peak, np.float64) / self.most)

    def held(self, scale: Array | float) -> Array:
        """The least scale that the graph can hold and that is no smaller, float32."""
        exact = np.maximum(np.asarray(scale, np.float64), NEAREST_ZERO)
        if not self.half:
            return exact.astype(np.float32)
        # Beyond fp16 only the scales of islands are, which are float32.
        inside = np.clip(exact, HALF.smallest_subnormal, HALF.max)
        nearest = inside.astype(np.float16)
        above = np.where(nearest < inside, np.nextafter(nearest, HALF.max), nearest)
        held: Array = np.where(exact > inside, exact, above).astype(np.float32)
        return held

    def place(self, sizes: Array) -> Array:
        """Which number, counted from 0, a magnitude in steps of the scale is held as: 0 to ``most`` or fewer."""
        rounded = self.round(sizes)
        return rounded.astype(int) if self.is_whole else rounded.view(np.uint8).astype(int)

    def error(self, sizes: Array) -> Array:
        """The mean squared error of magnitudes in steps of the scale.

        Below the least number a value becomes 0 or that number. Elsewhere the error of rounding is uniform, of
        variance spacing²/12: a bin of a histogram is narrower than a step or full of values, and its middle would be
        rounded all to one side.
        """
        least = float(self.spacing(np.zeros(1))[0])
        small = np.minimum(sizes, least - sizes) ** 2
        return np.where(sizes > self.most, (sizes - self.most) ** 2,
                        np.where(sizes < least, small, self.spacing(sizes) ** 2 / 12))  # fmt: skip


def _whole(values: Array) -> Array:
    steps = np.asarray(np.rint(values))
    rounded: Array = np.clip(steps, -127, 127, out=steps).astype(np.int8)
    return rounded


def _e4m3(values: Array) -> Array:
    # Cut off first: beyond 448 the cast gives NaN.
    rounded: Array = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return rounded


def _e4m3_spacing(sizes: Array) -> Array:
    _, exponent = np.frexp(sizes)  # sizes = m·2^exponent, m from 1/2 to 1
    spacing: Array = np.exp2(np.maximum(np.where(sizes > 0, exponent - 1, LEAST_EXPONENT), LEAST_EXPONENT) - MANTISSA)
    return spacing


INT8 = Numbers("int8", ir.DataType.INT8, 127, _whole, np.ones_like)
"""-128 is not used, so that a value and its negative are alike."""
FP8 = Numbers("fp8", ir.DataType.FLOAT8E4M3FN, 448, _e4m3, _e4m3_spacing, widest=2.0)
"""A range twice as wide has the same numbers again one octave lower, so in between all places for the octaves are."""
NUMBERS = {numbers.name: numbers for numbers in (INT8, FP8)}


def with_half_scales(numbers: Numbers) -> Numbers:
    """The same numbers, with scales that fp16 holds exactly."""
    return replace(numbers, half=True)
