"""RePaint against diffusers: the whole way down and up again, on random outputs of the model."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop
from runtimes.errors import DexportError
from runtimes.samplers import compile_table

JUMPS = {"jump_length": 10, "jump_n_sample": 10}
SHAPE = (2, 3, 4, 4)


def diffusers_samples(
    options: dict[str, Any], steps: int, seed: int, image: np.ndarray, mask: np.ndarray
) -> tuple[list[int], list[np.ndarray]]:
    """The timesteps and samples of RePaintPipeline's loop, in float64.

    To go up one step it adds noise once a timestep: here all of these draws are multiples of one, which adds to the
    sample what independent ones would in their variance.
    """
    random = np.random.default_rng(seed)
    jumps = {name: options.get(name, value) for name, value in JUMPS.items()}
    scheduler = RePaintScheduler(**{key: value for key, value in options.items() if key not in JUMPS})
    scheduler.alphas_cumprod, scheduler.betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    scheduler.set_timesteps(steps, **jumps)
    sample, samples = torch.from_numpy(random.standard_normal(SHAPE)), []
    last = int(scheduler.timesteps[0]) + 1
    stride = scheduler.config.num_train_timesteps // steps
    known = torch.from_numpy(image), torch.from_numpy(mask)
    for t in scheduler.timesteps.tolist():
        output, draw = (torch.from_numpy(random.standard_normal(SHAPE)) for _ in range(2))
        shares = iter([1.0])
        if t > last:
            betas = scheduler.betas[last : last + stride].tolist()
            parts = [math.sqrt(b * math.prod(1 - c for c in betas[i + 1 :])) for i, b in enumerate(betas)]
            shares = iter([part / math.hypot(*parts) for part in parts])
        noise = mock.patch.object(
            scheduling_repaint, "randn_tensor", lambda *_, draw=draw, shares=shares, **__: next(shares) * draw
        )
        with noise:
            if t < last:
                sample = scheduler.step(output, t, sample, *known).prev_sample
            else:
                sample = scheduler.undo_step(sample, last)
        samples.append(sample.numpy())
        last = t
    return scheduler.timesteps.tolist(), samples


def our_samples(
    options: dict[str, Any], steps: int, seed: int, known: tuple[np.ndarray, np.ndarray] | None
) -> tuple[list[int], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    table = compile_table({"_class_name": "RePaintScheduler", **options}, steps)
    start = random.standard_normal(SHAPE)
    pairs = random.standard_normal((len(table.rows), 2, *SHAPE))
    samples: list[np.ndarray] = []
    for step in loop.sample(table, start, lambda *_: pairs[len(samples)][0], lambda: pairs[len(samples)][1], known):
        samples.append(step.sample)
    return [int(row.t) for row in table.rows], samples


def known_part(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed + 1)
    return random.standard_normal(SHAPE), random.uniform(0, 1, (2, 1, 4, 4)).round(1)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    eta=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    clip=st.booleans(),
    total=st.sampled_from([40, 100, 1000]),
    steps=st.integers(1, 40),
    length=st.integers(1, 10),
    times=st.integers(1, 4),
)
def test_repaint_is_that_of_diffusers(schedule: str, clip: bool, total: int, steps: int, **drawn: Any) -> None:
    options = {
        "beta_schedule": schedule,
        "eta": drawn["eta"],
        "clip_sample": clip,
        "num_train_timesteps": total,
        "jump_length": drawn["length"],
        "jump_n_sample": drawn["times"],
    }
    known = known_part(steps)
    times, theirs = diffusers_samples(options, steps, steps, *known)
    ours = our_samples(options, steps, steps, known)
    assert ours[0] == times
    for mine, its in zip(ours[1], theirs, strict=True):
        assert np.abs(mine - its).max() <= 1e-10 * np.abs(its).max()


def test_the_defaults_are_those_of_diffusers() -> None:
    known = known_part(0)
    times, theirs = diffusers_samples({}, 50, 0, *known)
    ours = our_samples({}, 50, 0, known)
    assert ours[0] == times
    assert len(times) == 50 + 2 * 10 * 9 * 4  # four jumps of 10, each made nine times, up and down
    np.testing.assert_allclose(ours[1][-1], theirs[-1], atol=1e-10)
    image, mask = known
    whole = np.broadcast_to(mask == 1, SHAPE)
    np.testing.assert_allclose(ours[1][-1][whole], image[whole], atol=1e-12)


def test_without_a_mask_nothing_is_known() -> None:
    options = {"eta": 0.5, "jump_length": 3, "jump_n_sample": 2}
    image = np.zeros(SHAPE)
    np.testing.assert_array_equal(our_samples(options, 12, 1, None)[1], our_samples(options, 12, 1, (image, image))[1])


def test_beginning_later_walks_the_rest() -> None:
    config = {"_class_name": "RePaintScheduler", "jump_length": 2, "jump_n_sample": 2}
    times = [row.t for row in compile_table(config, 10, begin=4).rows]
    scheduler = RePaintScheduler()
    scheduler.set_timesteps(6, 2, 2)
    assert times == [t // 166 * 100 for t in scheduler.timesteps.tolist()]
    bar = float(scheduler.alphas_cumprod[500])
    assert compile_table(config, 10, begin=4).mix == pytest.approx((bar**0.5, (1 - bar) ** 0.5), rel=1e-6)


def test_trained_betas_may_be_a_list() -> None:
    betas = np.linspace(0.001, 0.03, 40).tolist()
    with pytest.raises(TypeError):  # diffusers wants numpy's array, which no scheduler_config.json holds
        RePaintScheduler(trained_betas=betas, num_train_timesteps=40)
    table = compile_table({"_class_name": "RePaintScheduler", "trained_betas": betas, "num_train_timesteps": 40}, 4)
    assert table.rows[-1].t == 0


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        ({"eta": 1.5}, 5, "eta must lie between 0 and 1"),
        ({"jump_length": 0}, 5, "jump_length=0 must be a number from 1"),
        ({"beta_schedule": "laplace"}, 5, "beta_schedule='laplace'"),
        ({}, 1001, "steps must be at most 1000"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], steps: int, words: str) -> None:
    with pytest.raises(DexportError, match=words):
        compile_table({"_class_name": "RePaintScheduler", **options}, steps)
