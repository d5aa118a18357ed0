"""What a calibration has covered: at which timesteps and with which prompts the ranges were reached."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from calibration.observe import Statistics

WIDER = 1.1  # a range that a prompt made wider by a tenth


@dataclass(frozen=True)
class Coverage:
    """Of the observed values: how many have their greatest magnitude at each timestep, and with each prompt.

    late: the share of the values whose range the last quarter of the prompts made wider by a tenth or more; where it
    is large, more prompts would make the ranges wider still.
    """

    values: int
    calls: int
    by_timestep: dict[float, int]
    by_prompt: dict[str, int]
    late: float


@dataclass(frozen=True)
class Reached:
    """A value's range, and the calls that saw its ends."""

    low: float
    high: float
    low_at: tuple[float, str]  # timestep and prompt
    high_at: tuple[float, str]


def coverage(statistics: Statistics) -> Coverage:
    """Sum up a calibration."""
    prompts = list(dict.fromkeys(call.prompt for call in statistics.calls))
    timesteps, by_prompt = Counter({call.timestep: 0 for call in statistics.calls}), Counter(dict.fromkeys(prompts, 0))
    early = set(prompts[: max(1, len(prompts) * 3 // 4)])
    is_early = np.array([call.prompt in early for call in statistics.calls])
    late = 0
    for value in statistics.values.values():
        sizes = np.abs(value.bounds).max(axis=1)
        call = statistics.calls[int(sizes.argmax())]
        timesteps[call.timestep] += 1
        by_prompt[call.prompt] += 1
        late += bool(sizes.max() > WIDER * sizes[is_early].max())
    ordered = {t: timesteps[t] for t in sorted(timesteps, reverse=True)}
    count = len(statistics.values)
    return Coverage(count, len(statistics.calls), ordered, dict(by_prompt), late / count if count else 0.0)


def reached(statistics: Statistics, name: str) -> Reached:
    """One value's range, and where it was reached."""
    bounds = statistics.values[name].bounds
    first, last = (statistics.calls[int(place)] for place in (bounds[:, 0].argmin(), bounds[:, 1].argmax()))
    return Reached(
        float(bounds[:, 0].min()), float(bounds[:, 1].max()), (first.timestep, first.prompt),
        (last.timestep, last.prompt),
    )  # fmt: skip
