"""What a checkpoint's components gave, kept, so that nothing large is computed twice while a reference is recorded.

diffusers' pipelines and the modules of our graphs hold components of the same classes with the same weights. Where one
is called with what another was called with before, to the last bit, it gives what that gave: our own part of the way,
before the component and after it, is all that is left to compute, and the calls that a bundle is compared with hold
diffusers' own outputs.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

PARTS = ("encoder", "decoder")  # of an autoencoder, whose own methods call them, and not its forward
LARGEST = 64 << 20  # bytes of the outputs of one row that are kept
Rows = list[tuple[Any, ...]]


class Recall:
    """The outputs of components by what they were called with, row by row of the batch."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}

    def attach(self, components: Mapping[str, Any]) -> None:
        """Let these components, by name, share what they gave. Their parameters must be lent (``reference.lend``)."""
        for component in components.values():
            if not isinstance(component, torch.nn.Module):
                continue
            config = _config(component)
            for module in (component, *(getattr(component, name, None) for name in PARTS)):
                if isinstance(module, torch.nn.Module):
                    module.forward = self._recalling(module, (config, repr(module), _weights(module)))

    def _recalling(self, module: torch.nn.Module, whose: tuple[Any, ...]) -> Callable[..., Any]:
        forward = module.forward
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def recalled(*args: Any, **kwargs: Any) -> Any:
            count, rows = _rows(_said(signature, args, kwargs))
            keys = [(*whose, *row) for row in rows]
            if all(key in self._kept for key in keys):
                return _joined([self._kept[key] for key in keys])
            result = forward(*args, **kwargs)
            for key, row in zip(keys, _split(result, count), strict=False):
                self._kept[key] = row
            return result

        return recalled


def _config(component: Any) -> str:
    """A component's options, but for where they came from."""
    config: Any = getattr(component, "config", None)
    options = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return repr(sorted((key, repr(value)) for key, value in options.items() if not key.startswith("_")))


def _weights(module: torch.nn.Module) -> frozenset[tuple[str, int]]:
    """Which stored tensor is which parameter."""
    return frozenset(
        (f"{path}.{name}", id(entry))
        for path, inner in module.named_modules()
        for name, entry in getattr(inner, "lent", {}).items()
    )


def _said(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that say what is so anyway."""
    bound = signature.bind(*args, **kwargs).arguments
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return {name: value for name, value in bound.items() if value is not defaults[name]}


def _rows(said: Mapping[str, Any]) -> tuple[int, Rows]:
    """How many rows a call's batch has, and a key for each; one for the whole call where it cannot be taken apart."""
    leaves, layout = pytree.tree_flatten(dict(sorted(said.items())))
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
    count = sizes.pop() if len(sizes) == 1 else 1
    if sizes:  # tensors without a batch, such as places
        return 1, [(str(layout), *map(_digest, leaves))]
    return count, [
        (
            str(layout),
            *(_digest(leaf[index] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf) for leaf in leaves),
        )
        for index in range(count)
    ]


def _digest(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    parts = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    values = parts.detach().to(torch.float64).contiguous()  # timesteps are whole numbers to some
    return tuple(leaf.shape), hashlib.blake2b(values.numpy().tobytes(), digest_size=16).digest()


def _split(result: Any, count: int) -> list[tuple[list[Any], Any]]:
    """Copies of an output row by row; none where it has no rows, is too large to keep, or more than numbers."""
    leaves, layout = pytree.tree_flatten(result)
    if not all(leaf is None or isinstance(leaf, (torch.Tensor, int, float)) for leaf in leaves):
        return []
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if count > 1 and any(not leaf.ndim or len(leaf) != count for leaf in tensors):
        return []
    if sum(leaf.nbytes for leaf in tensors) > LARGEST * count:
        return []

    def row(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.clone() if count == 1 else leaf[index : index + 1].clone()

    return [([row(leaf, index) for leaf in leaves], layout) for index in range(count)]


def _joined(rows: list[tuple[list[Any], Any]]) -> Any:
    """The output of several rows, to be changed by whoever asked."""
    columns = zip(*(leaves for leaves, _ in rows), strict=True)
    alone = len(rows) == 1
    joined = [
        column[0] if not isinstance(column[0], torch.Tensor) else column[0].clone() if alone else torch.cat(column)
        for column in columns
    ]
    return pytree.tree_unflatten(joined, rows[0][1])
