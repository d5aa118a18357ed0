"""Tensors that are made of a checkpoint's when they are read: a view of one, or one with an adapter or rows added.

Each stands wherever an ``Entry`` of a .safetensors file does, so that weights stay streamed: no more than one is in
memory, whatever the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.safetensors import WIDTHS, Entry, Stored, decode

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
MEMORY = Path("your model")  # what messages call the place of weights that lie in no file


class _Made:
    """What a made tensor has of the one that it is made of."""

    base: Stored

    @property
    def file(self) -> Path:
        """The file that this one lies in."""
        return self.base.file

    @property
    def name(self) -> str:
        """Its name there."""
        return self.base.name


@dataclass(frozen=True)
class View(_Made):
    """A part of a tensor, or its axes in another order; ``offset`` and ``strides`` count elements of ``base``."""

    base: Entry
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> str:
        """The format's name of the element type."""
        return self.base.dtype

    @property
    def size(self) -> int:
        """Bytes of the view itself."""
        return prod(self.shape) * WIDTHS[self.dtype]

    def load(self) -> NDArray[Any]:
        """The view in memory; BF16 widened to float32."""
        flat = self.base.raw().reshape(-1)[self.offset :]
        steps = [stride * flat.itemsize for stride in self.strides]
        return decode(np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False), self.dtype)

    def finite(self) -> bool:
        """Whether the whole tensor has no NaN and no infinity."""
        return self.base.finite()


def view(base: Entry, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Stored:
    """A view of ``base``; where its elements lie side by side in the file, it is an ``Entry`` itself."""
    dense = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if all(side == 1 or a == b for side, a, b in zip(shape, strides, dense, strict=True)):
        width = WIDTHS[base.dtype]
        return Entry(base.file, base.name, base.dtype, shape, base.offset + offset * width, prod(shape) * width)
    return View(base, shape, strides, offset)


@dataclass(frozen=True)
class Merged(_Made):
    """A weight W with a low-rank update: W + scale · up · down, in fp32.

    ``down`` is [rank, ...] and ``up`` [out, rank, 1...]; W is [out, ...], a matrix or a convolution's kernel. With
    ``lengths`` of ``out`` elements each row of the sum, over all its other axes, is brought to its length.
    """

    base: Stored
    down: Stored
    up: Stored
    scale: float
    lengths: Stored | None = None

    @property
    def dtype(self) -> str:
        """Always F32, which holds the sum of fp16 weights and an update better than fp16 does."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Bytes of W in its file."""
        return self.base.size

    def load(self) -> NDArray[Any]:
        """The sum in memory, float32."""
        values = self.base.load().astype(np.float32, copy=False)
        down = self.down.load().astype(np.float32, copy=False).reshape(self.down.shape[0], -1)
        up = self.up.load().astype(np.float32, copy=False).reshape(-1, self.down.shape[0])
        values += ((np.float32(self.scale) * up) @ down).reshape(values.shape)
        if self.lengths is not None:
            rows = values.reshape(len(values), -1)
            wanted = self.lengths.load().astype(np.float32, copy=False).reshape(-1)
            norm = np.linalg.norm(rows, axis=1)
            rows *= (wanted / np.where(norm > 0, norm, 1))[:, None]  # a row of zeros has no length to change
        return values

    def finite(self) -> bool:
        """Whether neither W nor what is merged has NaN or infinity."""
        return all(part.finite() for part in (self.base, self.down, self.up, self.lengths) if part is not None)


@dataclass(frozen=True)
class Held:
    """A parameter of a torch module, on whichever device it lies."""

    name: str
    value: torch.Tensor

    @property
    def file(self) -> Path:
        """There is none."""
        return MEMORY

    @property
    def dtype(self) -> str:
        """The format's name of the element type."""
        return {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(
            str(self.value.dtype).removeprefix("torch."), str(self.value.dtype)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.value.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.value.numel() * self.value.element_size()

    def load(self) -> NDArray[Any]:
        """A copy in memory, float32 whatever it is kept in."""
        values: NDArray[Any] = self.value.detach().float().cpu().numpy()
        return values

    def finite(self) -> bool:
        """Whether it has no NaN and no infinity."""
        return bool(self.value.detach().isfinite().all())


@dataclass(frozen=True)
class Extended(_Made):
    """A matrix [N, D] with rows [n, D] (or one, [D]) below, in fp32."""

    base: Stored
    rows: Stored

    @property
    def dtype(self) -> str:
        """Always F32, which holds both whatever they are."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """[N + n, D]."""
        count, width = self.base.shape
        return (count + (self.rows.shape[0] if len(self.rows.shape) == 2 else 1), width)

    @property
    def size(self) -> int:
        """Bytes of both in their files."""
        return self.base.size + self.rows.size

    def load(self) -> NDArray[Any]:
        """Both in memory, float32."""
        width = self.shape[1]
        return np.concatenate([part.load().astype(np.float32).reshape(-1, width) for part in (self.base, self.rows)])

    def finite(self) -> bool:
        """Whether neither has NaN or infinity."""
        return self.base.finite() and self.rows.finite()
