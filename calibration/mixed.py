"""Mixed precision by measurement: as much in 8 bits as the budget allows, where it saves most time for its noise.

Both sides are measured: the noise that each block makes in the output, and the seconds that 8 bits save in it on the
target. Layers that 8 bits make no faster stay in floating point from the start. Then blocks are kept in floating
point by their noise for a second saved, the greatest first, as few as will do. How many is found by halving, and each
try is a real build on the real target, whose pictures are judged. Noise of independent blocks adds up, so keeping one
more makes pictures better, but for what a few pictures cannot tell; and where noise and seconds do add up, this order
is within one block of the fastest assignment of all (Dantzig 1957, on the knapsack problem). Since seconds may not, the
good tries race in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from calibration.quality import Budget, Quality
from runtimes.errors import GateError

MARGIN = 0.05  # of a layer's time in floating point: saving less is not worth any noise
TIE = 0.03  # of a model's time: who keeps more in floating point must be faster by more
SURE = 2.0  # standard errors
LEAST = 1e-9  # seconds saved, for the order: who saves nothing is kept first


@dataclass(frozen=True)
class Gain:
    """Seconds a call of one form, what another form saves of them, and the standard error of that."""

    seconds: float
    saved: float
    error: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether the other form surely is no faster, or too little: what is only doubtful is left to the plan."""
        return self.saved + SURE * self.error < MARGIN * self.seconds

    @property
    def faster(self) -> bool:
        """Whether the other form surely is faster, and not a little."""
        return self.saved - SURE * self.error > TIE * self.seconds


@dataclass(frozen=True)
class Costs:
    """What 8 bits cost and save.

    noise: by block, and by layer for ``slow`` ones, the share of noise in the output's power at some timesteps, were
    only this quantized. saved: seconds a call, likewise; negative where 8 bits are slower. slow: layers that 8 bits
    make no faster; they are not counted in their blocks. timed: whether ``saved`` was; if not, it is multiplications.
    """

    noise: Mapping[str, Mapping[float, float]]
    saved: Mapping[str, float]
    slow: tuple[str, ...] = ()
    timed: bool = True

    def share(self, name: str) -> float:
        """The mean noise of a block or layer over the timesteps."""
        return float(np.mean(list(self.noise[name].values())))


@dataclass(frozen=True)
class Attempt:
    """One assignment: what is kept in floating point, blocks by name and single layers, and what was measured of it."""

    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    quality: Quality

    @property
    def keep(self) -> frozenset[str]:
        """Blocks and layers together."""
        return frozenset((*self.blocks, *self.layers))


@dataclass(frozen=True)
class Plan:
    """The attempt that was chosen, all that were made, and the costs that decided (None: everything is in 8 bits).

    races: by the number of blocks kept, what other good attempts save beside the one that keeps the fewest.
    """

    chosen: Attempt
    attempts: tuple[Attempt, ...]
    costs: Costs | None = None
    races: Mapping[int, Gain] = field(default_factory=dict)


def search(
    budget: Budget, attempt: Callable[[frozenset[str]], Quality], measure: Callable[[], Costs],
    race: Callable[[frozenset[str], frozenset[str]], Gain],
) -> Plan:  # fmt: skip
    """Find the fastest assignment that meets the budget; of those as fast, the one that keeps the fewest blocks.

    attempt: builds with these blocks and layers in floating point, and judges. measure: asked for only if everything
    in 8 bits is not good enough. race: what the second of two assignments that were built saves beside the first.
    Raises GateError with the best that was found where even that is not good enough.
    """
    first = Attempt((), (), attempt(frozenset()))
    if first.quality.median >= budget.psnr:
        return Plan(first, (first,))
    costs = measure()
    order = sorted(
        (name for name in costs.noise if name not in costs.slow),
        key=lambda name: costs.share(name) / max(costs.saved[name], LEAST), reverse=True,
    )  # fmt: skip
    made = {} if costs.slow else {0: first}

    def is_good(count: int) -> bool:
        if count not in made:
            keep = frozenset((*order[:count], *costs.slow))
            made[count] = Attempt(tuple(order[:count]), costs.slow, attempt(keep))
        return made[count].quality.median >= budget.psnr

    most = len(order) - 1  # what has nothing in 8 bits is no quantized model
    if most < 0 or not is_good(most):
        raise _missed(budget, [first, *made.values()], costs, len(order))
    low, high = -1 if costs.slow else 0, most  # low is known not to be enough; -1: all in 8 bits, slow ones too
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_good(middle) else (middle, high)
    attempts = [*([first] if costs.slow else []), *(made[count] for count in sorted(made))]
    fewest = made[high]
    races = {
        count: race(fewest.keep, one.keep) for count, one in sorted(made.items()) if count > high and is_good(count)
    }
    winner = max((count for count in races if races[count].faster), key=lambda count: races[count].saved, default=high)
    return Plan(made[winner], tuple(attempts), costs, races)


def _missed(budget: Budget, attempts: list[Attempt], costs: Costs, blocks: int) -> GateError:
    best = max(attempts, key=lambda one: one.quality.median)
    total = sum(costs.share(name) for name in costs.noise) or 1.0
    free = [name for name in costs.noise if name not in costs.slow]
    costly = sorted(free, key=costs.share, reverse=True)[:3]
    if blocks > 1:
        shares = ", ".join(f"{name} {costs.share(name) / total:.0%}" for name in costly)
        found = (
            f"with {len(best.blocks)} of {blocks} blocks in floating point (most costly in 8 bits, by their share of "
            f"the noise: {shares})"
        )
    else:  # then there was no choice
        only = f"but for {free[0]}" if free else "of what 8 bits make faster"
        found = f"and there is nothing {only} that could be left in floating point"
    return GateError(
        f"the budget of {budget.psnr:g} dB cannot be met: the best found has {best.quality.median:.2f} dB, {found}; "
        "this bundle was not written; lower the budget, or build in a floating-point precision"
    )
