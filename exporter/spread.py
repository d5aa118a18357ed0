"""How far a right bundle may be from the torch model: the noise that a precision makes in this very model.

Each graph's torch module runs once more, on a call that was recorded, with the arithmetic of a precision: what goes
into matrix products, convolutions and attention, and what comes out of them, is rounded as a device would round it. In
fp32 the sums are made in another order, as every backend has its own. A band is a margin below what that costs, so it
is narrow where the model is calm and wide where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from exporter import reference
from exporter.checkpoint import Checkpoint
from exporter.record import Call, Reference
from runtimes import cascade
from runtimes.accuracy import compare, psnr
from runtimes.errors import Progress, silent
from runtimes.manifest import Graph, Model
from runtimes.session import Array

F = torch.nn.functional
Rounding = Callable[[torch.Tensor], torch.Tensor]


class Rounded(TorchFunctionMode):
    """Convolutions and linear layers with their operands rounded; with one rounding for all, everything else too."""

    def __init__(self, activations: Rounding, weights: Rounding | None = None) -> None:
        """activations: of what flows into these layers; weights: of parameters, by default the same.

        A narrow float is what a device computes all in: products, attention and sums are then rounded as well.
        """
        super().__init__()
        self._activations, self._weights = activations, weights or activations
        self._is_all = weights is None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in WITH_WEIGHTS:
            value, weight, *others = _positional(args, kwargs)
            result = func(self._activations(value), self._weights(weight), *others, **kwargs)
            return self._activations(result) if self._is_all else result
        if func in PRODUCTS and self._is_all:
            rounded = (self._activations(item) if isinstance(item, torch.Tensor) else item for item in args[:3])
            if func is F.scaled_dot_product_attention:
                kwargs = {
                    name: self._activations(item) if name in ("query", "key", "value") else item
                    for name, item in kwargs.items()
                }
            return self._activations(func(*rounded, *args[3:], **kwargs))
        result = func(*args, **kwargs)
        if self._is_all and func in ELEMENTWISE and isinstance(result, torch.Tensor) and result.ndim > 2:
            return self._activations(result)
        return result


class Reordered(TorchFunctionMode):
    """fp32 as another backend computes it: the sum of each product in two halves, and those of a norm in lanes."""

    def __init__(self, times: int = 1) -> None:
        """times: how often the image is as large as the part of it that is run: the sums of norms are as long."""
        super().__init__()
        self._times = times

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear:
            value, weight, bias = _positional(args, kwargs)
            half = weight.shape[-1] // 2
            return F.linear(value[..., half:], weight[..., half:]) + F.linear(
                value[..., :half], weight[..., :half], bias
            )
        if func in (torch.conv2d, F.conv2d) and (len(args) < 7 or args[6] == 1) and kwargs.get("groups", 1) == 1:
            value, weight, bias, *others = _positional(args, kwargs)
            if half := weight.shape[1] // 2:
                first = func(value[:, :half], weight[:, :half], bias, *others, **kwargs)
                return first + func(value[:, half:], weight[:, half:], None, *others, **kwargs)
            return func(value, weight, bias, *others, **kwargs)
        if func in (F.group_norm, torch.group_norm):
            return _group_norm_in_lanes(self._times, *args, **kwargs)
        if func in (torch.sin, torch.cos, torch.Tensor.sin, torch.Tensor.cos):
            return func(args[0] * (1 + ULP), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _group_norm_in_lanes(
    times: int, input: torch.Tensor, num_groups: int, weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
) -> torch.Tensor:  # fmt: skip
    """A group's mean and variance from sums of one value after the other, as many at once as a register of AVX2 holds.

    ONNX Runtime computes them so. Where a group has a million values, as in a decoder, most of the noise is of this.
    """
    rows = input.reshape(len(input) * num_groups, -1)
    centred = rows - _mean_in_lanes(rows, times)
    normed = (centred / torch.sqrt(_mean_in_lanes(centred * centred, times) + eps)).reshape(input.shape)
    shape = (1, -1, *(1 for _ in input.shape[2:]))
    normed = normed if weight is None else normed * weight.reshape(shape)
    return normed if bias is None else normed + bias.reshape(shape)


def _mean_in_lanes(rows: torch.Tensor, times: int) -> torch.Tensor:
    """[n, length] to [n, 1], with sums as long as if there were ``times`` as many values.

    Fewer lanes make longer sums of the same values. NumPy adds along the first axis one value after the other.
    """
    count, length = rows.shape
    lanes, repeats = max(1, LANES // times), max(1, times // LANES)
    values = F.pad(rows, (0, -length % lanes)).reshape(count, -1, lanes).transpose(0, 1)
    sums = np.tile(values.contiguous().numpy(), (repeats, 1, 1)).sum(axis=0, dtype=np.float32)
    return torch.from_numpy(sums.sum(axis=1, keepdims=True) / np.float32(repeats * length))


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A layer's input, weight, bias and what follows, however they were given; they are taken out of ``kwargs``."""
    named = ("input", "weight", "bias")[len(args) :]
    return (*args, *(kwargs.pop(name, None) for name in named))


ULP = 2.0**-23  # of 1 in fp32
LANES = 8  # numbers of fp32 in a register of AVX2
# Of what is as large as the sample; what is computed of the timestep alone stays in fp32 on devices too.
ELEMENTWISE = (
    torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.mul, torch.Tensor.mul,
    torch.Tensor.__mul__, torch.Tensor.__rmul__, F.silu, F.gelu, F.group_norm, F.layer_norm,
)  # fmt: skip
WITH_WEIGHTS = (F.linear, F.conv2d, torch.conv2d, F.conv1d, torch.conv1d, F.conv_transpose2d, F.conv3d, torch.conv3d)
PRODUCTS = (
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm,
    F.scaled_dot_product_attention,
)  # fmt: skip


def as_type(dtype: torch.dtype) -> Rounding:
    """Rounding to a narrower float."""
    return lambda value: value.to(dtype).to(value.dtype) if value.is_floating_point() else value


def whole_numbers(bits: int, group: int | None = None) -> Rounding:
    """Rounding to whole numbers of ``bits`` with a scale for each row of a weight, or each ``group`` of its columns."""
    most = 2 ** (bits - 1) - 1

    def rounded(value: torch.Tensor) -> torch.Tensor:
        flat = value.reshape(len(value), -1)
        if group and flat.shape[1] % group == 0:
            flat = flat.reshape(-1, group)
        scale = flat.abs().amax(dim=1, keepdim=True) / most
        narrow: torch.Tensor = (flat / scale.clamp_min(1e-30)).round() * scale
        return narrow.reshape(value.shape)

    return rounded


def one_scale(bits: int) -> Rounding:
    """Rounding of an activation to whole numbers of ``bits`` over its own range."""

    def rounded(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        low, high = value.min().clamp_max(0), value.max().clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
        narrow: torch.Tensor = (value / scale).round() * scale
        return narrow

    return rounded


def scaled_fp8(value: torch.Tensor) -> torch.Tensor:
    """Rounding to E4M3 with a scale that brings the greatest value to its end."""
    scale = value.abs().amax().clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (value / scale).to(torch.float8_e4m3fn).to(value.dtype) * scale


ROUNDED: Mapping[str, Callable[[], TorchFunctionMode]] = {
    "fp16": lambda: Rounded(as_type(torch.float16)),
    "bf16": lambda: Rounded(as_type(torch.bfloat16)),
    "int8": lambda: Rounded(one_scale(8), whole_numbers(8)),
    "fp8": lambda: Rounded(scaled_fp8, scaled_fp8),
    "w8": lambda: Rounded(lambda value: value, whole_numbers(8)),
    "w4": lambda: Rounded(lambda value: value, whole_numbers(4, 32)),
}


@dataclass(frozen=True)
class Floor:
    """The least of any bundle of a precision, however noisy its model is: SQNR of graphs and latents, PSNR, in dB."""

    graph: float
    latents: float
    image: float


FLOORS = {
    "fp32": Floor(graph=80.0, latents=70.0, image=60.0),
    "fp16": Floor(graph=44.0, latents=36.0, image=40.0),
    "bf16": Floor(graph=24.0, latents=20.0, image=26.0),
    "w8": Floor(graph=20.0, latents=12.0, image=20.0),
    "w4": Floor(graph=8.0, latents=4.0, image=10.0),
    "int8": Floor(graph=16.0, latents=8.0, image=18.0),
    "fp8": Floor(graph=14.0, latents=6.0, image=14.0),
}

MARGINS = {"fp32": 20.0, "fp16": 8.0, "bf16": 8.0, "w8": 6.0, "w4": 6.0, "int8": 4.0, "fp8": 4.0}
"""How much noisier than the simulation, in dB, a right graph may be: what backends do beyond it.

Backends have a tanh or a sine of their own. ``python benchmarks/faults.py`` prints a right graph's noise beside its
limits.
"""

SPAN = 40.0
"""How far above its floor, in dB, a limit may be: a graph with nothing to round has no noise to go by."""

GROWTH = 8.0
"""How much further the latents of a run may be than the worst call: guidance multiplies its outputs' noise."""

RESPONSE = 40.0  # dB, of the noise that is put on latents to see what it does to an image

CROPPED = {"decoder": 16, "encoder": 128}
"""Sides up to which an autoencoder is run: what rounding does is the same in each part of an image."""


@dataclass(frozen=True)
class Noise:
    """What a model's noise is in some precisions, of ``measure``.

    calls: the SQNR in dB of each recorded call, the worst of its outputs, by graph and precision. latents, decoder: how
    many dB the PSNR of an image is above the SQNR of the latents that it is made of, and above that of the decoder.
    """

    calls: Mapping[str, Mapping[str, Sequence[float]]]
    latents: float
    decoder: float


@dataclass(frozen=True)
class Part:
    """What a graph's noise is measured on: what goes in, what must come out, and how much more of it an image has."""

    values: Mapping[str, Array]
    expected: Mapping[str, Array]
    times: int


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach against the reference: SQNR of each recorded call by graph, of latents, and PSNR."""

    calls: Mapping[str, tuple[float, ...]]
    latents: float
    image: float


def limits(noise: Noise, model: Model, precision: str) -> Limits:
    """The limits of a bundle whose graphs are of a ``precision``, or of their own where they note one.

    The noise of the latents and that of the decoder add up in an image.
    """
    calls = {}
    for name, graph in model.graphs.items():
        own = graph.properties.get("precision", precision)
        calls[name] = tuple(_limit(own, one) for one in noise.calls[name][own])
    floor = FLOORS[precision]
    worst = min(min(calls[stage.denoiser]) for stage in model.stages)
    growth = GROWTH * len(cascade.ways(model.stages))  # each goes by what the ones before made
    latents = max(floor.latents, round(worst - growth, 2))
    decoder = model.stages[-1].decoder
    parts = [latents + noise.latents, *([] if decoder is None else [min(calls[decoder]) + noise.decoder])]
    image = -10 * math.log10(sum(10 ** (-part / 10) for part in parts))
    return Limits(calls, latents, max(floor.image, round(image, 2)))


def measure(
    checkpoint: Checkpoint, model: Model, recorded: Reference, precisions: Collection[str],
    size: tuple[int, int] | None, progress: Progress = silent,
) -> Noise:  # fmt: skip
    """The noise of each recorded call in each precision, and what the latents' noise does to the image.

    A denoiser's noise differs from timestep to timestep, so each of its calls is run. Of the other graphs one call
    stands for all.
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    level = -10 * math.log10(float(np.square(recorded.image).mean()) or 1.0)
    response = level
    for index, (name, graph) in enumerate(model.graphs.items()):
        progress(f"noise of {', '.join(precisions)}: {name}", index / len(model.graphs))
        module, calls = reference.load(checkpoint, name, size), recorded.calls[name]
        every = calls if graph.kind == "denoiser" else calls[:1]
        part = _part(module, graph, every)
        noise = {precision: _noise(module, graph, part, precision) for precision in precisions}
        found[name] = {precision: own * (len(calls) // len(every)) for precision, own in noise.items()}
        if name == model.stages[-1].decoder:
            response = _response(module, graph, part)
    return Noise(found, response, level)


def least_in_fp32(checkpoint: Checkpoint, name: str, graph: Graph, call: Call, size: tuple[int, int] | None) -> float:
    """The least SQNR in dB of a right graph in fp32 on one recorded call."""
    module = reference.load(checkpoint, name, size)
    return _limit("fp32", _noise(module, graph, _part(module, graph, [call]), "fp32")[0])


def _limit(precision: str, noise: float) -> float:
    least = FLOORS[precision].graph
    return round(max(least, min(noise - MARGINS[precision], least + SPAN)), 2)


def _response(module: torch.nn.Module, graph: Graph, part: Part) -> float:
    """How many dB the PSNR of a decoded image is above the SQNR of the latents, about where a good bundle is."""
    latents = part.values["sample"]
    draw = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
    noisy = latents + draw * np.sqrt(np.square(latents).mean()) * 10 ** (-RESPONSE / 20)
    images = _run(module, graph, {**part.values, "sample": noisy.astype(np.float32)})
    found = psnr(part.expected["image"], images["image"]) - RESPONSE
    return min(found, SPAN)  # an image may be the same for all latents


def _part(module: torch.nn.Module, graph: Graph, calls: Sequence[Call]) -> Part:
    """One row of each call as one batch, and of a large image a part."""
    values = {tensor.name: _rows([call.inputs[tensor.name] for call in calls]) for tensor in graph.inputs}
    side = CROPPED.get(graph.kind)
    if not side or min(max(value.shape[2:], default=0) for value in values.values()) <= side:
        expected = {tensor.name: _rows([call.outputs[tensor.name] for call in calls]) for tensor in graph.outputs}
        return Part(values, expected, 1)
    cut = {key: np.ascontiguousarray(value[:, :, :side, :side]) for key, value in values.items()}
    times = max(value.size // cut[key].size for key, value in values.items())
    return Part(cut, _run(module, graph, cut), times)


def _noise(module: torch.nn.Module, graph: Graph, part: Part, precision: str) -> tuple[float, ...]:
    """The SQNR in dB of each row in a precision; one batch of all, as scales are made for all timesteps."""
    with Reordered(part.times) if precision == "fp32" else ROUNDED[precision]():
        outputs = _run(module, graph, part.values)
    return tuple(
        min(compare(right[row : row + 1], outputs[key][row : row + 1]).sqnr_db for key, right in part.expected.items())
        for row in range(len(next(iter(part.expected.values()))))
    )


def _rows(values: Sequence[Array]) -> Array:
    """The last row of each."""
    return np.concatenate([value[-1:] for value in values])


def _run(module: torch.nn.Module, graph: Graph, values: Mapping[str, Array]) -> dict[str, Array]:
    with torch.inference_mode():
        result = module(*(torch.from_numpy(values[tensor.name]) for tensor in graph.inputs))
    results = result if isinstance(result, tuple) else (result,)
    return {tensor.name: value.numpy() for tensor, value in zip(graph.outputs, results, strict=True)}
