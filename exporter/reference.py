"""The torch model in fp32 to compare with, in little memory: each layer's weights are there while it runs."""

from __future__ import annotations

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
    for path, module in modules.named_modules():
        own = {name: entries[f"{path}.{name}"] for name, value in module._parameters.items() if value is not None}
        # A family's function may take tables beside layers without calling the module, and a module of one's own the
        # weights of a part that it does not call.
        if checkpoint.in_memory or (own and next(module.children(), None) is not None):
            _fill(module, own)
        elif own:
            _lend(module, own)
    return modules


def _fill(module: torch.nn.Module, entries: dict[str, Stored]) -> None:
    for name, entry in entries.items():
        module._parameters[name] = torch.nn.Parameter(torch.from_numpy(widen(entry)), requires_grad=False)


def _lend(module: torch.nn.Module, entries: dict[str, Stored]) -> None:
    """Give ``module`` its own parameters' values for the time of each call."""
    empty = {name: module._parameters[name] for name in entries}

    def fill(module: torch.nn.Module, inputs: Any) -> None:
        _fill(module, entries)

    def drop(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop, always_call=True)
