"""The torch model in fp32 to compare with, in little memory: each layer's weights are there while it runs."""

from __future__ import annotations

from collections.abc import Mapping
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
    output order. A layer's weights are mapped from the file and widened when it is called, and let go after it.
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


def lend(modules: torch.nn.Module, entries: Mapping[str, Stored]) -> None:
    """Give each layer its weights, by parameter name in ``entries``, for the time of each call.

    What a module with layers in it has beside them may be asked for from outside of its call, so it is there for that
    of all ``modules``.
    """
    for path, module in modules.named_modules():
        if own := _own(module, path, entries):
            _lend(module, own, modules if any(module.children()) else module)


def _own(module: torch.nn.Module, path: str, entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """The weights of a module itself, by its own names."""
    return {name: entries[f"{path}.{name}"] for name, value in module._parameters.items() if value is not None}


def _fill(module: torch.nn.Module, entries: Mapping[str, Stored]) -> None:
    for name, entry in entries.items():
        module._parameters[name] = torch.nn.Parameter(torch.from_numpy(widen(entry)), requires_grad=False)


def _lend(module: torch.nn.Module, entries: dict[str, Stored], called: torch.nn.Module) -> None:
    """Give ``module`` its own parameters' values for the time of each call of ``called``."""
    empty = {name: module._parameters[name] for name in entries}

    def fill(_: torch.nn.Module, inputs: Any) -> None:
        _fill(module, entries)

    def drop(_: torch.nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(empty)

    called.register_forward_pre_hook(fill)
    called.register_forward_hook(drop, always_call=True)
