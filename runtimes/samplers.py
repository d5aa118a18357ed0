"""The samplers: from a scheduler_config.json to a table.

Each solver is one function that writes its paper's formulas in the registers of runtimes.table, and one row of
``SAMPLERS``. alpha and sigma are the factors of signal and noise in x_t = alpha x_0 + sigma eps; x_0, eps and v are
made of the model's output in one place, ``predict``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.schedule import Config
from runtimes.table import H0, H1, H2, H3, NOTHING, Form, M, Row, S, Table, X, Z, row

__all__ = ["SAMPLERS", "OneOf", "Row", "Sampler", "Table", "compile_table", "predict"]

Solver = Callable[[Config, int, Sequence[float] | None], Table]
FEW_STEPS = 15  # below which diffusers' DPM-Solver++ takes lower_order_final to heart
MINIMAL_VARIANCE = 1e-20  # below which diffusers' DDPM does not let the variance fall


@dataclass(frozen=True)
class OneOf:
    """An option that is supported at ``choices`` only; ``default`` is that of diffusers, and may not be one of them."""

    default: Any
    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Sampler:
    """A solver, the diffusers class that it stands for, and the options of that class.

    options: each option with its default or, where not every value is supported, ``OneOf``. A class's options that are
    not here (and all of other classes) are ignored, as diffusers' ``from_config`` ignores what a class does not know.
    overrides: options that the sampler's short name implies.
    """

    scheduler: str
    solver: Solver
    options: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)


def compile_table(
    scheduler: Mapping[str, Any],
    steps: int,
    *,
    sampler: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> Table:
    """Compile a diffusers scheduler config ("_class_name" included) to a table for ``steps`` steps.

    sampler: another solver than the config's, by its name in ``SAMPLERS`` or its diffusers class; options that both
    know carry over, as with diffusers' ``from_config``. timesteps: a falling list in place of the config's spacing,
    one for each step. Beyond diffusers' options a config may hold "eta" (0 to 1) for DDIM.
    Raises DexportError for an unknown sampler and for an option that is not supported at its value.
    """
    found = _find(sampler or scheduler.get("_class_name"))
    config = _resolve(found, scheduler)
    if type(steps) is not int or steps < 1:
        raise DexportError(f"steps must be a whole number from 1, not {steps!r}")
    if timesteps is not None and len(timesteps) != steps:
        raise DexportError(f"there are {len(timesteps)} timesteps for {steps} steps; give one for each step")
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            table = found.solver(config, steps, timesteps)
    except (ArithmeticError, ValueError, IndexError) as error:
        raise DexportError(f"{found.scheduler}: these betas and sigmas give no usable steps ({error})") from error
    if not (math.isfinite(table.init_scale) and all(map(_finite, table.rows))):
        raise DexportError(f"{found.scheduler}: these betas and sigmas give steps that are not finite")
    return table


def _finite(row: Row) -> bool:
    values = dataclasses.astuple(dataclasses.replace(row, clip=0.0))  # clip may be infinite
    return all(math.isfinite(number) for value in values for number in (value if isinstance(value, tuple) else [value]))


def choose(scheduler: Mapping[str, Any], sampler: str | None) -> dict[str, Any]:
    """Return a scheduler config with ``sampler`` in place of its own solver, or as it is for None.

    Raises DexportError, listing what there is, if the sampler or an option of the config is not supported.
    """
    found = _find(sampler or scheduler.get("_class_name"))
    config = {**scheduler, "_class_name": found.scheduler, **found.overrides} if sampler else dict(scheduler)
    compile_table(config, 1)
    return config


def default_of(scheduler: str, option: str) -> Any:
    """The default of a diffusers class's option; None for a class or an option that SAMPLERS does not have."""
    for sampler in SAMPLERS.values():
        if sampler.scheduler == scheduler:
            value = sampler.options.get(option)
            return value.default if isinstance(value, OneOf) else value
    return None


def _find(name: Any) -> Sampler:
    if isinstance(name, str) and name in SAMPLERS:
        return SAMPLERS[name]
    for sampler in SAMPLERS.values():
        if sampler.scheduler == name:
            return dataclasses.replace(sampler, overrides={})
    raise DexportError(f"no sampler {name!r:.60}; choose one with --sampler: {', '.join(SAMPLERS)}")


def _resolve(sampler: Sampler, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for each of the sampler's options, checked."""
    # In a config taken from a live diffusers scheduler, these were not in its file.
    unset = scheduler.get("_use_default_values", ())
    if not isinstance(unset, list | tuple):
        raise DexportError(f"{sampler.scheduler}: _use_default_values={unset!r:.60} is no list of names")
    given = {key: value for key, value in scheduler.items() if key not in unset and value is not None}
    given |= sampler.overrides
    config = {}
    for name, option in sampler.options.items():
        default = option.default if isinstance(option, OneOf) else option
        value = config[name] = given.get(name, default)
        if isinstance(option, OneOf) and value not in option.choices:
            raise DexportError(
                f"{sampler.scheduler} with {name}={value!r:.60} is not supported; it is with "
                f"{', '.join(repr(choice) for choice in option.choices)}"
            )
        kind = int | float if isinstance(default, float) else type(default)
        mistaken = isinstance(value, bool) and not isinstance(default, bool)
        if default is not None and (not isinstance(value, kind) or mistaken):
            raise DexportError(
                f"{sampler.scheduler}: {name}={value!r:.60} has the wrong type; its default is {default!r}"
            )
        _check_range(sampler.scheduler, name, value)
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


def predict(kind: str, alpha: float, sigma: float, x: Form = X, m: Form = M) -> tuple[Form, Form]:
    """Return x_0 and eps at x = alpha x_0 + sigma eps, where ``m`` predicts "epsilon", "sample" or "v_prediction".

    v = alpha eps - sigma x_0, https://arxiv.org/abs/2202.00512, appendix D.
    """
    if kind == "epsilon":
        if alpha == 0:
            raise DexportError(
                "a model with prediction_type='epsilon' cannot start from pure noise (rescale_betas_zero_snr=True): "
                "its x_0 is undefined there; take one with v_prediction, or leave rescale_betas_zero_snr out"
            )
        return (x - sigma * m) / alpha, m
    if kind == "sample":
        return m, (x - alpha * m) / sigma
    return alpha * x - sigma * m, alpha * m + sigma * x


def _clip(config: Config) -> float:
    return float(config["clip_sample_range"]) if config["clip_sample"] else math.inf


def ddim(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """DDIM, https://arxiv.org/abs/2010.02502, formulas 12 and 16; a and b are their alpha_t and alpha_t-1."""
    bars, eta = schedule.alpha_bars(config), config["eta"]
    if not 0 <= eta <= 1:
        raise DexportError(f"eta must lie between 0 and 1, not {eta!r}")
    rows = []
    for t, to in schedule.leaps(config, steps, timesteps):
        a, b = bars[t], bars[to] if to >= 0 else _final(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        sigma = eta * sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = sqrt(b) * H0 + sqrt(max(1 - b - sigma**2, 0.0)) * eps + sigma * Z
        rows.append(row(t, x, h=x0, clip=_clip(config)))
    return Table(tuple(rows), 1.0)


def _final(config: Config, bars: schedule.Floats) -> float:
    """alpha_bar past the last timestep."""
    return 1.0 if config["set_alpha_to_one"] else float(bars[0])


def ddpm(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """DDPM, https://arxiv.org/abs/2006.11239, formulas 6 and 7; a and b are their alpha_bar_t and alpha_bar_t-1."""
    bars, rows = schedule.alpha_bars(config), []
    times = schedule.whole(config, steps, timesteps).tolist()
    for t, to in pairwise([*times, -1]):
        a, b = bars[t], bars[to] if to >= 0 else 1.0
        x0, _ = predict(config["prediction_type"], sqrt(a), sqrt(1 - a))
        alpha, beta = a / b, 1 - a / b
        variance = beta if config["variance_type"] == "fixed_large" else max((1 - b) / (1 - a) * beta, MINIMAL_VARIANCE)
        x = sqrt(b) * beta / (1 - a) * H0 + sqrt(alpha) * (1 - b) / (1 - a) * X
        if t > 0:
            x = x + sqrt(variance) * Z
        rows.append(row(t, x, h=x0, clip=_clip(config)))
    return Table(tuple(rows), 1.0)


def pndm(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """PLMS, https://arxiv.org/abs/2202.09778: its transfer (which is DDIM's) of an eps blended from past outputs.

    Without Runge-Kutta steps at its start: as in latent diffusion, the first step is made twice, the second time with
    the mean of the outputs at both of its ends. So there is one call more than there are steps.
    """
    bars = schedule.alpha_bars(config)
    leaps = list(schedule.leaps(config, steps, timesteps))
    blends = [
        M,
        (M + H1) / 2,
        (3 * M - H1) / 2,
        (23 * M - 16 * H1 + 5 * H2) / 12,
        (55 * M - 59 * H1 + 37 * H2 - 9 * H3) / 24,
    ]
    # Each call: where the model is asked, the leap that follows, and from which sample.
    calls = [(t, t, to, X) for t, to in leaps]
    if len(leaps) > 1:
        t = leaps[1][0]
        start = leaps[0][0] if timesteps is not None else t + config["num_train_timesteps"] // steps
        calls.insert(1, (t, start, t, S))
    rows = []
    for index, (t, start, to, sample) in enumerate(calls):
        a, b = bars[start], bars[to] if to >= 0 else _final(config, bars)
        x0, eps = predict(config["prediction_type"], sqrt(a), sqrt(1 - a), sample, blends[min(index, 4)])
        x = sqrt(b) * x0 + sqrt(1 - b) * eps
        # The second call's output is used once, and not kept.
        rows.append(row(t, x, h=NOTHING if index == 1 else M, s=X if index == 0 else S, shift=index != 1))
    return Table(tuple(rows), 1.0)


def euler(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """Euler's method on dx/dsigma = eps, https://arxiv.org/abs/2206.00364, algorithm 1 up to line 5; X is x / alpha."""
    times, sigmas = schedule.euler_sigmas(config, steps, timesteps)
    rows = []
    for t, (sigma, to) in zip(times, pairwise(sigmas), strict=True):
        alpha = 1 / sqrt(sigma**2 + 1)
        _, eps = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
        rows.append(row(t, X + (to - sigma) * eps, scale=alpha))
    return Table(tuple(rows), _initial(config, sigmas))


def euler_ancestral(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """Euler's method to a lower sigma, and noise up again; DDPM's step in the terms of https://arxiv.org/abs/2206.00364."""
    times, sigmas = schedule.euler_sigmas(config, steps, timesteps)
    rows = []
    for t, (sigma, to) in zip(times, pairwise(sigmas), strict=True):
        alpha = 1 / sqrt(sigma**2 + 1)
        _, eps = predict(config["prediction_type"], alpha, sigma * alpha, alpha * X)
        up = to * sqrt(sigma**2 - to**2) / sigma
        down = to**2 / sigma  # sqrt(to^2 - up^2)
        rows.append(row(t, X + (down - sigma) * eps + up * Z, scale=alpha))
    return Table(tuple(rows), _initial(config, sigmas))


def _initial(config: Config, sigmas: schedule.Floats) -> float:
    """The deviation of X at the start, as diffusers has it: with "leading" the signal's unit variance is added."""
    top = float(max(sigmas))
    return sqrt(top**2 + 1) if config["timestep_spacing"] == "leading" else top


def dpmpp_2m(config: Config, steps: int, timesteps: Sequence[float] | None) -> Table:
    """DPM-Solver++(2M), https://arxiv.org/abs/2211.01095, algorithm 2; lambda = log(alpha / sigma), H0 and H1 are x_0.

    ``heun`` weighs the slope of x_0 exactly, "midpoint" at half the step. First order where diffusers falls back to it.
    """
    times, ratios = schedule.dpm_sigmas(config, steps, timesteps)  # ratios: sigma / alpha = exp(-lambda)
    count, rows = len(times), []
    for index, t in enumerate(times):
        ratio, to = ratios[index], ratios[index + 1]
        alpha, alpha_to = 1 / sqrt(ratio**2 + 1), 1 / sqrt(to**2 + 1)
        x0, _ = predict(config["prediction_type"], alpha, ratio * alpha)
        decay = to / ratio - 1  # exp(-h) - 1, h the step of lambda
        x = to * alpha_to / (ratio * alpha) * X - alpha_to * decay * H0
        settle = config["euler_at_final"] or to == 0 or (config["lower_order_final"] and count < FEW_STEPS)
        if config["solver_order"] == 2 and index > 0 and not (settle and index == count - 1):
            h, h_before = math.log(ratio / to), math.log(ratios[index - 1] / ratio)
            slope = h / h_before * (H0 - H1)
            # Where h = 0 (Karras sigmas that end at sigma_min) both are 0.
            weight = decay / h + 1 if config["solver_type"] == "heun" and h else -decay / 2
            x = x + alpha_to * weight * slope
        rows.append(row(t, x, h=x0, shift=True))
    return Table(tuple(rows), 1.0)


RANGES: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "steps_offset": (0, 100_000),
    "clip_sample_range": (0, 1e6),
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
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
CLIPPING: Mapping[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": OFF}

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(
        "DDIMScheduler",
        ddim,
        {**COMMON, **CLIPPING, "set_alpha_to_one": True, "rescale_betas_zero_snr": False, "eta": 0.0},
    ),
    "ddpm": Sampler(
        "DDPMScheduler",
        ddpm,
        {
            **COMMON,
            **CLIPPING,
            "rescale_betas_zero_snr": False,
            # fixed_small_log is fixed_small computed in another way; learned variances need a further output.
            "variance_type": OneOf("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large")),
        },
    ),
    "pndm": Sampler(
        "PNDMScheduler",
        pndm,
        {
            **COMMON,
            "set_alpha_to_one": False,
            "prediction_type": OneOf("epsilon", ("epsilon", "v_prediction")),
            "skip_prk_steps": OneOf(False, (True,)),
        },
        {"skip_prk_steps": True},
    ),
    "euler": Sampler(
        "EulerDiscreteScheduler",
        euler,
        {
            **COMMON,
            "timestep_spacing": SIGMA_SPACING,
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": FINAL_SIGMA,
            "interpolation_type": OneOf("linear", ("linear",)),
            "timestep_type": OneOf("discrete", ("discrete",)),
            "use_karras_sigmas": False,
            "use_exponential_sigmas": OFF,
            "use_beta_sigmas": OFF,
            "sigma_min": None,
            "sigma_max": None,
        },
    ),
    "euler_ancestral": Sampler(
        "EulerAncestralDiscreteScheduler",
        euler_ancestral,
        {**COMMON, "timestep_spacing": SIGMA_SPACING, "rescale_betas_zero_snr": False},
    ),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler",
        dpmpp_2m,
        {
            **COMMON,
            "timestep_spacing": SIGMA_SPACING,
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": FINAL_SIGMA,
            "solver_order": OneOf(2, (1, 2)),
            "lower_order_final": True,
            "euler_at_final": False,
            # diffusers takes the names of other schedulers' forms for dpmsolver++ and midpoint.
            "algorithm_type": OneOf("dpmsolver++", ("dpmsolver++", "deis")),
            "solver_type": OneOf("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
            "use_karras_sigmas": False,
            "use_exponential_sigmas": OFF,
            "use_beta_sigmas": OFF,
            "use_lu_lambdas": OFF,
            "use_flow_sigmas": OFF,
            "use_dynamic_shifting": OFF,
            "thresholding": OFF,
            # DDPM's fixed variances may carry over, and mean nothing here; learned ones need a further output.
            "variance_type": OneOf(None, (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")),
            "lambda_min_clipped": -math.inf,
        },
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
}
"""The samplers by name. The first of several with one diffusers class stands for that class."""
