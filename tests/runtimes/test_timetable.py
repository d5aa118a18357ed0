"""A stage's table against diffusers' schedulers, set as the pipelines of Flux, SD 3 and Qwen-Image set them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from runtimes import guidance, timetable
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage

FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
QWEN = {**FLUX, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
FIXED = {"shift": 3.0}


def stage(config: dict[str, Any], kind: str = "FlowMatchEulerDiscreteScheduler", **said: Any) -> Stage:
    scheduler = {"_class_name": kind, **config}
    made = Stage("base", "d", None, None, None, (16, 32, 64), 8, scheduler, Guidance("none", 1.0), 7, multiple=2)
    return replace(made, **said)


def theirs(config: dict[str, Any], sample: tuple[int, int, int], steps: int, *, even: bool) -> Any:
    """Timesteps as a pipeline of diffusers sets them for a sample [C, h, w] in tokens of 2 x 2."""
    found = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(sample[1] // 2 * (sample[2] // 2), *(found.config[name] for name in names))
    sigmas = np.linspace(1.0, 1 / steps, steps) if even else None
    found.set_timesteps(None if even else steps, sigmas=sigmas, mu=mu)
    return found.timesteps.numpy()


@pytest.mark.parametrize("config", [FLUX, QWEN, FIXED], ids=["flux", "qwen", "fixed"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("sample", [(16, 32, 64), (16, 128, 128)])
def test_steps_are_those_of_the_pipelines(config: dict[str, Any], even: bool, sample: tuple[int, int, int]) -> None:
    made = stage(config, patch=2, sigmas="even" if even else "scheduler")
    wanted = theirs(config, sample, 7, even=even)
    rows = timetable.compile_stage(made, 7, sample).rows
    np.testing.assert_allclose([row.t for row in rows], wanted, rtol=1e-6)
    later = timetable.compile_stage(made, 7, sample, begin=3).rows
    np.testing.assert_allclose([row.t for row in later], wanted[3:], rtol=1e-6)


def test_what_spaces_its_sigmas_itself_is_given_none() -> None:
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
    for kind in ("UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler"):
        plain = stage(config, kind)
        even = replace(plain, sigmas="even", patch=2)
        assert timetable.compile_stage(even, 7, even.sample) == timetable.compile_stage(plain, 7, plain.sample)


def test_another_sampler_is_shifted_too() -> None:
    made = stage(FLUX, patch=2)
    other = {**made.scheduler, "_class_name": "FlowMatchLCMScheduler"}
    one, two = (timetable.compile_stage(made, 7, made.sample, scheduler=config) for config in (made.scheduler, other))
    assert [row.t for row in one.rows] == [row.t for row in two.rows]


def test_shifts_that_make_no_sense() -> None:
    with pytest.raises(DexportError, match="must differ"):
        timetable.compile_stage(stage({**FLUX, "max_image_seq_len": 256}, patch=2), 7, (16, 32, 64))
    with pytest.raises(DexportError, match="needs mu"):
        timetable.compile_stage(stage(FLUX), 7, (16, 32, 64))


def test_tokens_keep_their_length() -> None:
    """As QwenImagePipeline rescales, on packed latents; and a token without length stays one."""
    without, with_prompt = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 8)).astype(np.float32)
    without[:, :, :2, :2] = with_prompt[:, :, :2, :2] = 0

    def packed(output: Any) -> Any:
        return diffusers.QwenImagePipeline._pack_latents(torch.tensor(output), 3, 4, 6, 8).numpy()

    c, u = packed(with_prompt).astype(np.float64), packed(without).astype(np.float64)
    mixed = u + 4.0 * (c - u)
    lengths = [np.linalg.norm(value, axis=-1, keepdims=True) for value in (c, mixed)]
    wanted = mixed * np.divide(*lengths, out=np.ones_like(lengths[0]), where=lengths[1] > 0)
    found = packed(guidance.guide(without, with_prompt, 4.0, patch=2))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert np.abs(found - mixed).max() > 0.1
