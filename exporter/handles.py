"""A file's tensors as torch sees them, without a byte read: what diffusers' converters of checkpoints are given.

The converters rename tensors, cut fused ones in parts, drop axes and transpose. Given tensors of the meta device,
which have a shape, an offset and strides and no values, they say all of that and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from exporter.stored import view
from runtimes.safetensors import Entry, Stored

# A copy of a view has the same values; kept as the view, it still says where they lie.
COPIES = (torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.contiguous)


class Handle(torch.Tensor):
    """A view of the tensor ``entry`` of a file, on the meta device."""

    entry: Entry

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        source = args[0]
        if func in COPIES:
            return source
        if func is torch.Tensor.item:
            return source.entry.load().item()
        result = super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            for made in result if isinstance(result, list | tuple) else [result]:
                if isinstance(made, Handle):
                    if not isinstance(source, Handle) or _storage(made) != _storage(source):
                        raise RuntimeError(f"{func} computes; a converter of names may only cut and turn")
                    made.entry = source.entry
        return result


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
    return view(made.entry, tuple(made.shape), made.stride(), int(made.storage_offset()))
