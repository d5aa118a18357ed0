"""diffusers as the oracle: the whole linear map of a scheduler, step by step.

A sampler is linear in its start, in each output of the model and in each draw of noise. So diffusers' scheduler is run
once on unit vectors: element 0 of the sample is the start's coefficient, element 1 + k that of the k-th output, and
the rest those of the noise. The same unit vectors go through our table and our loop.

Two oracles. diffusers as it is rounds its coefficients, and for some samplers the sample, to float32. And diffusers'
own code made to compute in float64 (its tables widened after they are made, its casts to float32 left out): there the
maps must agree to 1e-10.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch.overrides import TorchFunctionMode

from runtimes import loop
from runtimes.samplers import Table

STEPS = (1, 2, 3, 5, 10, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}  # SD 1.5's
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
OWN = {"trained_betas": np.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400}
ZERO_SNR = {**LATENT, "rescale_betas_zero_snr": True}
STEP_OPTIONS = ("eta", "use_clipped_model_output")  # which diffusers takes as arguments of step()

DOUBLE_LIMIT = 1e-10  # with diffusers' code in float64; the same cancellation leaves 1e-12 there


class Float64(TorchFunctionMode):
    """Leaves out the casts to float32 in the code that it surrounds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and torch.float32 in args:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Map:
    """What a sampler makes of unit vectors: timesteps [R], the model's inputs and the samples after it [R, 1 + 2R]."""

    times: np.ndarray
    inputs: np.ndarray
    samples: np.ndarray

    def differs(self, other: Map, limit: float, time_limit: float = 0.0) -> str:
        """Say where ``other`` is not this map: a relative error above ``limit`` at any step; "" where it is."""
        if self.times.shape != other.times.shape or (np.abs(self.times - other.times) > time_limit).any():
            return f"timesteps {self.times} and {other.times}"
        # What our loop gives to the model is float32.
        for name, bound in (("inputs", max(limit, 2e-7)), ("samples", limit)):
            mine, its = getattr(self, name), getattr(other, name)
            error = np.abs(mine - its).max(axis=1) / np.abs(mine).max(axis=1)
            if not (error <= bound).all():
                return f"{name}: relative errors {error}"
        return ""


def units(rows: int) -> np.ndarray:
    return np.eye(1 + 2 * rows)[:, None, :, None, None]  # [1 + 2R unit vectors, B = 1, C = 1 + 2R, 1, 1]


@contextlib.contextmanager
def diffusers_noise(scheduler: Any, draw: Any) -> Iterator[None]:
    """Let the scheduler take its noise from ``draw()``."""
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", lambda shape, **_: torch.from_numpy(draw()), create=True):
        yield


@functools.lru_cache(maxsize=8)
def made(kind: Any, config: str) -> Any:
    """One scheduler for all numbers of steps: making it takes longer than running it."""
    return kind.from_config(json.loads(config))


def diffusers_scheduler(
    kind: Any, config: dict[str, Any], steps: int, double: bool, begin: int = 0, **lists: Any
) -> Any:
    """diffusers' scheduler of class ``kind``, made from ``config``, at its step ``begin``.

    lists: "timesteps", "sigmas" or "mu", as its ``set_timesteps`` takes them.
    """
    scheduler = copy.copy(made(kind, json.dumps(config)))
    if double and hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if config.get("rescale_betas_zero_snr") and "snr_shift_scale" in scheduler.config:
            bars = made(kind, json.dumps({**config, "rescale_betas_zero_snr": False})).alphas_cumprod.double()
            scheduler.alphas_cumprod = sys.modules[kind.__module__].rescale_zero_terminal_snr(bars)
        elif config.get("rescale_betas_zero_snr"):
            alphas = 1 - made(kind, json.dumps({**config, "rescale_betas_zero_snr": False})).betas
            betas = rescale_zero_terminal_snr(1 - alphas.double())
            last = scheduler.alphas_cumprod[-1]  # not 0 in classes that divide by it
            scheduler.alphas_cumprod = torch.cat([torch.cumprod(1 - betas, 0)[:-1], last[None]])
    listed = any(name in lists for name in ("timesteps", "sigmas"))
    scheduler.set_timesteps(**({} if listed else {"num_inference_steps": steps}), **lists)
    if double:
        for name in ("final_alpha_cumprod", "initial_alpha_cumprod", "one", "sigmas"):
            if getattr(scheduler, name, None) is not None:
                setattr(scheduler, name, getattr(scheduler, name).double())
        if hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):  # of a whole t, in float32 otherwise
            scalings = scheduler.get_scalings_for_boundary_condition_discrete
            scheduler.get_scalings_for_boundary_condition_discrete = lambda t: scalings(t.double())
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * getattr(scheduler, "order", 1))
    return scheduler


def diffusers_map(
    config: dict[str, Any],
    steps: int,
    *,
    double: bool,
    kind: str | None = None,
    begin: int = 0,
    adapt: Callable[[Any], Any] = lambda scheduler: scheduler,
    **lists: Any,
) -> Map:
    """What diffusers makes of the unit vectors; ``kind``: another class than the config's.

    adapt: wraps a scheduler whose step() takes other arguments than most, to be called as its pipeline does.
    Where it begins at a later step, the start is what the first unit vector says, of scale 1.
    """
    extra = {key: value for key, value in config.items() if key in STEP_OPTIONS}
    known = {key: value for key, value in config.items() if key not in STEP_OPTIONS}
    named = getattr(diffusers.schedulers, kind or config["_class_name"])
    scheduler = diffusers_scheduler(named, known, steps, double, begin, **lists)
    scheduler, plain = adapt(scheduler), scheduler
    times = scheduler.timesteps[begin * getattr(scheduler, "order", 1) :]
    rows = len(times)
    unit = units(rows)
    inputs, samples = [], []
    sample = torch.from_numpy(unit[0]) * (1.0 if begin else getattr(scheduler, "init_noise_sigma", 1.0))
    scaled = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # which flows have no use for
    with Float64() if double else contextlib.nullcontext():
        for index, t in enumerate(times):
            inputs.append(scaled(sample, t).flatten())
            with diffusers_noise(plain, lambda index=index: unit[1 + rows + index]):
                sample = scheduler.step(torch.from_numpy(unit[1 + index]), t, sample, **extra).prev_sample
            samples.append(sample.flatten())
    return Map(times.double().numpy(), torch.stack(inputs).numpy(), torch.stack(samples).numpy())


def table_map(table: Table) -> Map:
    """What our loop makes of them."""
    unit = units(len(table.rows))
    inputs, samples = [], []

    def model(sample: np.ndarray, t: float, row: object) -> np.ndarray:
        inputs.append(sample.flatten())
        return unit[len(inputs)]

    def noise() -> np.ndarray:
        return unit[len(table.rows) + len(inputs)]

    for step in loop.sample(table, unit[0], model, noise):
        samples.append(step.sample.flatten())
    return Map(np.array([row.t for row in table.rows]), np.stack(inputs), np.stack(samples))
