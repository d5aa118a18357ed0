"""Every family: what its bundles draw is what diffusers' own pipeline draws from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtimes.accuracy import psnr
from runtimes.request import Request
from tests.families import small_flow
from tests.families.harness import Family, Made, build_engines, draw, hole, make, picture, prove
from tests.families.small import inpainting, latent_consistency, refiner, sd_2, sdxl, sdxl_inpainting, sdxl_turbo
from tests.families.small_transformers import aura_flow, lumina2, pixart_alpha, pixart_sigma, sana, sana_sprint

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LATENTS = 1e-3  # largest difference; both sides round what goes into each call of the model to float32
PICTURES = 45.0  # dB
PROMPTS = ("red apple", "a")
PLAIN = {"clean_caption": False, "use_resolution_binning": False}
HOLE = {"prompts": PROMPTS, "image": picture(), "mask": hole(), "guidance": 6.0}


FAMILIES = [
    Family("sd-2", sd_2, {"prompts": PROMPTS, "steps": 4, "guidance": 6.0}),
    Family("sdxl-refined", sdxl, {"prompts": PROMPTS, "steps": 6, "guidance": 6.0}, refiner=refiner),
    Family("sdxl-turbo", sdxl_turbo, {"prompts": PROMPTS, "steps": 2}, said={"guidance": 0, "steps": 2}),
    Family("refiner", refiner, {"prompts": PROMPTS, "steps": 8, "strength": 0.5, "guidance": 6.0, "image": picture()}),
    Family("inpainting", inpainting, {**HOLE, "steps": 6, "strength": 0.6}),
    Family("sdxl-inpainting", sdxl_inpainting, {**HOLE, "steps": 4}),
    Family("lcm", latent_consistency, {"prompts": PROMPTS, "steps": 3, "guidance": 6.0}),
    Family(
        "pixart-alpha", pixart_alpha, {"prompts": ("Red apple ", "a"), "steps": 4, "guidance": 4.5}, told=PLAIN,
        shape=(16, 24),
    ),
    Family("pixart-sigma", pixart_sigma, {"prompts": PROMPTS, "steps": 4, "guidance": 4.5}, told=PLAIN),
    Family("sana", sana, {"prompts": ("Red apple ", "a"), "steps": 4, "guidance": 4.5}, told=PLAIN, shape=(32, 64)),
    Family("sana-sprint", sana_sprint, {"prompts": PROMPTS, "steps": 2, "guidance": 4.5}, told=PLAIN, shape=(32, 32)),
    Family("aura-flow", aura_flow, {"prompts": PROMPTS, "steps": 4, "guidance": 3.5}, shape=(16, 24)),
    Family("lumina2", lumina2, {"prompts": PROMPTS, "steps": 4, "guidance": 4.0}, shape=(32, 48)),
    Family("sd-3", small_flow.sd_3, {"prompts": PROMPTS, "steps": 4, "guidance": 5.0}),
    Family(
        "sd-3-of-pictures", small_flow.sd_3_of_pictures,
        {"prompts": PROMPTS, "steps": 6, "strength": 0.5, "guidance": 5.0, "image": picture()},
    ),
    Family("flux-dev", small_flow.flux, {"prompts": PROMPTS, "steps": 4, "guidance": 3.0}, shape=(32, 48)),
    Family(
        "qwen-image", small_flow.qwen_image, {"prompts": PROMPTS, "steps": 4, "guidance": 3.0}, shape=(32, 48),
        told={"true_cfg_scale": 3.0, "guidance_scale": None, "negative_prompt": ["", ""]},
    ),
    Family(
        "z-image", small_flow.z_image, {"prompts": (f"{PROMPTS[0]} on a table", "a"), "steps": 4, "guidance": 4.0},
        shape=(32, 48), told={"guidance_scale": 3.0},  # which counts from 0 there
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_bundle_draws_what_diffusers_draws(made: Made, name: str) -> None:
    latents, pictures = draw(made.built.pipeline(name), Request(**made.family.asked))
    assert np.abs(latents - made.latents).max() <= LATENTS
    assert psnr(made.pictures, pictures) >= PICTURES
    assert np.std(made.pictures) > 0.01 and np.std(latents[0] - latents[-1]) > 0.01  # else anything would agree


def test_prompts_and_guidance_change_the_picture(made: Made) -> None:
    """Or the comparison above would prove little."""
    asked, pipeline = made.family.asked, made.built.pipeline("onnxruntime")
    others = [{"prompts": asked["prompts"][::-1]}] + [{"guidance": 1.0}] * ("guidance" in asked)
    for other in others:
        latents, _ = draw(pipeline, Request(**asked | other))
        assert np.abs(latents - made.latents).max() > 10 * LATENTS


def test_bundle_proves_itself(made: Made) -> None:
    """Whichever checkpoint a graph is of."""
    assert ("stages" in prove(made.built)) == (made.family.refiner is not None)


def test_engines_are_built(made: Made, tmp_path: Path) -> None:
    build_engines(made.built, tmp_path)
