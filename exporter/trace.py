"""From a family's functions to an ONNX graph, without a weight in memory.

The modules are built with empty parameters, traced by torch.export under fake tensors, and translated by torch.onnx;
the parameters are then put in as tensors that read themselves from the checkpoint when the graph is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from exporter.families import Spec
from exporter.weights import Weight
from runtimes.errors import DexportError
from runtimes.manifest import Tensor
from runtimes.safetensors import Stored

OPSET = 23  # the first with Attention; GroupNormalization has per-channel scales since 21
BATCH = 2  # torch.export takes a size of 1 for a constant


class Modules(torch.nn.Module):
    """A graph's components as one module, so that a parameter is named "<component>.<its own name>"."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        for name, build in spec.builders.items():
            self.add_module(name, build())

    def forward(self, *inputs: Any) -> Any:
        """The family's function; ``inputs`` in the order of ``spec.inputs``."""
        return self.spec.forward(self, *inputs)


class Unfilled(TorchFunctionMode):
    """Puts what ``torch.empty`` makes (the layers' parameters) on the meta device, and nothing else.

    Building a module wholly on the meta device would lose the values of its buffers, such as position ids, which no
    file holds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Translatable(TorchFunctionMode):
    """Writes what torch.onnx does not translate, or not truly, as operations that it does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(func, *args, **kwargs)
        if func is torch.nn.functional.interpolate and kwargs.get("antialias"):
            return _resize(func, *args, **kwargs)
        return func(*args, **kwargs)


def _attend(func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Attention without an axis of heads has one of length 1."""
    if query.dim() != 3:
        return func(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    one_head = (tensor.unsqueeze(1) for tensor in (query, key, value))
    return func(*one_head, attn_mask, *args, **kwargs).squeeze(1)


def _resize(func: Any, input: Any, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Any:
    """[B, C, h, w] to another size as two products with matrices that torch itself makes, each for one axis.

    The runtimes' Resize means something else by antialias: theirs is off by more than the picture is large.
    """
    asked = scale_factor if size is None else size
    both = asked if isinstance(asked, (tuple, list)) else (asked, asked)

    def matrix(old: int, new: Any) -> Any:
        to = (None, (new, 1.0)) if size is None else ((int(new), old), None)
        return func(torch.eye(old)[None, None], *to, *args, **kwargs)[0, 0]

    with _disable_current_modes():  # what is computed here is a constant of the graph
        rows, columns = (matrix(int(old), new) for old, new in zip(input.shape[-2:], both, strict=True))
    return rows @ input @ columns.T


def build(spec: Spec) -> Modules:
    """Build a graph's modules: parameters on the meta device, without values; buffers real; fp32, for inference.

    Raises DexportError if a component's class does not take its config.json.
    """
    try:
        with Unfilled(), quiet():
            modules = Modules(spec)
    except Exception as error:  # each class fails in its own way over a config that it was not made for
        where = " or ".join(spec.builders)
        raise DexportError(
            f"config.json of {where}: its class does not take it ({type(error).__name__}: {error})"
        ) from error
    return modules.to(torch.float32).eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's and diffusers' remarks about themselves from the user's screen; errors still come through."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for library in bars:
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library in bars:
            library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(spec: Spec, modules: Modules, weights: Mapping[str, Stored]) -> ir.Model:
    """Trace ``modules`` (from ``build``) to an opset-23 graph whose weights are read from the checkpoint when written.

    Dimensions of ``spec`` that are names stay free. ``weights`` is by parameter name; the modules' parameters are
    left as fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())  # buffers are real
    auto = torch.export.Dim.AUTO  # "free as far as the code allows"; that it was free is checked below
    free = tuple({i: auto for i, n in enumerate(tensor.shape) if isinstance(n, str)} for tensor in spec.inputs)
    sizes = {"batch": BATCH, **spec.example}
    with quiet(), mode:
        _fake_parameters(modules)
        inputs = tuple(_example(tensor, sizes) for tensor in spec.inputs)
        with _Translatable():
            program = torch.export.export(modules, inputs, dynamic_shapes=(free,), strict=False)
        onnx = torch.onnx.export(
            program,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would fold constants, thus read weights; exporter.passes does it within limits
            verbose=False,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
        )
    assert onnx is not None
    model = onnx.model
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = Weight(name, weights[name])
        elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise RuntimeError(f"{spec.kind}: {name} has no values: neither a weight nor a buffer")
    _name_dimensions(model, spec)
    return model


def outline(spec: Spec) -> Any:
    """Run a graph's function on tensors that have shapes and no values, for a batch of ``BATCH``: what it returns."""
    modules = build(spec)
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        _fake_parameters(modules)
        return modules(*(_example(tensor, {"batch": BATCH, **spec.example}) for tensor in spec.inputs))


def flops(spec: Spec) -> int:
    """The operations of a call with a batch of one: two for each product of matrices, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        outline(spec)
    return int(counter.get_total_flops()) // BATCH


def _fake_parameters(modules: torch.nn.Module) -> None:
    """Replace each parameter by a fake one on the CPU; one that is shared stays shared."""
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in modules.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.nn.Parameter(torch.empty(value.shape, dtype=torch.float32), requires_grad=False)
                module._parameters[name] = fakes.setdefault(id(value), fake)


def _example(tensor: Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[n] if isinstance(n, str) else n for n in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _name_dimensions(model: ir.Model, spec: Spec) -> None:
    """Give inputs and outputs the shapes of ``spec``, and inner values the same names for the same free sizes."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        assert value.shape is not None
        for size, name in zip(value.shape, tensor.shape, strict=True):
            if isinstance(name, str):
                if isinstance(size, int):
                    raise RuntimeError(f"{spec.kind}: the size {name} of {tensor.name} was fixed to {size}")
                names[str(size.value)] = name
            elif size != name:
                raise RuntimeError(f"{spec.kind}: {tensor.name} has {size} where its shape says {name}")
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None:
                continue
            sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
            value.shape = ir.Shape([names.get(size, size) if isinstance(size, str) else size for size in sizes])
    for value, tensor in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        value.shape = ir.Shape(tensor.shape)
