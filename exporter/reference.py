"""The torch model in fp32 to compare with, in little memory: each layer's weights are there while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as memoize
from typing import Any

import torch

from exporter import ensemble, trace
from exporter.checkpoint import Checkpoint
from exporter.families import Shape
from exporter.weights import bind, parameter_shapes, tied, widen
from runtimes.errors import DexportError
from runtimes.safetensors import Stored


def load(checkpoint: Checkpoint, graph: str, size: tuple[int, int] | None = None) -> torch.nn.Module:
    """Return the module that the hub graph ``graph`` is exported from, computing in fp32.

    Called as ``module(*inputs)`` with tensors in the graph's input order; gives a tensor, or a tuple in the graph's
    output order. A layer's weights are read from the file and widened whenever it asks for them, and let go after it.
    size: height and width of the picture in pixels, the checkpoint's own by default.
    """
    height, width = size or checkpoint.family.default_shape(checkpoint)
    specs = ensemble.specs(checkpoint, Shape(height, width, free=False))
    if graph not in specs:
        raise DexportError(f"no graph {graph!r}; there are {', '.join(specs)}")
    modules = trace.build(specs[graph])
    entries = bind(ensemble.owner(checkpoint, graph), parameter_shapes(modules), tied(modules))
    if checkpoint.in_memory:  # so are the weights; and one's own module may use those of a part that it does not call
        for path, module in modules.named_modules():
            _fill(module, _own(module, path, entries))
    else:
        lend(modules, entries)
    return modules


def lend(module: torch.nn.Module, entries: Mapping[str, Stored]) -> None:
    """Let each parameter be read from ``entries``, by its name, and widened to fp32 whenever it is asked for.

    In its place the module has a parameter of the same shape on the CPU that takes no memory, so that its device and
    type are what they seem. Buffers in ``entries`` are filled.
    """
    for path, inner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in inner._parameters.items():
            if value is not None:
                empty = torch.zeros(()).expand(value.shape)
                inner._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, buffer in inner._buffers.items():
            if buffer is not None and prefix + name in entries:
                inner._buffers[name] = widen(entries[prefix + name]).to(buffer.dtype)
        lent = {name: entries[prefix + name] for name in inner._parameters if prefix + name in entries}
        if lent:
            inner.lent = lent  # type: ignore[assignment]
            inner.__class__ = _borrower(type(inner), tuple(lent))  # type: ignore[arg-type]  # a class is hashable


@memoize
def _borrower(kind: type, names: tuple[str, ...]) -> type:
    """A module's class whose parameters are read when they are asked for."""
    return type(kind.__name__, (kind,), {name: property(_reader(name)) for name in names})


def _reader(name: str) -> Any:
    return lambda module: widen(module.lent[name])


def _own(module: torch.nn.Module, path: str, entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """The weights of a module itself, by its own names."""
    return {name: entries[f"{path}.{name}"] for name, value in module._parameters.items() if value is not None}


def _fill(module: torch.nn.Module, entries: Mapping[str, Stored]) -> None:
    for name, entry in entries.items():
        module._parameters[name] = torch.nn.Parameter(widen(entry), requires_grad=False)
