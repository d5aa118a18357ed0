"""The steps of a stage: its scheduler's table, with what a pipeline gives to the scheduler beyond its config.

That are the sigmas, of a model that was trained to go through even ones, and the shift that depends on the resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import samplers
from runtimes.errors import DexportError
from runtimes.manifest import Stage, Start
from runtimes.samplers.flow import SHIFTING, mu_of
from runtimes.samplers.sampler import Sampler, resolve
from runtimes.table import Table

FLOW = samplers.CLASSES["FlowMatchEulerDiscreteScheduler"]
# Options with which a scheduler spaces a flow's sigmas by itself; diffusers' pipelines then give it none.
OWN_SIGMAS = ("use_flow_sigmas",)


def compile_stage(
    stage: Stage, steps: int, sample: Sequence[int], *, scheduler: Mapping[str, Any] | None = None, begin: int = 0,
    strength: float = 1.0,
) -> Table:  # fmt: skip
    """Compile a stage's table for samples of the shape ``sample`` [C, h, w].

    scheduler: another config than the stage's, of another sampler say. begin: the first step that is made. strength:
    what the scheduler is told of it (``start``). Raises DexportError as ``samplers.compile_table`` does.
    """
    config = stage.scheduler if scheduler is None else scheduler
    name, overrides = samplers.find(config.get("_class_name"))
    takes = samplers.CLASSES[name].takes
    spaced = any({**config, **overrides}.get(option) for option in OWN_SIGMAS) or samplers.listed(config) is not None
    even = stage.sigmas == "even" and "sigmas" in takes and not spaced
    return samplers.compile_table(
        config, steps, begin=begin, start=stage.span[0], end=stage.span[1], strength=strength,
        sigmas=[*np.linspace(1, 1 / steps, steps).tolist(), 0.0] if even else None,
        mu=_shift(stage, {**config, **overrides}, sample) if "mu" in takes else None,
    )  # fmt: skip


def start(how: Start, scheduler: Mapping[str, Any], steps: int, strength: float) -> tuple[int, float]:
    """The first of ``steps`` that is made of an image, and the strength that the scheduler is told of.

    How many steps are made is rounded as in diffusers' pipelines (``get_timesteps``), floats and all: 28 of 50 at 0.58.
    Raises DexportError where none is left.
    """
    name, _ = samplers.find(scheduler.get("_class_name"))
    if how.steps == "spread" and "strength" in samplers.CLASSES[name].takes:
        return 0, strength
    if how.steps == "ceil":
        begin = int(max(steps - min(steps * strength, steps), 0))
    else:
        begin = steps - min(int(steps * strength), steps)
    if begin == steps:
        raise DexportError(f"a strength of {strength:g} leaves none of {steps} steps; raise one of them")
    return begin, 1.0


def _shift(stage: Stage, config: Mapping[str, Any], sample: Sequence[int]) -> float | None:
    """The shift by resolution, of a scheduler that asks for one."""
    if not config.get("use_dynamic_shifting") or stage.patch is None:
        return None
    return shift(config, (sample[-2] // stage.patch) * (sample[-1] // stage.patch))


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """The mu of a scheduler's config for pictures of ``tokens``. Raises DexportError for numbers that give none."""
    line = resolve(str(config["_class_name"]), Sampler(FLOW.solver, SHIFTING), config)
    try:
        return mu_of(line, tokens)
    except ZeroDivisionError as error:
        raise DexportError("the scheduler's base_image_seq_len and max_image_seq_len must differ") from error
