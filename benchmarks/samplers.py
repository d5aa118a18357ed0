"""What a step of a sampler costs, without the model: our loop beside diffusers' ``scheduler.step``, in one run.

    python benchmarks/samplers.py [--repeats 20]

The model is a function that returns the same array each time. "loop" is our time a step on latents of one number, where
there is next to no arithmetic: the loop's own cost. The other columns are on the latents of SD 1.5 and of SDXL; a ratio
above 1 is how many times longer diffusers takes. Medians over repeats, in which both sides take turns; one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import numpy as np
import torch

from runtimes import loop
from runtimes.samplers import NAMES, compile_table

STEPS = 20
SMALL = (1, 1, 1, 1)
SHAPES = {"SD 1.5": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128)}
MEASURED = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lms", "flow_euler", "lcm")
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def ours(name: str, shape: tuple[int, ...]) -> Callable[[], float]:
    """Return a function that runs the whole loop and returns its seconds a step."""
    table = compile_table(SCHEDULE, STEPS, sampler=name)
    start, output, draw = np.random.default_rng(0).standard_normal((3, *shape))
    output = output.astype(np.float32)

    def run() -> float:
        begin = time.perf_counter()
        for _ in loop.sample(table, start, lambda sample, t, row: output, lambda: draw):
            pass
        return (time.perf_counter() - begin) / len(table.rows)

    return run


def theirs(name: str, shape: tuple[int, ...]) -> Callable[[], float]:
    """The same with diffusers' scheduler, as its pipelines call it."""
    kind, options = NAMES[name]
    own = {} if "Flow" in kind else SCHEDULE
    scheduler = getattr(diffusers, kind)(**own, **options)
    start, output = torch.randn((2, *shape))
    generator = torch.Generator().manual_seed(0)
    takes_generator = "generator" in scheduler.step.__code__.co_varnames

    def run() -> float:
        scheduler.set_timesteps(STEPS)
        sample = start * getattr(scheduler, "init_noise_sigma", 1.0)
        extra = {"generator": generator} if takes_generator else {}
        begin = time.perf_counter()
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            sample = scheduler.step(output, t, sample, return_dict=False, **extra)[0]
        return (time.perf_counter() - begin) / len(scheduler.timesteps)

    return run


def main() -> None:
    """Measure and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=20)
    repeats = arguments.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{'microseconds a step':18}{'loop':>8}", *(f"{what:>10}{'diffusers':>12}{'ratio':>7}" for what in SHAPES))
    for name in MEASURED:
        line = f"{name:18}"
        own = ours(name, SMALL)
        line += f"{median(own() for _ in range(repeats)) * 1e6:9.0f}"
        for shape in SHAPES.values():
            a, b = ours(name, shape), theirs(name, shape)
            times = [(a(), b()) for _ in range(repeats + 1)][1:]
            mine, other = median(t for t, _ in times), median(t for _, t in times)
            line += f" {mine * 1e6:10.0f}{other * 1e6:12.0f}{other / mine:7.1f}"
        print(line)


if __name__ == "__main__":
    main()
