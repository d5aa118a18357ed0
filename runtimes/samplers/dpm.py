"""DPM-Solver and its kin: exponential integrators in lambda = log(alpha / sigma)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import sqrt

from runtimes import schedule
from runtimes.samplers.prediction import predict
from runtimes.samplers.sampler import COMMON, FINAL_SIGMA, OFF, SIGMA_SPACING, SPACED_SIGMAS, OneOf, Sampler
from runtimes.schedule import Ask, Config
from runtimes.table import H0, H1, Table, X, row

FEW_STEPS = 15  # below which diffusers' DPM-Solver++ takes lower_order_final to heart


def dpmpp_2m(config: Config, ask: Ask) -> Table:
    """DPM-Solver++(2M), https://arxiv.org/abs/2211.01095, algorithm 2; lambda = log(alpha / sigma), H0 and H1 are x_0.

    ``heun`` weighs the slope of x_0 exactly, "midpoint" at half the step. First order where diffusers falls back to it.
    """
    times, ratios = schedule.dpm_sigmas(config, ask)  # ratios: sigma / alpha = exp(-lambda)
    count, rows = len(times), []
    for index, t in list(enumerate(times))[ask.begin :]:
        ratio, to = ratios[index], ratios[index + 1]
        alpha, alpha_to = 1 / sqrt(ratio**2 + 1), 1 / sqrt(to**2 + 1)
        x0, _ = predict(config["prediction_type"], alpha, ratio * alpha)
        decay = to / ratio - 1  # exp(-h) - 1, h the step of lambda
        x = to * alpha_to / (ratio * alpha) * X - alpha_to * decay * H0
        settle = config["euler_at_final"] or to == 0 or (config["lower_order_final"] and count < FEW_STEPS)
        if config["solver_order"] == 2 and index > ask.begin and not (settle and index == count - 1):
            h, h_before = math.log(ratio / to), math.log(ratios[index - 1] / ratio)
            slope = h / h_before * (H0 - H1)
            # Where h = 0 (Karras sigmas that end at sigma_min) both are 0.
            weight = decay / h + 1 if config["solver_type"] == "heun" and h else -decay / 2
            x = x + alpha_to * weight * slope
        rows.append(row(t, x, h=x0, shift=True))
    return Table(tuple(rows), 1.0, schedule.level(config, float(ratios[ask.begin])))


CLASSES: Mapping[str, Sampler] = {
    "DPMSolverMultistepScheduler": Sampler(
        dpmpp_2m,
        {
            **COMMON,
            **SPACED_SIGMAS,
            "timestep_spacing": SIGMA_SPACING,
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": FINAL_SIGMA,
            "solver_order": OneOf(2, (1, 2)),
            "lower_order_final": True,
            "euler_at_final": False,
            # diffusers takes the names of other schedulers' forms for dpmsolver++ and midpoint.
            "algorithm_type": OneOf("dpmsolver++", ("dpmsolver++", "deis")),
            "solver_type": OneOf("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
            "use_lu_lambdas": False,
            "use_flow_sigmas": OFF,
            "use_dynamic_shifting": OFF,
            "thresholding": OFF,
            # DDPM's fixed variances may carry over, and mean nothing here; learned ones need a further output.
            "variance_type": OneOf(None, (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")),
            "lambda_min_clipped": -math.inf,
        },
        ("timesteps",),
    ),
}
