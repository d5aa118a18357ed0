"""A file's tensors as torch sees them, without a byte read: what diffusers' converters of names are given.

The converters rename tensors, cut fused ones in parts, drop axes and transpose. Given tensors of the meta device,
which have a shape, an offset and strides and no values, they say all of that and cost nothing. Of what computes there
is only what those of LoRA need: rows one below the other, a factor that is 1, and a comparison, which reads the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch

from exporter.stored import Extended, view
from runtimes.safetensors import Entry, Stored

# A copy of a view has the same values; kept as the view, it still says where they lie.
COPIES = (torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.contiguous)
PRODUCTS = (torch.Tensor.mul, torch.Tensor.__mul__)
EQUAL = (torch.Tensor.eq, torch.Tensor.__eq__)


class Handle(torch.Tensor):
    """A view of a file's tensor ``entry``, or ``parts``, matrices one below the other; on the meta device."""

    entry: Entry
    parts: tuple[Handle, ...] = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        source = args[0]
        if func in COPIES or (func in PRODUCTS and isinstance(source, Handle) and _is_one(args[1])):
            return source
        if func is torch.Tensor.item:
            return source.entry.load().item()
        if func in EQUAL and isinstance(source, Handle):
            return torch.from_numpy(stored(source).load() == args[1])
        if func is torch.cat and len(source) == 1:
            return source[0]
        result = super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            for made in result if isinstance(result, list | tuple) else [result]:
                if not isinstance(made, Handle):
                    continue
                if func is torch.cat and made.ndim == 2 and all(_is_rows(part, made) for part in source):
                    made.parts = tuple(source)
                elif not isinstance(source, Handle) or source.parts or _storage(made) != _storage(source):
                    raise RuntimeError(f"{func} computes; a converter of names may only cut and turn")
                else:
                    made.entry = source.entry
        return result


def _is_rows(part: Any, whole: Handle) -> bool:
    """Whether it is a matrix of a file that is as wide as the whole."""
    return isinstance(part, Handle) and part.shape[1] == whole.shape[1]


def _is_one(factor: Any) -> bool:
    """Whether it is the number 1, bare or as a tensor with values."""
    return not isinstance(factor, Handle) and bool(torch.as_tensor(factor).eq(1).all())


def _storage(tensor: torch.Tensor) -> int:
    """What two tensors have in common of which one is a view of the other."""
    return int(tensor.untyped_storage()._cdata)


def handle(entry: Entry) -> Handle:
    """The whole tensor."""
    made = torch.empty(entry.shape, device="meta").as_subclass(Handle)
    made.entry = entry
    return made


def stored(made: Handle) -> Stored:
    """The tensor that a converter made of a handle, to be read later."""
    if made.parts:
        return reduce(Extended, map(stored, made.parts))
    return view(made.entry, tuple(made.shape), made.stride(), int(made.storage_offset()))
