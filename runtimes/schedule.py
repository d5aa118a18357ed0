"""Noise schedules and timesteps: what a scheduler_config.json says of betas, spacing and sigmas.

The names are those of the papers: beta and alpha, alpha_bar (diffusers' ``alphas_cumprod``), and sigma, the ratio of
noise to signal, sqrt(1 - alpha_bar) / sqrt(alpha_bar), as in https://arxiv.org/abs/2206.00364.

diffusers computes these in float32. Here they are float64, but beta, alpha and alpha_bar are rounded as there, since
near t = 0 that rounding is up to 1e-4 of 1 - alpha_bar; so are the sigmas that a sampler steps through. What is left is
the rounding of diffusers' own arithmetic, at most 1e-5 of 1 - alpha_bar (with zero terminal SNR) and 1e-7 of sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import DexportError

Config = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ask:
    """What a table is asked for.

    timesteps, sigmas: lists in place of the config's own spacing, one value a step (sigmas: one more, the end's).
    begin: the first step that is made; the ones before it are left out, and a history starts empty there. mu: the
    shift of a schedule that depends on the resolution. strength: the part of the noise that all steps lie in.
    """

    steps: int
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    begin: int = 0
    mu: float | None = None
    strength: float = 1.0


BETA_LIMIT = 0.999  # of the cosine schedule, https://arxiv.org/abs/2102.09672, section 3.2
COSINE_OFFSET = 0.008  # likewise
EXPONENT = -12.0  # of the beta schedule "exp", diffusers' own
ALMOST_ZERO = 2.0**-24  # stands for alpha_bar = 0 where sigma must be finite; diffusers takes the same
KARRAS_RHO = 7.0  # https://arxiv.org/abs/2206.00364, table 1
BETA_SHAPE = 0.6  # both parameters of the beta distribution, https://arxiv.org/abs/2407.12173, section 4


def alpha_bars(config: Config) -> Floats:
    """Return alpha_bar for t = 0 .. num_train_timesteps - 1: the share of the signal's variance left at t.

    With ``rescale_betas_zero_snr`` the last one is 0. Raises DexportError for betas outside of (0, 1) or too few.
    """
    betas = betas_of(config)
    total = config["num_train_timesteps"]
    if betas.shape != (total,) or not ((betas > 0) & (betas < 1)).all():
        raise DexportError(f"the scheduler's betas must be {total} numbers between 0 and 1; check its config")
    if "snr_shift_scale" in config:
        return _shifted_bars(config, betas)
    bars = np.cumprod(np.float32(1) - betas, dtype=np.float64)
    if config.get("rescale_betas_zero_snr"):
        return _zero_snr(bars)
    return bars.astype(np.float32).astype(np.float64)


def _shifted_bars(config: Config, betas: Floats | NDArray[np.float32]) -> Floats:
    """alpha_bar with the ratio of signal to noise divided by ``snr_shift_scale``, https://arxiv.org/abs/2408.06072.

    In the precision of diffusers' CogVideoX: "scaled_linear" in float64, all else in float32.
    """
    if config["trained_betas"] is None and config["beta_schedule"] == "scaled_linear":
        start, end, total = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
        betas = np.linspace(math.sqrt(start), math.sqrt(end), total) ** 2
    shift = float(config["snr_shift_scale"])
    plain: NDArray[np.floating] = np.cumprod(1 - betas, dtype=np.float64).astype(betas.dtype)
    bars = (plain / (shift + (1 - shift) * plain)).astype(np.float64)
    return _zero_snr(bars) if config["rescale_betas_zero_snr"] else bars


def _zero_snr(bars: Floats) -> Floats:
    """Return alpha_bar rescaled so that nothing is left of the signal at the end."""
    root = np.sqrt(bars)  # https://arxiv.org/abs/2305.08891, algorithm 1
    scaled: Floats = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return scaled


def betas_of(config: Config) -> NDArray[np.float32]:
    """Return beta for t = 0 .. num_train_timesteps - 1, by ``beta_schedule`` or as ``trained_betas`` lists them."""
    start, end, total = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], np.float32)
    if config["beta_schedule"] == "linear":
        return linspace(start, end, total)
    if config["beta_schedule"] == "scaled_linear":
        return np.square(linspace(math.sqrt(start), math.sqrt(end), total))

    if config["beta_schedule"] == "sigmoid":
        # https://arxiv.org/abs/2203.02923, appendix; in torch's order of float32 operations
        steep = 1 / (1 + np.exp(-linspace(-6, 6, total).astype(np.float64)))
        return steep.astype(np.float32) * np.float32(end - start) + np.float32(start)
    signal = {"laplace": _laplace, "exp": _exponential}.get(config["beta_schedule"], _cosine)
    betas = [min(1 - signal((i + 1) / total) / signal(i / total), BETA_LIMIT) for i in range(total)]
    return np.asarray(betas, np.float32)


def _cosine(t: float) -> float:
    """alpha_bar at the share ``t`` of the way: https://arxiv.org/abs/2102.09672, formula 17."""
    return math.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2


def _exponential(t: float) -> float:
    """Likewise in diffusers' "exp": e^(-12 t)."""
    return math.exp(EXPONENT * t)


def _laplace(t: float) -> float:
    """Likewise, https://arxiv.org/abs/2407.03297, table 1, in diffusers' form: the root of a share of the signal."""
    ratio = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


def linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """torch.linspace in float32, bit for bit: a float32 step, counted from the nearer end, rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), rising, falling).astype(np.float32)


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


def whole(config: Config, ask: Ask) -> NDArray[np.int64]:
    """Return the timesteps of the samplers that live on whole ones, falling."""
    times = spaced(config, ask.steps).round() if ask.timesteps is None else given(config, ask.timesteps)
    return times.astype(np.int64)


def leaps(config: Config, ask: Ask) -> list[tuple[int, int]]:
    """Return each timestep with the one that its step goes to, -1 being past the end.

    As in diffusers' DDIM and PNDM a spaced step goes ``num_train_timesteps // steps`` down, which is not always the
    next timestep; on a given list it goes to the next one.
    """
    times = whole(config, ask).tolist()
    stride = config["num_train_timesteps"] // ask.steps
    if ask.timesteps is None:
        return [(t, t - stride) for t in times]
    return list(zip(times, [*times[1:], -1], strict=True))


def euler_sigmas(config: Config, ask: Ask, *, exact_times: bool = False) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1] of the samplers of k-diffusion's family; timesteps may be fractions.

    exact_times: leave them in float64, where most of diffusers' classes round them to float32.
    """
    kept = (lambda times: times) if exact_times else rounded
    table = sigma_table(config)
    if ask.sigmas is not None:
        sigmas = falling(ask.sigmas)
        return rounded(times_of(sigmas[:-1], table)), rounded(sigmas)
    times = spaced(config, ask.steps) if ask.timesteps is None else given(config, ask.timesteps, whole=False)
    times = kept(times)
    if config.get("interpolation_type") == "log_linear":
        sigmas = exponential(float(table[0]), float(table[-1]), ask.steps + 1)
    else:
        sigmas = np.interp(times, np.arange(len(table)), table)
    respaced = respace(config, sigmas, ask)
    if respaced is not None:
        sigmas, times = respaced, kept(times_of(respaced, table))
    elif config.get("interpolation_type") == "log_linear":
        return _continuous(config, times, rounded(sigmas), ask)  # its own end takes the place of another
    return _continuous(config, times, _end(config, sigmas, table), ask)


def _continuous(config: Config, times: Floats, sigmas: Floats, ask: Ask) -> tuple[Floats, Floats]:
    """The same, with log(sigma) / 4 as timesteps for models that were trained so (EDM's c_noise)."""
    if config.get("timestep_type") != "continuous" or config["prediction_type"] != "v_prediction":
        return times, sigmas
    if ask.timesteps is not None:
        raise DexportError("a list of timesteps and timestep_type='continuous' exclude each other; leave one out")
    return rounded(np.log(sigmas[:-1]) / 4), sigmas


def dpm_sigmas(config: Config, ask: Ask) -> tuple[Floats, Floats]:
    """Return timesteps [n] and sigmas [n + 1] of DPM-Solver's family: whole timesteps of which none is 0.

    ``lambda_min_clipped`` drops the timesteps of which the log of signal to noise is below it. With
    ``use_flow_sigmas`` the sigmas are those of a rectified flow, x = (1 - sigma) x_0 + sigma eps.
    """
    table = sigma_table(config)
    respaced = respace(config, table[::-1], ask)
    if respaced is not None:
        times = times_of(respaced, table)
        # diffusers rounds Karras' and Lu's for all but the cosine schedule, and then cuts all to whole numbers.
        if (config.get("use_karras_sigmas") or config.get("use_lu_lambdas")) and (
            config["beta_schedule"] != "squaredcos_cap_v2"
        ):
            times = times.round()
        return np.trunc(times), _end(config, respaced, table)
    if config.get("use_flow_sigmas"):
        _no_list("use_flow_sigmas", ask)
        total = config["num_train_timesteps"]
        sigmas = shifted(1 - np.linspace(1, 1 / total, ask.steps + 1), flow_shift(config, ask))[:0:-1]
        return np.trunc(sigmas * total), _end(config, sigmas, table)
    last = int(np.count_nonzero(-np.log(table) >= config.get("lambda_min_clipped", -math.inf)))
    if ask.timesteps is None:
        times = spaced(config, ask.steps, points=ask.steps + 1, last=last).round()
    else:
        times = given(config, ask.timesteps)
    return times, _end(config, np.interp(times, np.arange(len(table)), table), table)


def level(config: Config, sigma: float) -> tuple[float, float]:
    """Return the factors alpha and sigma of signal and noise: of a rectified flow, else of a preserved variance."""
    if config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def respace(config: Config, sigmas: Floats, ask: Ask) -> Floats | None:
    """Return ``steps`` sigmas spread over the range of ``sigmas`` in the way that the config asks for, if it does.

    The ends are ``sigma_max`` and ``sigma_min`` where the config has them.
    """
    wanted = [option for option in RESPACINGS if config.get(option)]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise DexportError(f"{' and '.join(wanted)} exclude each other; set one of them")
    _no_list(wanted[0], ask)
    own = config.get("sigma_min"), config.get("sigma_max")
    low, high = (
        float(end) if given is None else given for given, end in zip(own, (sigmas[-1], sigmas[0]), strict=True)
    )
    if own != (None, None) and len(sigmas) > 1:  # a single step has no range, and an inverted schedule's rises
        rising(low, high)
    return RESPACINGS[wanted[0]](low, high, ask.steps)


def rising(low: float, high: float) -> None:
    """Raise DexportError for a range of sigmas that is empty or reversed."""
    if low >= high:
        raise DexportError(f"sigma_min must be below sigma_max, not {low:g} and {high:g}")


def karras(low: float, high: float, steps: int, rho: float = KARRAS_RHO) -> Floats:
    """Return ``steps`` sigmas from ``high`` down to ``low``: https://arxiv.org/abs/2206.00364, formula 5."""
    start, end = high ** (1 / rho), low ** (1 / rho)
    result: Floats = (start + np.linspace(0, 1, steps) * (end - start)) ** rho
    return result


def exponential(low: float, high: float, steps: int) -> Floats:
    """Return ``steps`` sigmas from ``high`` down to ``low``, even in their logarithm."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(low: float, high: float, steps: int) -> Floats:
    """Return ``steps`` sigmas from ``high`` down to ``low`` at the quantiles of Beta(0.6, 0.6).

    https://arxiv.org/abs/2407.12173, section 3.2: most steps near both ends.
    """
    quantiles = np.array([_beta_quantile(p) for p in 1 - np.linspace(0, 1, steps)])
    result: Floats = low + quantiles * (high - low)
    return result


RESPACINGS: Mapping[str, Callable[[float, float, int], Floats]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
    "use_lu_lambdas": exponential,  # https://arxiv.org/abs/2206.00927, section 3.4: even in lambda = -log sigma
}


def _beta_quantile(p: float) -> float:
    """The x below which Beta(0.6, 0.6) has the share ``p``: Newton's method, held inside a shrinking bracket."""
    if p in (0.0, 1.0):
        return p
    if p > 0.5:  # the density is symmetric
        return 1 - _beta_quantile(1 - p)
    low, high, x = 0.0, 0.5, p
    whole_beta = math.gamma(BETA_SHAPE) ** 2 / math.gamma(2 * BETA_SHAPE)
    for _ in range(100):
        error = _beta_share(x) - p
        low, high = (x, high) if error < 0 else (low, x)
        step = error * whole_beta / (x * (1 - x)) ** (BETA_SHAPE - 1)
        x, before = (x - step if low < x - step < high else (low + high) / 2), x
        if abs(x - before) <= 1e-16 * before:
            break
    return x


def _beta_share(x: float) -> float:
    """The regularized incomplete beta function I_x(a, a) for x up to 1/2: the series https://dlmf.nist.gov/8.17.E8."""
    a = BETA_SHAPE
    term = total = 1.0
    for n in range(200):  # the ratio of terms is about x: 60 would do
        term *= (2 * a + n) / (a + 1 + n) * x
        total += term
    return float((x * (1 - x)) ** a / a * total / (math.gamma(a) ** 2 / math.gamma(2 * a)))


def shifted(sigmas: Floats, shift: float) -> Floats:
    """Return a flow's sigmas shifted towards noise: https://arxiv.org/abs/2403.03206, formula 23."""
    result: Floats = shift * sigmas / (1 + (shift - 1) * sigmas)
    return result


def flow_shift(config: Config, ask: Ask) -> float:
    """The shift of DPM-Solver's family: the config's, or exp(mu) where it depends on the resolution."""
    if ask.mu is None:
        return float(config["flow_shift"])
    if not config.get("use_dynamic_shifting"):
        raise DexportError("this scheduler has no shift by resolution (use_dynamic_shifting is off); leave mu out")
    return math.exp(ask.mu)


def times_of(sigmas: Floats, table: Floats) -> Floats:
    """Return the timesteps, with fractions, at which ``table`` reaches ``sigmas``; between two, linear in the log."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _end(config: Config, sigmas: Floats, table: Floats) -> Floats:
    final = float(table[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return rounded(np.append(sigmas, final))


def rounded(values: Floats) -> Floats:
    """As diffusers keeps them, in float32."""
    return values.astype(np.float32).astype(np.float64)


def falling(sigmas: Sequence[float]) -> Floats:
    values = np.asarray(sigmas, np.float64)
    if values.ndim != 1 or len(values) < 2 or not (values >= 0).all() or (np.diff(values) >= 0).any():
        raise DexportError("the list of sigmas must fall to 0 or more without a repetition; one more than steps")
    return values


def _no_list(option: str, ask: Ask) -> None:
    if ask.timesteps is not None or ask.sigmas is not None:
        raise DexportError(f"a list of timesteps or sigmas and {option} exclude each other; leave one out")
