"""A sampler's table for people and for plots: what each call of the model gets, and what becomes of its output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes import bundle, cascade, samplers, strict_json
from runtimes.errors import DexportError
from runtimes.manifest import Model, from_json
from runtimes.table import Row

ROUNDING = 1e-12  # of the largest term: what is smaller is what a difference of equals left
REGISTERS = ("X", "S", "M", "H0", "H1", "H2", "H3", "Z")


def describe(
    name: str, *, steps: int = 20, source: Path | str | None = None, scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compile the sampler ``name`` and return, ready for JSON::

        {"sampler": diffusers class, "steps", "calls", "init_scale",
         "rows": [{"t", "sigma", "calls", "scale", "H0", "clip", "threshold", "X", "S", "shift", "deviation"}]}

    H0, X and S are what the registers become, as sums by register: {"X": 0.98, "M": -0.1}, without terms that are
    rounding noise. sigma is the ratio of noise to signal at a step's first call; None at its others, and where there is
    no signal. calls: whether the row calls the model; above it is how many do. clip and threshold bound H0, deviation
    is Z's where the model learned it: see runtimes.table. source: a checkpoint, hub, bundle or scheduler_config.json
    whose schedule is taken; the defaults of the class for None. scheduler: options of the sampler, by name.
    Raises DexportError for an unknown sampler, wrong steps or options, and a source that has no schedule.
    """
    config = {} if source is None else scheduler_of(Path(source))
    class_name, implied = samplers.find(name)
    config = samplers.options.merged(config, {"_class_name": class_name, **implied})
    asked = samplers.options.read(class_name, samplers.CLASSES[class_name], scheduler or {})
    table = samplers.compile_table(samplers.options.merged(config, asked), steps)
    return {
        "sampler": samplers.find(name)[0],
        "steps": steps,
        "calls": sum(row.calls for row in table.rows),
        "init_scale": table.init_scale,
        "rows": [_row(row) for row in table.rows],
    }


def _scheduler(model: Model) -> dict[str, Any]:
    return dict(cascade.main(model.stages)[0].scheduler)


def scheduler_of(path: Path) -> dict[str, Any]:
    """Return the scheduler config of a checkpoint, hub, bundle or .json; DexportError where there is none."""
    if (path / bundle.MANIFEST).is_file():
        return _scheduler(bundle.load_manifest(path, check=False).model)
    if (path / bundle.HUB).is_file():
        file = path / bundle.HUB
        return _scheduler(from_json(Model, file.read_text(encoding="utf-8"), str(file)))
    file = path / "scheduler" / "scheduler_config.json" if path.is_dir() else path
    if not file.is_file():
        raise DexportError(f"{path}: there is no checkpoint, hub, bundle or scheduler_config.json")
    try:
        config = strict_json.loads(file.read_bytes(), finite=False)
    except ValueError as error:
        raise DexportError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise DexportError(f"{file}: not a scheduler's config")
    return config


def _row(row: Row) -> dict[str, Any]:
    signal, noise = row.level or (0.0, 0.0)
    return {
        "t": row.t,
        "sigma": noise / signal if signal > 0 else None,  # at SCM's start rounding leaves it just below 0
        "calls": row.calls,
        "scale": row.scale,
        "H0": _sum((row.h_x, 0.0, row.h_m)),
        "clip": row.clip if math.isfinite(row.clip) else None,
        "threshold": row.threshold or None,
        "X": _sum((row.x_x, row.x_s, row.x_m, *row.x_h, row.x_z)),
        "S": _sum((row.s_x, row.s_s, row.s_m, *row.s_h, row.s_z)),
        "shift": row.shift,
        "deviation": row.deviation or None,
    }


def _sum(weights: tuple[float, ...]) -> dict[str, float]:
    least = ROUNDING * max(map(abs, weights))
    return {name: weight for name, weight in zip(REGISTERS, weights, strict=False) if abs(weight) > least}


def formula(terms: Mapping[str, float]) -> str:
    """A sum as people write it: ``0.98 X - 0.1 M``."""
    text = ""
    for name, weight in terms.items():
        sign = (" - " if text else "-") if weight < 0 else (" + " if text else "")
        size = abs(weight)
        text += sign + (name if size == 1 else f"{size:.4g} {name}")
    return text or "0"


def spread(deviation: Sequence[float]) -> str:
    """Z's deviation as the model learned it, V being the second half of its output: ``exp(-4.2 + 1.3 V)``."""
    start, slope, power = deviation
    if power:
        return f"V^{power:g}"
    return f"exp({start:.4g}{' - ' if slope < 0 else ' + '}{abs(slope):.4g} V)"
