"""A checkpoint's tensors under the names of a graph's modules, read one at a time and widened to fp32.

The weights never lie in memory together: a graph holds ``Weight``s, which read their bytes from the .safetensors file
when they are written out, and drop them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint
from exporter.stored import FLOATS
from runtimes.errors import DexportError, first_of
from runtimes.safetensors import Entry, Stored


class Weight(ir.LazyTensor):
    """An fp32 tensor of a graph whose values lie in a .safetensors file; every use reads them anew.

    With ``order``, the axes are the file's in that order (as numpy's transpose has it).
    """

    __slots__ = ("entry", "order")

    def __init__(self, name: str, entry: Stored, order: tuple[int, ...] | None = None) -> None:
        self.entry = entry
        self.order = order or tuple(range(len(entry.shape)))
        shape = ir.Shape(entry.shape[axis] for axis in self.order)
        super().__init__(self._read, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def _read(self) -> ir.TensorProtocol:
        # Turned before it is widened, while it is small.
        values = _as_stored(self.entry).permute(self.order).contiguous().to(torch.float32)
        return ir.Tensor(values.numpy().reshape(self.shape.numpy()), name=self.name)

    def transposed(self, order: Sequence[int]) -> Weight:
        """The same weight with its axes in another order."""
        return Weight(self.name or "", self.entry, tuple(self.order[axis] for axis in order))


def widen(entry: Stored) -> torch.Tensor:
    """The tensor as fp32 in memory; exact for fp16 and bf16. By torch, which needs a third of numpy's time."""
    return _as_stored(entry).to(torch.float32)


def _as_stored(entry: Stored) -> torch.Tensor:
    """The tensor in the type of its file, BF16 too, which numpy does not know; what is narrow is left in the file."""
    if not isinstance(entry, Entry) or entry.dtype not in ("F16", "BF16"):
        return torch.from_numpy(entry.load())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        if entry.dtype == "BF16":
            return torch.from_numpy(entry.raw().view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(entry.raw())


def bind(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], ties: Mapping[str, str] | None = None
) -> dict[str, Stored]:
    """Find the tensor of each parameter: ``shapes`` is by parameter name, "<component>.<name in its module>".

    ties: of ``tied``; a file has such a parameter under one of its names, or under each. Raises DexportError naming the
    tensor that is missing, is there without a use, or has another shape or no floats.
    """
    family = checkpoint.family
    bound: dict[str, Stored] = {}
    for component in sorted({name.partition(".")[0] for name in shapes}):
        part = checkpoint.components[component]
        found: dict[str, Stored] = {}
        for stored, entry in part.entries.items():
            name = family.rename(component, stored)
            if name in found:
                raise DexportError(f"{part.path}: {stored!r} and {found[name].name!r} are the same weight")
            if name is not None:
                found[name] = entry
        for one, other in (ties or {}).items():
            for name, twin in ((one, other), (other, one)):
                name, twin = (full.removeprefix(f"{component}.") for full in (name, twin))
                if name not in found and twin in found:
                    found[name] = found[twin]
        wanted = {name.partition(".")[2] for name in shapes if name.startswith(f"{component}.")}
        if missing := sorted(wanted - set(found)):
            raise DexportError(f"{part.path}: {_some(missing)} missing; {part.class_name} needs it by its config.json")
        if extra := sorted(set(found) - wanted):
            raise DexportError(
                f"{part.path}: {_some([found[name].name for name in extra])} unexpected; {part.class_name} has no "
                "such weight by its config.json"
            )
        bound |= {f"{component}.{name}": found[name] for name in wanted}
    for name, shape in shapes.items():
        entry = bound[name]
        if entry.shape != tuple(shape):
            raise DexportError(
                f"{entry.file}: tensor {entry.name!r} has the shape {list(entry.shape)} where config.json asks for "
                f"{list(shape)}"
            )
        if entry.dtype not in FLOATS:
            raise DexportError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}; only float weights are exported")
    return bound


def _some(names: list[str]) -> str:
    """The first names, and how many there are beyond: ``tensors 'a', 'b', 'c' and 5 more are``."""
    return f"tensor {first_of(names)} is" if len(names) == 1 else f"tensors {first_of(names)} are"


def parameter_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a torch module by its name; a shared parameter once under each of its names."""
    return {name: tuple(value.shape) for name, value in module.named_parameters(remove_duplicate=False)}


def tied(module: Any) -> dict[str, str]:
    """The further names of a torch module's shared parameters, each with the first one."""
    first: dict[int, str] = {}
    names = [
        (name, first.setdefault(id(value), name)) for name, value in module.named_parameters(remove_duplicate=False)
    ]
    return {name: original for name, original in names if name != original}
