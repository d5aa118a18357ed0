"""Every sampler's table against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtimes import loop, schedule
from runtimes.errors import DexportError
from runtimes.samplers import CLASSES, NAMES, OneOf, Table, compile_table
from runtimes.samplers.flow import FLOW
from runtimes.table import H0, H1, S, X, Z, row
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    PREDICTIONS,
    SPACINGS,
    STEPS,
    ZERO_SNR,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**LATENT, "clip_sample": False, "set_alpha_to_one": False}),
    "ddim-linear": ("DDIMScheduler", {"clip_sample": False}),
    "ddim-noise": ("DDIMScheduler", {**LATENT, "clip_sample": False, "eta": 0.7}),
    "ddim-ancestral": ("DDIMScheduler", {**OWN, "clip_sample": False, "eta": 1.0}),
    "ddim-zero-snr": ("DDIMScheduler", {**ZERO_SNR, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddpm-latent": ("DDPMScheduler", {**LATENT, "clip_sample": False, "variance_type": "fixed_small_log"}),
    "ddpm-large": ("DDPMScheduler", {**COSINE, "clip_sample": False, "variance_type": "fixed_large"}),
    "ddpm-zero-snr": ("DDPMScheduler", {**ZERO_SNR, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {**LATENT, "skip_prk_steps": True}),
    "pndm-linear": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "euler": ("EulerDiscreteScheduler", LATENT),
    "euler-karras": ("EulerDiscreteScheduler", {**LATENT, "use_karras_sigmas": True}),
    "euler-karras-range": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    "euler-sigma-min": ("EulerDiscreteScheduler", {**COSINE, "final_sigmas_type": "sigma_min"}),
    "euler-zero-snr": ("EulerDiscreteScheduler", ZERO_SNR),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", LATENT),
    "euler-ancestral-zero-snr": ("EulerAncestralDiscreteScheduler", ZERO_SNR),
    "dpmpp": ("DPMSolverMultistepScheduler", LATENT),
    "dpmpp-heun": ("DPMSolverMultistepScheduler", {**OWN, "solver_type": "heun"}),
    "dpmpp-first-order": ("DPMSolverMultistepScheduler", {**LATENT, "solver_order": 1}),
    "dpmpp-karras": ("DPMSolverMultistepScheduler", {**LATENT, "use_karras_sigmas": True}),
    "dpmpp-karras-cosine": ("DPMSolverMultistepScheduler", {**COSINE, "use_karras_sigmas": True}),
    "dpmpp-sigma-min": (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "bh2"},
    ),
    "dpmpp-karras-sigma-min": (
        "DPMSolverMultistepScheduler",
        {**LATENT, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "dpmpp-euler-at-final": (
        "DPMSolverMultistepScheduler",
        {**LATENT, "final_sigmas_type": "sigma_min", "euler_at_final": True},
    ),
    "dpmpp-lambda-clipped": ("DPMSolverMultistepScheduler", {**COSINE, "lambda_min_clipped": -5.1}),
    "dpmpp-zero-snr": ("DPMSolverMultistepScheduler", ZERO_SNR),
}


# diffusers as it is against our table. 1e-5: its coefficients come from float32 differences such as 1 - alpha_bar and
# lambda_t - lambda_s. More where
LIMITS = {
    "ddpm-large": 1e-4,  # its beta is 1 - a / b in float32
    "dpmpp-zero-snr": 1e-4,  # its rescaling to zero SNR is in float32
    # in float32 its x + (x - x_0) / sigma * (sigma' - sigma) cancels all but sigma' / sigma of x; sigma is above 4,000
    "euler-sigma-min": 1e-3,
    "euler-zero-snr": 1e-3,
    "euler-ancestral-zero-snr": 1e-3,
}
# Likewise for timesteps, which are equal otherwise.
TIME_LIMITS = {
    "euler-karras": 1e-3,  # interpolated in float32
    "euler-karras-range": 1e-3,
    "dpmpp-karras-cosine": 1.0,  # interpolated in float32, then cut to whole numbers: 998.99999 becomes 998
}


def undefined(case: str, prediction: str) -> bool:
    """Whether diffusers has no such prediction for the class, or x_0 is undefined at zero SNR."""
    kind = CASES[case][0]
    if prediction == "sample":
        return kind in ("PNDMScheduler", "EulerAncestralDiscreteScheduler")
    return prediction == "epsilon" and case in ("ddim-zero-snr", "ddpm-zero-snr")


@pytest.mark.parametrize(
    ("case", "prediction"),
    [pair for pair in itertools.product(CASES, PREDICTIONS) if not undefined(*pair)],
)
def test_map_is_that_of_diffusers(case: str, prediction: str) -> None:
    kind, options = CASES[case]
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        config = {"_class_name": kind, **options, "prediction_type": prediction, "timestep_spacing": spacing}
        ours = table_map(compile_table(config, steps))
        exact = diffusers_map(config, steps, double=True).differs(ours, DOUBLE_LIMIT)
        assert not exact, f"{spacing}, {steps} steps, in float64: {exact}"
        limits = LIMITS.get(case, 1e-5), TIME_LIMITS.get(case, 0.0)
        rounded = diffusers_map(config, steps, double=False).differs(ours, *limits)
        assert not rounded, f"{spacing}, {steps} steps: {rounded}"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(
        [
            "DDIMScheduler",
            "DDPMScheduler",
            "PNDMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
        ]
    ),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(SPACINGS),
    schedule_name=st.sampled_from(["linear", "scaled_linear"]),
    total=st.integers(100, 1200),
    first=st.floats(1e-5, 1e-3),
    last=st.floats(2e-3, 0.05),
    offset=st.integers(0, 1),
    share=st.floats(0.0, 0.1),
)
def test_map_for_any_schedule(
    kind: str,
    prediction: str,
    spacing: str,
    schedule_name: str,
    total: int,
    first: float,
    last: float,
    offset: int,
    share: float,
) -> None:
    config = {
        "_class_name": kind,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "beta_schedule": schedule_name,
        "num_train_timesteps": total,
        "beta_start": first,
        "beta_end": last,
        "steps_offset": offset,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    steps = max(1, int(share * total))
    theirs = diffusers_map(config, steps, double=True)
    assume(len(theirs.times) == len(compile_table(config, steps).rows))  # see test_trailing_never_runs_past_the_end
    assert not theirs.differs(table_map(compile_table(config, steps)), DOUBLE_LIMIT)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler", **LATENT},
        {"_class_name": "DDIMScheduler", "eta": 1.0, "clip_sample_range": 2.0, "prediction_type": "v_prediction"},
        {"_class_name": "DDPMScheduler", **COSINE},
        {"_class_name": "DDPMScheduler", "clip_sample_range": 0.5, "variance_type": "fixed_large"},
        {"_class_name": "DDIMScheduler", "thresholding": True, "sample_max_value": 1.5},
        {"_class_name": "DDPMScheduler", "thresholding": True, "dynamic_thresholding_ratio": 0.9},
    ],
)
@pytest.mark.parametrize("steps", STEPS)
def test_clipped_trajectory_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    random = np.random.default_rng(steps)
    start, *values = random.standard_normal((1 + 2 * steps, 2, 3, 4, 4))
    outputs, draws = values[:steps], values[steps:]
    scheduler = diffusers_scheduler(
        getattr(diffusers, config["_class_name"]), {k: v for k, v in config.items() if k != "eta"}, steps, True
    )
    extra = {"eta": config["eta"]} if "eta" in config else {}
    theirs, sample = [], torch.from_numpy(start)
    for t, output, draw in zip(scheduler.timesteps, outputs, draws, strict=True):
        with diffusers_noise(scheduler, lambda draw=draw: draw):
            sample = scheduler.step(torch.from_numpy(output), t, sample, **extra).prev_sample
        theirs.append(sample.numpy())

    def run(config: dict[str, Any]) -> list[np.ndarray]:
        calls = iter(range(steps))
        index = 0

        def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
            nonlocal index
            index = next(calls)
            return outputs[index]

        return [step.sample for step in loop.sample(compile_table(config, steps), start, model, lambda: draws[index])]

    np.testing.assert_allclose(run(config), theirs, rtol=0, atol=1e-10)
    # The clip was at work: without it the trajectory is another.
    assert np.abs(run({**config, "clip_sample": False, "thresholding": False})[-1] - theirs[-1]).max() > 1e-2


AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # for SD 1.5, https://arxiv.org/abs/2404.14507


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("times", [AYS, [500], [999, 0]])
def test_given_timesteps_as_in_diffusers(name: str, times: list[float]) -> None:
    config = {"_class_name": NAMES[name][0], **LATENT, "clip_sample": False}
    theirs = diffusers_map(config, len(times), double=True, timesteps=times)
    ours = table_map(compile_table(config, len(times), timesteps=times))
    assert not theirs.differs(ours, DOUBLE_LIMIT)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", CASES)
def test_beginning_later_is_as_in_diffusers(case: str, prediction: str) -> None:
    """The history starts empty there, and an image is made as noisy as the first step expects it."""
    kind, options = CASES[case]
    if undefined(case, prediction):
        return
    config = {"_class_name": kind, **options, "prediction_type": prediction, "timestep_spacing": "linspace"}
    for steps, begin in ((10, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        theirs = diffusers_map(config, steps, double=True, begin=begin)
        different = theirs.differs(table_map(dataclasses.replace(table, init_scale=1.0)), DOUBLE_LIMIT)
        assert not different, f"{begin} of {steps}: {different}"
        known = {key: value for key, value in config.items() if key != "eta"}
        scheduler = diffusers_scheduler(getattr(diffusers, kind), known, steps, False, begin)
        image, noise = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
        first = scheduler.timesteps[begin : begin + 1]
        mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
        assert table.mix == pytest.approx(mix, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if "timesteps" in CLASSES[NAMES[name][0]].takes])
def test_given_timesteps_that_are_the_spaced_ones_change_nothing(name: str) -> None:
    config = {"_class_name": "DDIMScheduler", **LATENT, "clip_sample": False, "timestep_spacing": "leading"}
    table = compile_table(config, 20, sampler=name)
    times = list(dict.fromkeys(row.t for row in table.rows))  # PNDM asks twice at its second
    assert table_map(compile_table(config, 20, sampler=name, timesteps=times)).samples == pytest.approx(
        table_map(table).samples, rel=1e-12, abs=1e-12
    )


def saved_config(kind: str, **options: Any) -> dict[str, Any]:
    """What a scheduler of this class writes to scheduler_config.json."""
    config: dict[str, Any] = json.loads(getattr(diffusers, kind)(**options).to_json_string())
    return config


# dpmpp_sde's noise is a path of its own, and is compared in test_sigmas.py.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpmpp_sde"])
@pytest.mark.parametrize(
    "origin", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_another_sampler_keeps_what_from_config_keeps(origin: str, name: str) -> None:
    for spacing in SPACINGS:
        options = {**LATENT, "prediction_type": "v_prediction", "timestep_spacing": spacing}
        config = saved_config(origin, **options, **({"skip_prk_steps": True} if origin.startswith("PNDM") else {}))
        kind, overrides = NAMES[name]
        theirs = diffusers_map({**config, **overrides}, 10, double=True, kind=kind)
        # Some make their sigmas or timesteps in float32, see test_sigmas.py.
        limits = (1e-3, 1e-2) if name in ("dpm_2", "dpm_2_ancestral", "ipndm") else (DOUBLE_LIMIT, 0.0)
        assert not theirs.differs(table_map(compile_table(config, 10, sampler=name)), *limits)
        if not overrides:
            assert not theirs.differs(table_map(compile_table(config, 10, sampler=kind)), *limits)


def test_defaults_of_a_live_scheduler_do_not_carry_over() -> None:
    config = diffusers.DDIMScheduler(**LATENT).config  # its spacing "leading" is the class's default, not chosen
    theirs = diffusers_map(dict(config), 10, double=True, kind="EulerDiscreteScheduler")
    assert theirs.times[0] == 999  # Euler's default, "linspace"
    assert not theirs.differs(table_map(compile_table(config, 10, sampler="euler")), DOUBLE_LIMIT)


# Our options that in diffusers are arguments of a method, or the older name of an option.
OURS = {"eta", "tau", "use_clipped_model_output", "set_alpha_to_zero", "jump_length", "jump_n_sample"}
# And those that this class, which does not list them, hands to the schedule of flow matching.
HANDED_ON = {"LTXEulerAncestralRFScheduler": set(FLOW)}
# Options of diffusers' classes that act only together with one that is refused.
IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_option_of_the_class_is_known_with_its_default(kind: str) -> None:
    options = dict(CLASSES[kind].options)
    parameters = inspect.signature(getattr(diffusers.schedulers, kind).__init__).parameters
    theirs = {key: value.default for key, value in parameters.items() if key not in ("self", "kwargs")}
    for name in (OURS | HANDED_ON.get(kind, set())) - set(theirs):
        options.pop(name, None)
    assert set(options) - IDLE == set(theirs) - IDLE
    ours = {key: option.default if isinstance(option, OneOf) else option for key, option in options.items()}
    assert ours == {key: default for key, default in theirs.items() if key in ours}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("DDIMScheduler", {"eta": 1.5}, "1.5"),
        ("DDIMScheduler", {"clip_sample": "no"}, "clip_sample='no'"),
        ("DDIMScheduler", {"beta_start": True}, "beta_start=True"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "rescale_betas_zero_snr"),
        ("DDIMScheduler", {"trained_betas": [0.1, 1.2], "num_train_timesteps": 2}, "between 0 and 1"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "must be 1000 numbers"),
        ("DDPMScheduler", {"variance_type": "unknown"}, "variance_type='unknown'"),
        ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "sample"}, "prediction_type='sample'"),
        (
            "EulerDiscreteScheduler",
            {"use_beta_sigmas": True, "use_karras_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas exclude each other",
        ),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError) as caught:
        compile_table({"_class_name": kind, **options}, 2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps must be a whole number from 1, not 0"),
        ({"steps": 2.5}, "2.5"),
        ({"steps": 1001}, "at most 1000"),
        ({"steps": 5, "sampler": "unknown"}, "ddim, ddpm"),
        ({"steps": 2, "timesteps": [900]}, "1 timesteps for 2 steps"),
        ({"steps": 2, "timesteps": [100, 900]}, "do not fall"),
        ({"steps": 2, "timesteps": [1000, 1]}, "at most 999"),
        ({"steps": 2, "timesteps": [900.5, 1]}, "whole numbers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words):
        compile_table({"_class_name": "DDIMScheduler"}, **arguments)


def test_a_config_without_a_known_class_is_refused() -> None:
    for config in ({}, {"_class_name": "NoScheduler"}, {"_class_name": None}):
        with pytest.raises(DexportError, match="euler_ancestral"):
            compile_table(config, 5)


def test_a_timestep_past_the_schedule_is_refused() -> None:
    # 1000 steps from "leading" and an offset of 1 end up at t = 1000, where diffusers fails with an IndexError.
    with pytest.raises(DexportError, match="take fewer"):
        compile_table({"_class_name": "DDIMScheduler", "steps_offset": 1}, 1000)
    karras = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    with pytest.raises(DexportError, match="use_karras_sigmas"):
        compile_table(karras, 2, timesteps=[900, 1])


def test_heun_takes_a_last_step_of_no_length() -> None:
    # Karras sigmas that end at sigma_min reach it twice; there diffusers divides 0 by 0.
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_type": "heun",
        "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min",
    }
    samples = table_map(compile_table(config, 20)).samples
    np.testing.assert_allclose(samples[-1], samples[-2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [61, 103, 999])
def test_trailing_never_runs_past_the_end(steps: int) -> None:
    # Rounding gives diffusers one timestep more for some counts, -1.
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = [row.t for row in compile_table(config, steps).rows]
    assert times == scheduler.timesteps.tolist()[:steps]
    assert len(times) == steps


@pytest.mark.parametrize("name", ["ddim-noise", "pndm", "euler-ancestral", "dpmpp"])
def test_a_wrong_row_is_detected(name: str) -> None:
    kind, options = CASES[name]
    config = {"_class_name": kind, **options, "prediction_type": "v_prediction"}
    theirs, table = diffusers_map(config, 10, double=True), compile_table(config, 10)
    assert not theirs.differs(table_map(table), DOUBLE_LIMIT)

    def changed(index: int, **values: Any) -> Table:
        rows = [*table.rows]
        rows[index] = dataclasses.replace(rows[index], **values)
        return dataclasses.replace(table, rows=tuple(rows))

    wrong = [dataclasses.replace(table, init_scale=table.init_scale * (1 + 1e-6))]
    for index in (0, 1, 5):
        right = table.rows[index]
        for field in ("t", "scale", "x_x", "x_s", "x_m", "x_z"):
            if getattr(right, field):
                wrong.append(changed(index, **{field: getattr(right, field) * (1 + 1e-6)}))
        if any(right.x_h):
            wrong.append(changed(index, x_h=tuple(value * (1 + 1e-6) for value in right.x_h)))
        if right.h_m:
            wrong.append(changed(index, h_m=right.h_m * (1 + 1e-6)))
    if any(row.x_h[1] for row in table.rows):
        wrong.append(changed(5, shift=False))
    assert len(wrong) > 6
    for index, table_ in enumerate(wrong):
        assert theirs.differs(table_map(table_), DOUBLE_LIMIT), f"wrong table {index} passed"


@pytest.mark.parametrize(
    "options", [{}, LATENT, COSINE, OWN, ZERO_SNR], ids=["linear", "latent", "cosine", "own", "zero-snr"]
)
def test_alpha_bars_are_those_of_diffusers(options: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.double().numpy()
    defaults = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    ours = schedule.alpha_bars({**defaults, "trained_betas": None, **options})
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    # Exact but for the rescaling, which diffusers computes in float32.
    np.testing.assert_allclose(1 - ours, 1 - theirs, rtol=2e-4 if "rescale_betas_zero_snr" in options else 1e-7)


def test_forms_read_as_algebra() -> None:
    made = row(3, 2 * X - H0 / 4 + np.float64(0.5) * (Z - H1), s=X, h=3 * X)
    assert (made.t, made.x_x, made.x_h, made.x_z) == (3.0, 2.0, (-0.25, -0.5, 0.0, 0.0), 0.5)
    assert (made.s_x, made.s_s, made.h_x, made.h_m, made.clip) == (1.0, 0.0, 3.0, 0.0, math.inf)
    with pytest.raises(ValueError, match="X and M only"):
        row(3, X, h=S)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm_2", "dpmpp_2m", "unipc", "pndm", "lms"])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_shared_way_is_cut_as_in_diffusers(name: str, steps: int, share: float) -> None:
    """denoising_end of one model and denoising_start of the next, in SDXL's pipelines."""
    config = {**LATENT, "timestep_spacing": "leading", "clip_sample": False}
    kind, overrides = NAMES[name]
    scheduler = getattr(diffusers, kind).from_config({**config, **overrides})
    scheduler.set_timesteps(steps)
    every = [row.t for row in compile_table(config, steps, sampler=name).rows]
    cutoff = round(1000 - share * 1000)
    first = compile_table(config, steps, sampler=name, end=share)
    assert [row.t for row in first.rows] == [t for t in every if t >= cutoff]
    pipeline = SimpleNamespace(scheduler=scheduler)
    theirs, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, 1.0, "cpu", denoising_start=share)
    second = compile_table(config, steps, sampler=name, start=share)
    np.testing.assert_allclose([row.t for row in second.rows], theirs.double().numpy(), atol=1e-3)


def test_a_way_that_does_not_count_down_is_not_shared() -> None:
    for kind in ("DDPMWuerstchenScheduler", "EDMEulerScheduler", "DDIMInverseScheduler", "ScoreSdeVpScheduler"):
        with pytest.raises(DexportError, match="leave start and end out"):
            compile_table({"_class_name": kind}, 5, start=0.5)
    for words, share in (("before the end", {"end": 0.001}), ("must rise", {"start": 0.5, "end": 0.5})):
        with pytest.raises(DexportError, match=words):
            compile_table({"_class_name": "DDIMScheduler"}, 5, **share)
