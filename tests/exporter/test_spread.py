"""The simulated arithmetic of a precision against closed forms, and the limits that are made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from exporter import spread

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


def sqnr(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_noise_of_whole_numbers_is_that_of_their_step(bits: int) -> None:
    """A twelfth of the step's square, whose size is the range by the number of steps."""
    values = torch.rand(64, 4096, generator=RANDOM) * 2 - 1
    step = 2 / (2**bits - 2)
    assert sqnr(values, spread.whole_numbers(bits)(values)) == pytest.approx(10 * math.log10(4 / step**2), abs=0.3)
    step = 2 / (2**bits - 1)
    assert sqnr(values, spread.one_scale(bits)(values)) == pytest.approx(10 * math.log10(4 / step**2), abs=0.3)


def test_each_row_and_each_group_has_a_scale_of_its_own() -> None:
    values = normal(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    rows = spread.whole_numbers(8)(values)
    assert min(sqnr(one, other) for one, other in zip(values, rows, strict=True)) > 35
    groups = torch.cat([normal(8, 32), 1e-3 * normal(8, 32)], dim=1)
    assert sqnr(groups[:, 32:], spread.whole_numbers(4, 32)(groups)[:, 32:]) > 15
    assert sqnr(groups[:, 32:], spread.whole_numbers(4)(groups)[:, 32:]) < 1


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_narrow_floats_round_as_torch_computes_in_them(dtype: torch.dtype, bits: int) -> None:
    """A matrix product's operands and result; the error is at most that of its mantissa, summed."""
    value, weight = normal(16, 256), normal(32, 256)
    with spread.Rounded(spread.as_type(dtype)):
        found = functional.linear(value, weight)
    wide = functional.linear(value.to(dtype).float(), weight.to(dtype).float())
    assert torch.equal(found, wide.to(dtype).float())
    assert 6 * bits - 6 < sqnr(functional.linear(value, weight), found) < 6 * bits + 9


LAYERS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (functional.linear, (normal(2, 64), normal(8, 64), normal(8)), {}),
    (functional.linear, (normal(2, 64),), {"weight": normal(8, 64), "bias": normal(8)}),
    (functional.conv2d, (normal(1, 8, 6, 6), normal(4, 8, 3, 3), normal(4)), {"padding": 1}),
    (functional.conv2d, (normal(1, 8, 6, 6),), {"weight": normal(4, 8, 3, 3), "bias": None, "padding": 1}),
    (functional.conv2d, (normal(1, 8, 6, 6), normal(8, 1, 3, 3), None, 1, 1, 1, 8), {}),
    (functional.conv2d, (normal(1, 1, 6, 6), normal(4, 1, 3, 3)), {}),
]


@pytest.mark.parametrize("precision", ["fp32", *spread.ROUNDED])
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_layers_are_computed_however_they_are_called(precision: str, number: int) -> None:
    layer, args, kwargs = LAYERS[number]
    expected = layer(*args, **kwargs)
    with spread.Reordered() if precision == "fp32" else spread.ROUNDED[precision]():
        found = layer(*args, **kwargs)
    least = {"fp32": 110, "fp16": 55, "bf16": 38, "w8": 35, "w4": 12, "int8": 25, "fp8": 20}[precision]
    assert least < sqnr(expected, found) < math.inf or precision == "fp32"


def test_the_sums_of_a_norm_make_as_much_noise_in_a_part_of_an_image_as_in_the_whole() -> None:
    """Sums in fp32, one value after the other, of 8 times 131,072 values; torch's own are of parts of a sum."""
    whole = normal(1, 2, 1024, 1024) + 1
    exact = functional.group_norm(whole.double(), 2)
    with spread.Reordered():
        found = functional.group_norm(whole, 2)
    with spread.Reordered(times=16):
        part = functional.group_norm(whole[:, :, :256, :256], 2)
    own = functional.group_norm(whole[:, :, :256, :256].double(), 2)
    assert 80 < sqnr(exact, found) < 120 < sqnr(exact, functional.group_norm(whole, 2))
    assert sqnr(own, part) == pytest.approx(sqnr(exact, found), abs=6)


def test_a_norm_in_lanes_has_its_weights_and_any_number_of_values() -> None:
    values, weight, bias = normal(2, 6, 5, 3) * 4 + 2, normal(6), normal(6)
    expected = functional.group_norm(values, 3, weight, bias, eps=0.5)
    for times in (1, 3, 16):
        with spread.Reordered(times):
            assert sqnr(expected, functional.group_norm(values, 3, weight, bias, eps=0.5)) > 120
