"""PNDM with its Runge-Kutta steps against diffusers: see oracle.py. Without them: test_maps.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.errors import DexportError
from runtimes.samplers import choose, compile_table
from tests.runtimes.samplers.oracle import (
    COSINE,
    DOUBLE_LIMIT,
    LATENT,
    OWN,
    SPACINGS,
    diffusers_map,
    table_map,
)

PNDM = {"_class_name": "PNDMScheduler"}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "latent": LATENT,
    "cosine": {**COSINE, "set_alpha_to_one": True},
    "own": OWN,
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", CASES)
def test_runge_kutta_is_that_of_diffusers(case: str, prediction: str, spacing: str) -> None:
    for steps in (4, 5, 7, 10, 25, 50):
        config = {**PNDM, **CASES[case], "prediction_type": prediction, "timestep_spacing": spacing}
        ours = table_map(compile_table(config, steps))
        assert len(ours.times) == steps + 9
        # The cosine schedule starts at an alpha_bar of 1e-9, where diffusers cancels float32 digits.
        for double, limit in ((True, DOUBLE_LIMIT), (False, 1e-3 if case == "cosine" else 1e-5)):
            different = diffusers_map(config, steps, double=double).differs(ours, limit)
            assert not different, (steps, double, different)


@settings(max_examples=30, deadline=None)
@given(
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(SPACINGS),
    skip=st.booleans(),
    total=st.integers(100, 1200),
    first=st.floats(1e-5, 1e-3),
    last=st.floats(2e-3, 0.05),
    offset=st.integers(0, 1),
    to_one=st.booleans(),
    steps=st.integers(4, 50),
)
def test_any_schedule(**drawn: Any) -> None:
    config = {
        **PNDM,
        "prediction_type": drawn["prediction"],
        "timestep_spacing": drawn["spacing"],
        "skip_prk_steps": drawn["skip"],
        "num_train_timesteps": drawn["total"],
        "beta_start": drawn["first"],
        "beta_end": drawn["last"],
        "steps_offset": drawn["offset"],
        "set_alpha_to_one": drawn["to_one"],
    }
    ours = table_map(compile_table(config, drawn["steps"]))
    theirs = diffusers_map(config, drawn["steps"], double=True)
    if len(theirs.times) == len(ours.times):  # see test_trailing_never_runs_past_the_end
        assert not theirs.differs(ours, DOUBLE_LIMIT)


def test_fewer_than_four_steps_leave_runge_kutta_out() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        PNDMScheduler().set_timesteps(3)
    for steps in (1, 2, 3):
        assert compile_table(PNDM, steps) == compile_table({**PNDM, "skip_prk_steps": True}, steps)
    assert choose(PNDM, None) == PNDM


def test_beginning_later_makes_the_runge_kutta_steps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers goes on with the stages that it would have made before, on timesteps that are not theirs.
    config = {**PNDM, **LATENT}
    scheduler = PNDMScheduler(**LATENT)
    scheduler.set_timesteps(10)
    spaced = scheduler._timesteps

    def shortened(self: Any, steps: int) -> None:
        """The timesteps of the last 7 of 10 steps, as set_timesteps makes them of all."""
        self.num_inference_steps, self.ets, self.counter, self.cur_model_output = 10, [], 0, 0
        ends = np.array(spaced[:7][-4:]).repeat(2) + np.tile([0, 50], 4)
        self.prk_timesteps = ends[:-1].repeat(2)[1:-1][::-1].copy()
        self.plms_timesteps = spaced[:4][::-1].copy()
        self.timesteps = torch.from_numpy(np.concatenate([self.prk_timesteps, self.plms_timesteps]).astype(np.int64))

    monkeypatch.setattr(PNDMScheduler, "set_timesteps", lambda self, num_inference_steps: shortened(self, 10))
    table = compile_table(config, 10, begin=3)
    assert not diffusers_map(config, 10, double=True).differs(table_map(table), DOUBLE_LIMIT)
    bar = float(scheduler.alphas_cumprod[601])
    assert table.mix == pytest.approx((bar**0.5, (1 - bar) ** 0.5), rel=1e-6)


def test_runge_kutta_takes_no_list_of_timesteps() -> None:
    times = [900, 700, 500, 300, 100]
    with pytest.raises(DexportError, match="set skip_prk_steps to True"):
        compile_table(PNDM, 5, timesteps=times)
    assert len(compile_table({**PNDM, "skip_prk_steps": True}, 5, timesteps=times).rows) == 6


def test_a_prediction_that_diffusers_has_not_is_refused() -> None:
    with pytest.raises(DexportError, match="prediction_type='sample'"):
        compile_table({**PNDM, "prediction_type": "sample"}, 5)
