"""Noise schedules and timesteps: what a scheduler_config.json says of betas, spacing and sigmas.

The names are those of the papers: beta and alpha, alpha_bar (diffusers' ``alphas_cumprod``), and sigma, the ratio of
noise to signal, sqrt(1 - alpha_bar) / sqrt(alpha_bar), as in https://arxiv.org/abs/2206.00364.

diffusers computes these in float32. Here they are float64, but beta, alpha and alpha_bar are rounded as there, since
near t = 0 that rounding is up to 1e-4 of 1 - alpha_bar; so are the sigmas that a sampler steps through. What is left is
the rounding of diffusers' own arithmetic, at most 1e-5 of 1 - alpha_bar (with zero terminal SNR) and 1e-7 of sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import DexportError

Config = Mapping[str, Any]
Floats = NDArray[np.float64]

BETA_LIMIT = 0.999  # of the cosine schedule, https://arxiv.org/abs/2102.09672, section 3.2
COSINE_OFFSET = 0.008  # likewise
ALMOST_ZERO = 2.0**-24  # stands for alpha_bar = 0 where sigma must be finite; diffusers takes the same
KARRAS_RHO = 7.0  # https://arxiv.org/abs/2206.00364, table 1


def alpha_bars(config: Config) -> Floats:
    """Return alpha_bar for t = 0 .. num_train_timesteps - 1: the share of the signal's variance left at t.

    With ``rescale_betas_zero_snr`` the last one is 0. Raises DexportError for betas outside of (0, 1) or too few.
    """
    betas = _betas(config)
    total = config["num_train_timesteps"]
    if betas.shape != (total,) or not ((betas > 0) & (betas < 1)).all():
        raise DexportError(f"the scheduler's betas must be {total} numbers between 0 and 1; check its config")
    bars = np.cumprod(np.float32(1) - betas, dtype=np.float64)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(bars)  # https://arxiv.org/abs/2305.08891, algorithm 1
        scaled: Floats = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return scaled
    return bars.astype(np.float32).astype(np.float64)


def _betas(config: Config) -> NDArray[np.float32]:
    start, end, total = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], np.float32)
    if config["beta_schedule"] == "linear":
        return _linspace(start, end, total)
    if config["beta_schedule"] == "scaled_linear":
        return np.square(_linspace(math.sqrt(start), math.sqrt(end), total))

    def signal(t: float) -> float:
        return math.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / total) / signal(i / total), BETA_LIMIT) for i in range(total)]
    return np.asarray(betas, np.float32)


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """torch.linspace in float32, bit for bit: a float32 step, counted from the nearer end, rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def sigma_table(config: Config) -> Floats:
    """Return sigma for each t that the model was trained on, rising; finite also at zero terminal SNR."""
    bars = alpha_bars(config)
    if config.get("rescale_betas_zero_snr"):
        bars[-1] = ALMOST_ZERO
    table: Floats = np.sqrt((1 - bars) / bars)
    return table


def spaced(config: Config, steps: int, *, points: int | None = None, last: int | None = None) -> Floats:
    """Return ``steps`` timesteps, falling, by ``timestep_spacing``: https://arxiv.org/abs/2305.08891, table 2.

    points: spread that many and leave out the last ones; last: as if the model was trained on t < last only.
    "linspace" gives fractions, for the caller to round or to keep.
    """
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    points, last = points or steps, last or total
    if steps > total:
        raise DexportError(f"steps must be at most {total}, the timesteps that the model was trained on, not {steps}")
    if spacing == "linspace":
        times = np.linspace(0, last - 1, points)[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(points) * (last // points))[::-1][:steps] + float(config["steps_offset"])
    else:
        # For some counts rounding lets arange run one too far.
        times = np.arange(last, 0, -total / steps)[:steps].round() - 1
    return _check(config, times, f"{steps} steps with timestep_spacing={spacing!r}")


def given(config: Config, timesteps: Sequence[float], *, whole: bool = True) -> Floats:
    """Return timesteps that the user gave; whole: fractions are refused."""
    times = _check(config, np.asarray(timesteps, np.float64), "the list of timesteps")
    if whole and (times != times.round()).any():
        raise DexportError("the list of timesteps must hold whole numbers for this sampler")
    return times


def _check(config: Config, times: Floats, what: str) -> Floats:
    total = config["num_train_timesteps"]
    if times.ndim != 1 or not ((times >= 0) & (times <= total - 1)).all() or (np.diff(times) >= 0).any():
        raise DexportError(
            f"{what} do not fall from at most {total - 1} to at least 0 without a repetition; take fewer"
        )
    return times


def whole(config: Config, steps: int, timesteps: Sequence[float] | None) -> NDArray[np.int64]:
    """Return the timesteps of the samplers that live on whole ones, falling."""
    times = spaced(config, steps).round() if timesteps is None else given(config, timesteps)
    return times.astype(np.int64)


def leaps(config: Config, steps: int, timesteps: Sequence[float] | None) -> Iterator[tuple[int, int]]:
    """Yield each timestep with the one that its step goes to, -1 being past the end.

    As in diffusers' DDIM and PNDM a spaced step goes ``num_train_timesteps // steps`` down, which is not always the
    next timestep; on a given list it goes to the next one.
    """
    times = whole(config, steps, timesteps)
    stride = config["num_train_timesteps"] // steps
    if timesteps is None:
        yield from ((int(t), int(t) - stride) for t in times)
    else:
        yield from zip(times.tolist(), [*times[1:].tolist(), -1], strict=True)


def euler_sigmas(config: Config, steps: int, timesteps: Sequence[float] | None) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1] of the samplers of k-diffusion's family; timesteps may be fractions."""
    table = sigma_table(config)
    times = spaced(config, steps) if timesteps is None else given(config, timesteps, whole=False)
    times = times.astype(np.float32).astype(np.float64)
    sigmas = np.interp(times, np.arange(len(table)), table)
    if config.get("use_karras_sigmas"):
        _no_list("use_karras_sigmas", timesteps)
        low, high = config.get("sigma_min"), config.get("sigma_max")
        sigmas = karras(sigmas[-1] if low is None else low, sigmas[0] if high is None else high, steps)
        times = times_of(sigmas, table).astype(np.float32).astype(np.float64)
    return times, _end(config, sigmas, table)


def dpm_sigmas(config: Config, steps: int, timesteps: Sequence[float] | None) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1] of DPM-Solver's family: whole timesteps of which none is 0.

    ``lambda_min_clipped`` drops the timesteps of which the log of signal to noise is below it.
    """
    table = sigma_table(config)
    if config["use_karras_sigmas"]:
        _no_list("use_karras_sigmas", timesteps)
        sigmas = karras(float(table[0]), float(table[-1]), steps)
        times = times_of(sigmas, table)
        # diffusers rounds for all but the cosine schedule, and then cuts to whole numbers.
        times = np.trunc(times) if config["beta_schedule"] == "squaredcos_cap_v2" else times.round()
        return times, _end(config, sigmas, table)
    last = int(np.count_nonzero(-np.log(table) >= config["lambda_min_clipped"]))
    if timesteps is None:
        times = spaced(config, steps, points=steps + 1, last=last).round()
    else:
        times = given(config, timesteps)
    return times, _end(config, np.interp(times, np.arange(len(table)), table), table)


def _no_list(option: str, timesteps: Sequence[float] | None) -> None:
    if timesteps is not None:
        raise DexportError(f"a list of timesteps and {option} exclude each other; leave one out")


def _end(config: Config, sigmas: Floats, table: Floats) -> Floats:
    final = float(table[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return np.append(sigmas, final).astype(np.float32).astype(np.float64)


def karras(low: float, high: float, steps: int) -> Floats:
    """Return ``steps`` sigmas from ``high`` down to ``low``: https://arxiv.org/abs/2206.00364, formula 5."""
    start, end = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    result: Floats = (start + np.linspace(0, 1, steps) * (end - start)) ** KARRAS_RHO
    return result


def times_of(sigmas: Floats, table: Floats) -> Floats:
    """Return the timesteps, with fractions, at which ``table`` reaches ``sigmas``; between two, linear in the log."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
