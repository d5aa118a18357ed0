"""Consistency models' samplers against diffusers: see oracle.py."""

from __future__ import annotations

import dataclasses
import itertools
import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import loop
from runtimes.errors import DexportError
from runtimes.samplers import compile_table
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    PREDICTIONS,
    STEPS,
    diffusers_map,
    diffusers_noise,
    diffusers_scheduler,
    table_map,
)  # fmt: skip

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LATENT_KINDS = ("LCMScheduler", "TCDScheduler")
CM = "CMStochasticIterativeScheduler"
OWN = {
    "trained_betas": np.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400, "original_inference_steps": 80
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"beta_schedule": "linear"},
    "cosine": COSINE,
    "own": OWN,
    "zero-snr": {"rescale_betas_zero_snr": True},
    "idle": {"set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1},
    "scaling": {"timestep_scaling": 0.01},
    "every-timestep": {"original_inference_steps": 1000},
}
# diffusers as it is against our table: 1 - alpha_bar in float32.
LIMIT = 1e-5


@pytest.mark.parametrize("kind", LATENT_KINDS)
@pytest.mark.parametrize(("case", "prediction"), list(itertools.product(CASES, PREDICTIONS)))
def test_latent_consistency_is_that_of_diffusers(kind: str, case: str, prediction: str) -> None:
    config = {"_class_name": kind, **CASES[case], "prediction_type": prediction}
    if case == "zero-snr" and prediction == "epsilon":
        with pytest.raises(DexportError, match="rescale_betas_zero_snr"):
            compile_table(config, 4)
        return
    for steps in (*STEPS, 4, 8):
        table = compile_table(config, steps)
        assert len(table.rows) == steps
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            different = diffusers_map(config, steps, double=double).differs(table_map(table), limit)
            assert not different, f"{steps} steps: {different}"


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_tcd_takes_gamma(eta: float) -> None:
    for prediction, steps in itertools.product(PREDICTIONS, (*STEPS, 4)):
        config = {"_class_name": "TCDScheduler", "eta": eta, "prediction_type": prediction}
        table = compile_table(config, steps)
        assert any(row.x_z for row in table.rows) == (eta > 0 and steps > 1)
        for double, limit in ((True, DOUBLE_LIMIT), (False, LIMIT)):
            assert not diffusers_map(config, steps, double=double).differs(table_map(table), limit)


def test_tcd_default_gamma_is_that_of_diffusers() -> None:
    default = compile_table({"_class_name": "TCDScheduler"}, 4)
    assert default == compile_table({"_class_name": "TCDScheduler", "eta": 0.3}, 4)
    assert not diffusers_map({"_class_name": "TCDScheduler"}, 4, double=True).differs(table_map(default), DOUBLE_LIMIT)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(LATENT_KINDS),
    prediction=st.sampled_from(PREDICTIONS),
    schedule_name=st.sampled_from(["linear", "scaled_linear"]),
    total=st.integers(60, 1200),
    share=st.floats(0.05, 1.0),
    first=st.floats(1e-5, 1e-3),
    last=st.floats(2e-3, 0.05),
    scaling=st.floats(0.0, 20.0),
    steps=st.integers(1, 50),
    eta=st.floats(0.0, 1.0),
)
def test_latent_consistency_for_any_schedule(
    kind: str,
    prediction: str,
    schedule_name: str,
    total: int,
    share: float,
    first: float,
    last: float,
    scaling: float,
    steps: int,
    eta: float,
) -> None:
    original = max(1, int(share * total))
    config = {
        "_class_name": kind,
        "prediction_type": prediction,
        "beta_schedule": schedule_name,
        "num_train_timesteps": total,
        "original_inference_steps": original,
        "beta_start": first,
        "beta_end": last,
        "timestep_scaling": scaling,
    }
    config |= {"eta": eta} if kind == "TCDScheduler" else {}
    steps = min(steps, original)
    # 1e-9: where 1 - eta or the scaling is tiny, the cancellation is larger.
    assert not diffusers_map(config, steps, double=True).differs(table_map(compile_table(config, steps)), 1e-9)


@pytest.mark.parametrize("kind", LATENT_KINDS)
@pytest.mark.parametrize("times", [[999, 759, 499, 259], [999], [800, 3], [999, 0]])
def test_given_timesteps_as_in_diffusers(kind: str, times: list[float]) -> None:
    config = {"_class_name": kind}
    theirs = diffusers_map(config, len(times), double=True, timesteps=times)
    assert not theirs.differs(table_map(compile_table(config, len(times), timesteps=times)), DOUBLE_LIMIT)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "LCMScheduler", "clip_sample": True},
        {"_class_name": "LCMScheduler", "clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "sample"},
        {"_class_name": "LCMScheduler", "thresholding": True, "sample_max_value": 1.5},
        {"_class_name": "LCMScheduler", "thresholding": True, "dynamic_thresholding_ratio": 0.9, **COSINE},
        {"_class_name": CM},
        {"_class_name": "TCDScheduler", "clip_sample": True, "thresholding": True},
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_clipped_trajectory_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    random = np.random.default_rng(steps)
    start, *values = random.standard_normal((1 + 2 * steps, 2, 3, 4, 4))
    outputs, draws = values[:steps], values[steps:]
    if config["_class_name"] == CM:  # as the table's: see test_consistency_is_that_of_diffusers
        config = {**config, "sigma_min": float(np.float32(0.002))}
    scheduler = diffusers_scheduler(getattr(diffusers, config["_class_name"]), config, steps, True)
    theirs, sample = [], torch.from_numpy(start) * scheduler.init_noise_sigma
    for t, output, draw in zip(scheduler.timesteps, outputs, draws, strict=True):
        scheduler.scale_model_input(sample, t)
        with diffusers_noise(scheduler, lambda draw=draw: draw):
            sample = scheduler.step(torch.from_numpy(output), t, sample).prev_sample
        theirs.append(sample.numpy())

    def run(config: dict[str, Any]) -> list[np.ndarray]:
        made: list[np.ndarray] = []

        def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
            return outputs[len(made)]

        for step in loop.sample(compile_table(config, steps), start, model, lambda: draws[len(made)]):
            made.append(step.sample)
        return made

    np.testing.assert_allclose(run(config), theirs, rtol=0, atol=1e-10)
    free = {**config, "clip_sample": False, "thresholding": False, "clip_denoised": False}
    # The clip was at work, but in TCD, which makes no use of its options.
    changed = np.abs(run(free)[-1] - theirs[-1]).max() > 1e-2
    assert changed == (config["_class_name"] != "TCDScheduler")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"s_noise": 0.8, "rho": 5.0},
        {"sigma_max": 40.0, "sigma_data": 0.7, "num_train_timesteps": 18},
        {"sigma_min": 0.01, "num_train_timesteps": 200},
    ],
)
def test_consistency_is_that_of_diffusers(options: dict[str, Any]) -> None:
    for steps in (1, 2, 3, 5, 10, 18):
        config = {"_class_name": CM, "clip_denoised": False, "sigma_min": 0.002, **options}
        theirs = diffusers_map(config, steps, double=False)
        assert not theirs.differs(table_map(compile_table(config, steps)), LIMIT), steps
        # In float64 the sigmas are still rounded to float32, and sigma_min is not: the last step's noise would be
        # the root of their difference. So it is given rounded.
        exact = {**config, "sigma_min": float(np.float32(config["sigma_min"]))}
        different = diffusers_map(exact, steps, double=True).differs(table_map(compile_table(exact, steps)), 1e-10)
        assert not different, f"{steps} steps: {different}"


def test_consistency_ends_without_noise() -> None:
    # In diffusers' float32 sigma_min squared may exceed itself, and the last step takes the root of what is below 0.
    low = next(low for low in np.linspace(0.002, 0.05, 400).tolist() if np.float32(low) ** 2 < np.float32(low**2))
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=low)
    scheduler.set_timesteps(2)
    sample = torch.zeros(1, 1, 1, 1)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.zeros_like(sample), t, scheduler.scale_model_input(sample, t)).prev_sample
    assert sample.isnan().all()
    assert compile_table({"_class_name": CM, "sigma_min": low}, 2).rows[-1].x_z == 0


@pytest.mark.parametrize("times", [[22, 0], [39, 30, 17, 0], [35], [17, 4]])
def test_consistency_takes_timesteps(times: list[float]) -> None:
    config = {"_class_name": CM, "clip_denoised": False, "sigma_min": float(np.float32(0.002))}
    theirs = diffusers_map(config, len(times), double=True, timesteps=times)
    # The sigmas are rounded to float32, of values that may differ in the last digit.
    assert not theirs.differs(table_map(compile_table(config, len(times), timesteps=times)), DOUBLE_LIMIT, 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(2, 400),
    low=st.floats(1e-4, 0.1),
    high=st.floats(1.0, 200.0),
    data=st.floats(0.1, 2.0),
    rho=st.floats(1.0, 12.0),
    noise=st.floats(0.0, 2.0),
    steps=st.integers(1, 50),
)
def test_consistency_for_any_schedule(
    total: int, low: float, high: float, data: float, rho: float, noise: float, steps: int
) -> None:
    config = {"_class_name": CM, "clip_denoised": False, "num_train_timesteps": total, "s_noise": noise, "rho": rho}
    config |= {"sigma_min": float(np.float32(low)), "sigma_max": high, "sigma_data": data}
    steps = min(steps, total)
    theirs = diffusers_map(config, steps, double=True)
    assert not theirs.differs(table_map(compile_table(config, steps)), 1e-9, 1e-9)


def sana(scheduler: Any) -> Any:
    """SCM as its pipeline calls it: there is one timestep more than calls, and in float64 their sines are too."""
    scheduler.timesteps = scheduler.timesteps.double()
    # The pipeline multiplies its noise by sigma_data, whatever the scheduler's own init_noise_sigma says.
    return types.SimpleNamespace(
        timesteps=scheduler.timesteps[:-1], step=scheduler.step, init_noise_sigma=scheduler.config.sigma_data
    )


class Sprint(torch.nn.Module):
    """A network in the place of SanaSprint's: any function of the sample and the time that it is told."""

    dtype, device = torch.float32, torch.device("cpu")
    config = types.SimpleNamespace(in_channels=4, guidance_embeds_scale=0.1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (0.7 * torch.tanh(x + timestep),)


@pytest.mark.parametrize("data", [0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trigflow_draws_what_its_pipeline_draws(steps: int, data: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From noise of unit variance to latents, which there are the sample divided by sigma_data."""
    start, *draws = np.random.default_rng(steps).standard_normal((steps + 1, 1, 4, 2, 2))
    scheduler, network = diffusers.SCMScheduler(sigma_data=data), Sprint()
    pipeline = diffusers.SanaSprintPipeline.__new__(diffusers.SanaSprintPipeline)
    diffusers.DiffusionPipeline.__init__(pipeline)
    pipeline.register_modules(tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=scheduler)
    pipeline.vae_scale_factor = 32
    pipeline.set_progress_bar_config(disable=True)
    given = iter(draws)
    with diffusers_noise(scheduler, lambda: next(given).astype(np.float32)):
        (theirs,) = pipeline(
            prompt_embeds=torch.zeros(1, 3, 8), prompt_attention_mask=torch.ones(1, 3), height=64, width=64,
            num_inference_steps=steps, intermediate_timesteps=1.3 if steps == 2 else None, output_type="latent",
            latents=torch.from_numpy(start).float(), use_resolution_binning=False, return_dict=False,
        )  # fmt: skip

    def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
        """The network in TrigFlow's terms, https://arxiv.org/abs/2503.09641, formula 5."""
        s = np.sin(t) / (np.sin(t) + np.cos(t))
        norm = np.sqrt(s**2 + (1 - s) ** 2)
        x = sample / data * norm
        (out,) = network(torch.from_numpy(x), torch.tensor(s))
        return data * ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * out.numpy()) / norm

    fresh = iter(draws)
    table = compile_table({"_class_name": "SCMScheduler", "sigma_data": data}, steps)
    *_, last = loop.sample(table, start, model, lambda: next(fresh))
    np.testing.assert_allclose(last.sample / data, theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("data", [0.5, 1.0])
def test_trigflow_is_that_of_diffusers(data: float) -> None:
    config = {"_class_name": "SCMScheduler", "sigma_data": data}
    for steps in STEPS:
        spaced = {} if steps == 2 else {"intermediate_timesteps": None}  # the pipeline's arguments
        for double, limit in ((True, DOUBLE_LIMIT), (False, 1e-6)):
            theirs = diffusers_map(config, steps, double=double, adapt=sana, **spaced)
            assert not theirs.differs(table_map(compile_table(config, steps)), limit), steps


@pytest.mark.parametrize("times", [[1.57, 1.2, 0.3], [1.5], [1.4, 0.2]])
def test_trigflow_takes_timesteps(times: list[float]) -> None:
    config = {"_class_name": "SCMScheduler"}
    lists = {"timesteps": [*times, 0.0], "max_timesteps": None, "intermediate_timesteps": None}
    theirs = diffusers_map(config, len(times), double=True, adapt=sana, num_inference_steps=len(times), **lists)
    assert not theirs.differs(table_map(compile_table(config, len(times), timesteps=times)), DOUBLE_LIMIT)


def test_the_consistency_decoder_is_that_of_diffusers() -> None:
    for data in (0.5, 0.8):
        config = {"_class_name": "ConsistencyDecoderScheduler", "sigma_data": data}
        table = compile_table(config, 2)
        # Its scalings are made in float32.
        assert not diffusers_map(config, 2, double=False).differs(table_map(table), LIMIT)
        later = compile_table(config, 2, begin=1)
        assert later.rows == table.rows[1:]


@pytest.mark.parametrize("kind", [*LATENT_KINDS, CM, "SCMScheduler"])
def test_beginning_later_is_as_in_diffusers(kind: str) -> None:
    config: dict[str, Any] = {"_class_name": kind}
    if kind == CM:
        config |= {"clip_denoised": False, "sigma_min": float(np.float32(0.002))}
    for steps, begin in ((4, 1), (10, 4), (20, 19)):
        table = compile_table(config, steps, begin=begin)
        if kind == "SCMScheduler":

            def adapt(scheduler: Any, begin: int = begin) -> Any:
                return sana(scheduler)

            theirs = diffusers_map(config, steps, double=True, begin=begin, adapt=adapt, intermediate_timesteps=None)
            t = theirs.times[0]
            assert table.mix == pytest.approx((np.cos(t), 0.5 * np.sin(t)))  # it has no add_noise
        else:
            theirs = diffusers_map(config, steps, double=True, begin=begin)
            scheduler = diffusers_scheduler(getattr(diffusers, kind), config, steps, False, begin)
            image, noise = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
            first = scheduler.timesteps[begin : begin + 1]
            mix = [float(scheduler.add_noise(*pair, first)) for pair in ((image, noise), (noise, image))]
            assert table.mix == pytest.approx(mix, rel=1e-5, abs=1e-6)
        assert not theirs.differs(table_map(dataclasses.replace(table, init_scale=1.0)), DOUBLE_LIMIT)


@pytest.mark.parametrize(
    ("kind", "options", "asked", "words"),
    [
        ("LCMScheduler", {"original_inference_steps": 3}, {"steps": 4}, "at most original_inference_steps, 3"),
        ("LCMScheduler", {"original_inference_steps": 1001}, {"steps": 4}, "original_inference_steps must be at most"),
        ("TCDScheduler", {"original_inference_steps": 3}, {"steps": 4}, "at most original_inference_steps, 3"),
        ("TCDScheduler", {"eta": 1.5}, {"steps": 4}, "eta must lie between 0 and 1"),
        ("LCMScheduler", {"beta_schedule": "sigmoid"}, {"steps": 4}, "beta_schedule='sigmoid'"),
        ("LCMScheduler", {}, {"steps": 2, "timesteps": [3, 900]}, "do not fall"),
        (CM, {}, {"steps": 41}, "at most num_train_timesteps, 40"),
        (CM, {"num_train_timesteps": 1}, {"steps": 1}, "num_train_timesteps"),
        (CM, {}, {"steps": 2, "timesteps": [40, 3]}, "at most 39"),
        ("SCMScheduler", {"prediction_type": "epsilon"}, {"steps": 2}, "prediction_type='epsilon'"),
        ("SCMScheduler", {}, {"steps": 1001}, "at most 1000"),
        ("SCMScheduler", {}, {"steps": 2, "timesteps": [999, 500]}, "angles"),
        ("ConsistencyDecoderScheduler", {}, {"steps": 3}, "2 steps, not 3"),
        ("ConsistencyDecoderScheduler", {"num_train_timesteps": 1000}, {"steps": 2}, "begins at timestep 1008"),
    ],
)
def test_what_makes_no_schedule_is_refused(
    kind: str, options: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        compile_table({"_class_name": kind, **options}, **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*LATENT_KINDS, CM])
def test_a_wrong_row_is_detected(kind: str) -> None:
    config: dict[str, Any] = {"_class_name": kind, "timestep_scaling": 0.01}  # LCM's share of X is 1e-9 otherwise
    if kind == CM:
        config = {"_class_name": kind, "clip_denoised": False, "sigma_min": float(np.float32(0.002))}
    table, theirs = compile_table(config, 10), diffusers_map(config, 10, double=True)
    assert not theirs.differs(table_map(table), DOUBLE_LIMIT)
    for index, field in itertools.product((0, 5), ("t", "x_x", "x_m", "h_m", "x_z")):
        right = table.rows[index]
        if getattr(right, field):
            changed = dataclasses.replace(right, **{field: getattr(right, field) * (1 + 1e-6)})
            rows = (*table.rows[:index], changed, *table.rows[index + 1 :])
            assert theirs.differs(table_map(dataclasses.replace(table, rows=rows)), DOUBLE_LIMIT)
