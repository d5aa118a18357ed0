"""What a sampler is made of: its solver, what it is asked for, and the options of the diffusers class it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtimes.errors import DexportError
from runtimes.schedule import Ask, Config
from runtimes.table import Table

Solver = Callable[[Config, Ask], Table]


@dataclass(frozen=True)
class OneOf:
    """An option that is supported at ``choices`` only; ``default`` is that of diffusers, and may not be one of them."""

    default: Any
    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Sampler:
    """A solver and the options of the diffusers class that it stands for.

    options: each option with its default or, where not every value is supported, ``OneOf``. A class's options that are
    not here (and all of other classes) are ignored, as diffusers' ``from_config`` ignores what a class does not know.
    takes: which of "timesteps", "sigmas", "mu" and "strength" may be given in place of the config's own. counts_down:
    whether its t falls from num_train_timesteps, so that models can share its way.
    """

    solver: Solver
    options: Mapping[str, Any]
    takes: tuple[str, ...] = ()
    counts_down: bool = True


RANGES: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "steps_offset": (0, 100_000),
    "clip_sample_range": (0, 1e6),
    "dynamic_thresholding_ratio": (0, 1),
    "sample_max_value": (0, 1e6),
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
    "snr_shift_scale": (1e-3, 1e3),
    "scaler": (1e-3, 1e3),
    "s": (0, 1),
    "sampling_eps": (0, 1),
    "jump_length": (1, 100_000),
    "jump_n_sample": (1, 1000),
    "beta_min": (0, 1e3),
    "beta_max": (0, 1e3),
    "original_inference_steps": (1, 100_000),
    "timestep_scaling": (0, 1e6),
    "sigma_data": (1e-6, 1e6),
    "s_noise": (0, 1e3),
    "rho": (1e-3, 1e3),
    "shift": (1e-3, 1e3),
    "shift_terminal": (0, 0.999),
    "lambda_min_clipped": (-math.inf, 100),  # -inf drops no timestep
}
"""The smallest and largest values of options that are numbers: beyond them lies no schedule, or endless memory."""

SPACINGS = ("leading", "linspace", "trailing")
SIGMA_SPACING = OneOf("linspace", SPACINGS)
FINAL_SIGMA = OneOf("zero", ("zero", "sigma_min"))
OFF = OneOf(False, (False,))
COMMON: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": OneOf("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": None,
    "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction", "sample")),
    "timestep_spacing": OneOf("leading", SPACINGS),
    "steps_offset": 0,
}
CLIPPING: Mapping[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
THRESHOLDING: Mapping[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
SPACED_SIGMAS: Mapping[str, Any] = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip
"""At most one of them may be set: ``schedule.respaced``."""


def resolve(scheduler_class: str, sampler: Sampler, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for each of the sampler's options, checked."""
    # In a config taken from a live diffusers scheduler, these were not in its file.
    unset = scheduler.get("_use_default_values", ())
    if not isinstance(unset, list | tuple):
        raise DexportError(f"{scheduler_class}: _use_default_values={unset!r:.60} is no list of names")
    given = {key: value for key, value in scheduler.items() if key not in unset and value is not None}
    config = {}
    for name, option in sampler.options.items():
        default = option.default if isinstance(option, OneOf) else option
        value = config[name] = given.get(name, default)
        if isinstance(option, OneOf) and value not in option.choices:
            raise DexportError(
                f"{scheduler_class} with {name}={value!r:.60} is not supported; it is with "
                f"{', '.join(repr(choice) for choice in option.choices)}"
            )
        kind = int | float if isinstance(default, float) else type(default)
        mistaken = isinstance(value, bool) and not isinstance(default, bool)
        if default is not None and (not isinstance(value, kind) or mistaken):
            raise DexportError(
                f"{scheduler_class}: {name}={value!r:.60} has the wrong type; its default is {default!r}"
            )
        _check_range(scheduler_class, name, value)
    return config


def _check_range(scheduler: str, name: str, value: Any) -> None:
    """Raise DexportError for an option of SAMPLERS, given, that lies where no schedule is."""
    if name in RANGES and value is not None:
        low, high = RANGES[name]
        if type(value) not in (int, float) or not low <= value <= high:
            raise DexportError(f"{scheduler}: {name}={value!r:.60} must be a number from {low:g} to {high:g}")
    if name == "trained_betas" and value is not None:
        numbers = isinstance(value, list | tuple) and all(type(beta) in (int, float) for beta in value)
        if not numbers or not all(0 < beta < 1 for beta in value):
            raise DexportError(f"{scheduler}: trained_betas must be a list of numbers between 0 and 1")
