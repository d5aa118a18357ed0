"""Mixed precision by measurement: as much in 8 bits as the budget allows.

The blocks are ordered by the noise that each makes for the work that it saves. From the noisiest on they are kept in
floating point, as few as will do: how many is found by halving, and each try is a real build on the real target, whose
pictures and seconds are measured. Noise of independent blocks adds up, so keeping one more never makes pictures worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from calibration.layers import Layer
from calibration.quality import Budget, Quality
from calibration.recipe import block
from runtimes.errors import GateError


@dataclass(frozen=True)
class Attempt:
    """One assignment: the blocks kept in floating point, and what was measured of it."""

    keep: tuple[str, ...]
    quality: Quality


@dataclass(frozen=True)
class Plan:
    """The attempt that was chosen, all that were made, and the noise of each block (empty where none was measured)."""

    chosen: Attempt
    attempts: tuple[Attempt, ...]
    noise: Mapping[str, float]


def work(layers: Sequence[Layer]) -> dict[str, float]:
    """Multiplications of each block, for one image."""
    total: dict[str, float] = {}
    for layer in layers:
        name = block(layer.name)
        total[name] = total.get(name, 0.0) + layer.work
    return total


def search(
    budget: Budget,
    attempt: Callable[[frozenset[str]], Quality],
    noise: Callable[[], Mapping[str, float]],
    works: Mapping[str, float],
) -> Plan:
    """Find the fewest blocks to keep in floating point for the budget.

    attempt: builds and measures. noise: of each block, asked for only if everything in 8 bits is not good enough.
    Raises GateError with the best that was found where even that is not.
    """
    made: dict[int, Attempt] = {}
    order: list[str] = []

    def tried(count: int) -> Quality:
        if count not in made:
            keep = tuple(order[:count])
            made[count] = Attempt(keep, attempt(frozenset(keep)))
        return made[count].quality

    if tried(0).median >= budget.psnr:
        return Plan(made[0], (made[0],), {})
    shares = noise()
    order += sorted(shares, key=lambda name: shares[name] / max(works.get(name, 0.0), 1.0), reverse=True)
    low, high = 0, len(order)  # low is known not to be enough
    if tried(high).median < budget.psnr:
        best = max(made.values(), key=lambda one: one.quality.median)
        costly = ", ".join(sorted(shares, key=lambda name: shares[name], reverse=True)[:3])
        raise GateError(
            f"the budget of {budget.psnr:g} dB cannot be met: the best found has {best.quality.median:.1f} dB, with "
            f"{len(best.keep)} of {len(order)} blocks in floating point (most costly: {costly}); this bundle was not "
            "written; lower the budget, or build in a floating-point precision"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if tried(middle).median >= budget.psnr:
            high = middle
        else:
            low = middle
    good = [one for one in made.values() if one.quality.median >= budget.psnr]
    chosen = min(good, key=lambda one: len(one.keep))
    return Plan(chosen, tuple(made[count] for count in sorted(made)), shares)
