"""What a component gave is given again for the same input, and for no other; torch itself is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import checkpoint, oracle, reference
from exporter.recall import Recall


class Counted:
    """How many rows a module computes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: Any) -> None:
        self.rows += len(args[0])


@pytest.fixture
def parts(tiny_sd: Path) -> tuple[Any, Any, Counted]:
    """diffusers' UNet, that of our graph, and a count of the rows that either computes, with one memory for both."""
    read = checkpoint.read(tiny_sd)
    (pipe,), _ = oracle.pipelines(read)
    ours = reference.load(read, "denoiser").unet
    recall = Recall()
    recall.attach(pipe.components)
    recall.attach({"unet": ours})
    theirs = Counted(pipe.unet.conv_in)
    ours.conv_in.register_forward_pre_hook(theirs._count)
    return pipe.unet, ours, theirs


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, 4, 16, 16, generator=generator)
    return sample, torch.full((rows,), 601.0), torch.randn(rows, 77, 32, generator=generator)


def test_rows_are_computed_once_whoever_asks(parts: tuple[Any, Any, Counted]) -> None:
    """As a pipeline asks, with one whole timestep for all, and as a graph does, in another order and one by one."""
    theirs, ours, counted = parts
    sample, timestep, states = inputs(2)
    with torch.inference_mode():
        expected = theirs(sample, torch.tensor(601), encoder_hidden_states=states, return_dict=False)[0]
        assert counted.rows == 2
        turned = ours(sample.flip(0), timestep, states.flip(0), timestep_cond=None, return_dict=False)[0]
        alone = ours(sample[1:], timestep[1:], states[1:], return_dict=False)[0]
    assert counted.rows == 2
    assert torch.equal(turned, expected.flip(0)) and torch.equal(alone, expected[1:])


def test_another_input_setting_or_weight_is_computed(parts: tuple[Any, Any, Counted], tiny_sd: Path) -> None:
    theirs, ours, counted = parts
    sample, timestep, states = inputs(1)
    with torch.inference_mode():
        first = theirs(sample, timestep, states, return_dict=False)[0]
        for count, other in enumerate(
            [(sample + 1e-6, timestep, states), (sample, timestep + 1, states), (sample, timestep, -states)], 2
        ):
            assert not torch.equal(ours(*other, return_dict=False)[0], first)
            assert counted.rows == count
        assert torch.equal(ours(sample, timestep, states).sample, first)  # another kind of answer
    assert counted.rows == 5


def test_what_is_of_another_checkpoint_is_computed(tiny_sd: Path) -> None:
    one, other = (reference.load(checkpoint.read(tiny_sd), "denoiser").unet for _ in range(2))
    recall, counts = Recall(), [Counted(unet.conv_in) for unet in (one, other)]
    for unet in (one, other):
        recall.attach({"unet": unet})
        with torch.inference_mode():
            unet(*inputs(1))
    assert [count.rows for count in counts] == [1, 1]
