"""The samplers: from a scheduler_config.json to a table.

Each solver is one function that writes its paper's formulas in the registers of runtimes.table, and one row in the
``CLASSES`` of its module. alpha and sigma are the factors of signal and noise in x_t = alpha x_0 + sigma eps; x_0, eps
and v are made of the model's output in one place, ``prediction.predict``.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import schedule
from runtimes.errors import DexportError
from runtimes.samplers import (
    consistency,
    ddim,
    ddpm,
    deis,
    dpm,
    dpm_edm,
    dpm_sde,
    dpm_singlestep,
    edm,
    euler,
    flow,
    flow_other,
    heun,
    kinds,
    lms,
    names,
    options,
    pndm,
    repaint,
    sa,
    score_sde,
    unipc,
)
from runtimes.samplers.names import NAMES
from runtimes.samplers.options import merged
from runtimes.samplers.sampler import OneOf, Sampler, resolve
from runtimes.schedule import Ask
from runtimes.table import Row, Table

__all__ = [
    "CLASSES", "NAMES", "REFUSED", "OneOf", "Row", "Table", "choose", "compile_table", "default_of", "find",
    "knows", "listed", "pick",
]  # fmt: skip

CLASSES: Mapping[str, Sampler] = {
    **ddim.CLASSES,
    **ddpm.CLASSES,
    **pndm.CLASSES,
    **repaint.CLASSES,
    **score_sde.CLASSES,
    **euler.CLASSES,
    **heun.CLASSES,
    **lms.CLASSES,
    **edm.CLASSES,
    **dpm.CLASSES,
    **dpm_edm.CLASSES,
    **dpm_singlestep.CLASSES,
    **dpm_sde.CLASSES,
    **unipc.CLASSES,
    **deis.CLASSES,
    **sa.CLASSES,
    **flow.CLASSES,
    **flow_other.CLASSES,
    **consistency.CLASSES,
}
"""The samplers by the diffusers class that each stands for."""

REFUSED: Mapping[str, str] = {**names.REFUSED, **flow_other.REFUSED}
"""Classes of diffusers that no table can stand for, with the reason."""


MOST_STEPS = 10_000  # more is a slip of the keyboard, and would end in a machine without memory


def compile_table(
    scheduler: Mapping[str, Any],
    steps: int,
    *,
    sampler: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    begin: int = 0,
    mu: float | None = None,
    start: float = 0.0,
    end: float = 1.0,
    strength: float = 1.0,
) -> Table:
    """Compile a diffusers scheduler config ("_class_name" included) to a table for ``steps`` steps.

    sampler: another solver than the config's, by its name (``NAMES``) or its diffusers class; options that both
    know carry over, as with diffusers' ``from_config``. timesteps: a falling list in place of the config's spacing,
    one for each step. sigmas: likewise, and one more for the end. mu: the shift of a schedule that depends on the
    resolution. begin: the first step that is made, for a start from an image. start, end: the part of the noise's way
    that is made, for models that share it: the timesteps from 1 - end to 1 - start of those that the model was trained
    on, as diffusers' denoising_start and denoising_end. strength: the part of the noise that all steps lie in, for a
    start from an image with a sampler that spreads them over it. Beyond diffusers' options a config may hold "eta"
    (0 to 1) for DDIM and TCD, and "timesteps" or "sigmas", which are taken where none are given.
    Raises DexportError for an unknown sampler and for an option that is not supported at its value.
    """
    name, overrides = find(scheduler.get("_class_name") if sampler is None else sampler)
    found = CLASSES[name]
    whole = merged(scheduler, overrides)
    config = resolve(name, found, whole)
    if timesteps is None and sigmas is None:
        timesteps, sigmas = _lists(name, whole)
    if type(steps) is not int or steps < 1:
        raise DexportError(f"steps must be a whole number from 1, not {steps!r}")
    if steps > MOST_STEPS:
        raise DexportError(f"{steps} steps are too many; {MOST_STEPS} is the most, and no model needs as many")
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if low is not None and high is not None:
        schedule.rising(low, high)
    if not 0 <= begin < steps:
        raise DexportError(f"the first step must lie between 0 and {steps - 1}, not {begin}")
    if timesteps is not None and len(timesteps) != steps:
        raise DexportError(
            f"there are {len(timesteps)} timesteps for {steps} steps; give one for each step, or none with --scheduler "
            "timesteps=none"
        )
    if sigmas is not None and len(sigmas) != steps + 1:
        raise DexportError(f"there are {len(sigmas)} sigmas for {steps} steps; give one for each step and the end's")
    less = None if strength == 1 else strength
    for what, value in (("timesteps", timesteps), ("sigmas", sigmas), ("mu", mu), ("strength", less)):
        if value is not None and what not in found.takes:
            raise DexportError(f"{name} takes no {what} of your own; leave them out")
    if not 0 <= start < end <= 1:
        raise DexportError(f"start and end must rise within 0 to 1, not {start:g} to {end:g}")
    if (start or end < 1) and (not found.counts_down or config.get("invert_sigmas")):
        raise DexportError(f"{name}: its timesteps do not fall from num_train_timesteps; leave start and end out")
    if start:

        def rows(begin: int) -> tuple[Row, ...]:
            return compile_table(
                scheduler, steps, sampler=sampler, timesteps=timesteps, sigmas=sigmas, mu=mu, begin=begin,
                strength=strength,
            ).rows  # fmt: skip

        left = sum(row.t < _cutoff(config, start) for row in rows(0))
        if not left:
            raise DexportError(f"no step of {steps} is left after the start at {start:g}; take more steps")
        # The last step from which at least those calls are made: of two calls in a step the first is never left out.
        begin = max(begin, bisect_right(range(steps), -left, key=lambda step: -len(rows(step))) - 1)
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            table = found.solver(config, Ask(steps, timesteps, sigmas, begin, mu, strength))
    except (ArithmeticError, ValueError, IndexError) as error:
        raise DexportError(f"{name}: these betas and sigmas give no usable steps ({error})") from error
    if not (math.isfinite(table.init_scale) and all(map(_finite, table.rows))):
        raise DexportError(f"{name}: these betas and sigmas give steps that are not finite")
    if end < 1:
        made = sum(row.t >= _cutoff(config, end) for row in table.rows)
        if not made:
            raise DexportError(f"no step of {steps} is made before the end at {end:g}; take more steps")
        table = dataclasses.replace(table, rows=table.rows[:made])
    return table


def find(name: Any) -> tuple[str, dict[str, Any]]:
    """Return the diffusers class that ``name`` means and the options that it implies; DexportError if none."""
    return names.find(name, CLASSES, REFUSED)


def _cutoff(config: Mapping[str, Any], share: float) -> int:
    """The timestep at a share of the way from noise to image."""
    total = int(config["num_train_timesteps"])
    return round(total - share * total)


def _finite(row: Row) -> bool:
    values = dataclasses.astuple(dataclasses.replace(row, clip=0.0))  # clip may be infinite
    return all(math.isfinite(number) for value in values for number in (value if isinstance(value, tuple) else [value]))


def pick(
    scheduler: Mapping[str, Any], sampler: str | None, asked: Mapping[str, Any] | None = None, *, image: bool
) -> dict[str, Any]:
    """Return a scheduler config with ``sampler`` in place of its own solver, or as it is for None.

    asked: options by name, as values or as text (``options.read``), of the class that is then its own. image: whether
    there is one to start from. Raises DexportError for a sampler that there is none of, that is for another kind of
    model than the config's, or that needs an image, and for options that it does not have.
    """
    config = dict(scheduler)
    if sampler is not None or asked:
        name, overrides = find(config.get("_class_name") if sampler is None else sampler)
        config = merged(config, {"_class_name": name, **overrides})
        config = merged(config, options.read(name, CLASSES[name], asked or {}))
        try:
            own, _ = find(scheduler.get("_class_name"))
        except DexportError:
            own = name  # a class that we do not know: whoever names another for its model knows better
        kinds.check(own, scheduler, name, config, CLASSES)
    name, _ = find(config.get("_class_name"))
    if name in kinds.INVERSE and not image:
        raise DexportError(f"{name} goes from an image to noise: run it with --image, or take another sampler")
    return config


def choose(scheduler: Mapping[str, Any], sampler: str | None, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As ``pick`` for a bundle, which must draw without an image; also refuses options that are not supported."""
    config = pick(scheduler, sampler, asked, image=sampler is None)
    name, overrides = find(config.get("_class_name"))
    dynamic = resolve(name, CLASSES[name], merged(config, overrides)).get("use_dynamic_shifting")
    # A shift by resolution is known when there is one; any does here.
    compile_table(config, listed(config) or 1, mu=1.0 if dynamic and "mu" in CLASSES[name].takes else None)
    return config


def listed(config: Mapping[str, Any]) -> int | None:
    """How many steps a config's own list of timesteps or sigmas has; None where it has none that its class takes."""
    timesteps, sigmas = _lists(find(config.get("_class_name"))[0], config)
    return len(sigmas) - 1 if sigmas is not None else None if timesteps is None else len(timesteps)


def _lists(name: str, config: Mapping[str, Any]) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """The lists that a config holds in place of a spacing; a class that takes none of a kind ignores it.

    The 0 at the end of sigmas may be left out, as it is in diffusers for flow matching.
    """
    takes = CLASSES[name].takes
    timesteps, sigmas = (config.get(what) if what in takes else None for what in options.LISTS)
    if sigmas is not None and sigmas[-1] != 0:
        sigmas = [*sigmas, 0.0]
    return timesteps, sigmas


def knows(scheduler: Any, option: str) -> bool:
    """Whether a diffusers class has an option; a class that is not in CLASSES has none."""
    return scheduler in CLASSES and option in CLASSES[scheduler].options


def default_of(scheduler: str, option: str) -> Any:
    """The default of a diffusers class's option; None for a class or an option that CLASSES does not have."""
    value = CLASSES[scheduler].options.get(option) if scheduler in CLASSES else None
    return value.default if isinstance(value, OneOf) else value
