"""A start from a picture, against diffusers' own StableDiffusionImg2ImgPipeline on the same latents and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from exporter import checkpoint as checkpoints
from exporter import hub, record
from runtimes.errors import DexportError
from runtimes.image import to_array
from runtimes.loop import noise_source
from runtimes.pipeline import Pipeline
from runtimes.request import Request

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STEPS = 8
# Both sides round the latents to float32 before each call of the model, and the untrained decoder enlarges it.
LIMIT = 1e-3


@pytest.fixture(scope="module")
def pipeline(tiny_sd: Path, tiny_hub: Path) -> Pipeline:
    """The torch model behind our pipeline."""
    source, model = checkpoints.read(tiny_sd), hub.load(tiny_hub)
    opened = {name: record.TorchSession(source, name, graph, []) for name, graph in model.graphs.items()}
    return Pipeline(model, tiny_hub, opened.__getitem__)


@pytest.fixture(scope="module")
def theirs(tiny_sd: Path) -> Any:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_sd, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_is_that_of_diffusers(
    pipeline: Pipeline, theirs: Any, picture: Image.Image, name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = pipeline.encode(to_array(picture, (64, 64)))
    noise = noise_source([5], latents.shape[1:])()
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(noise).float())
    expected = theirs(
        "red apple", image=torch.from_numpy(latents), strength=strength, num_inference_steps=STEPS, guidance_scale=5.0,
        output_type="np",
    ).images  # fmt: skip
    request = Request(["red apple"], image=picture, strength=strength, steps=STEPS, guidance=5.0, seed=5, sampler=name)
    *_, last = pipeline.generate(request)
    assert last.total == int(strength * STEPS)
    assert np.abs(pipeline.decode(last.sample) - expected.transpose(0, 3, 1, 2)).max() < LIMIT


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("strength", [0.6, None])
def test_a_masked_image_is_that_of_diffusers(
    pipeline: Pipeline, theirs: Any, picture: Image.Image, name: str, strength: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mask = Image.new("L", (64, 64))
    mask.paste(255, (13, 7, 50, 41))
    noise = noise_source([5], (4, 16, 16))()
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise).float())
    monkeypatch.setattr(f"{module}.retrieve_latents", lambda output, **_: output.latent_dist.mode())
    pipe = StableDiffusionInpaintPipeline(**theirs.components, requires_safety_checker=False)
    pipe.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "red apple", image=picture, mask_image=mask, height=64, width=64, strength=strength or 1.0,
        num_inference_steps=STEPS, guidance_scale=5.0, output_type="np",
    ).images  # fmt: skip
    request = Request(
        ["red apple"], image=picture, mask=mask, strength=strength, steps=STEPS, guidance=5.0, seed=5, sampler=name
    )
    *_, last = pipeline.generate(request)
    assert np.abs(pipeline.decode(last.sample) - expected.transpose(0, 3, 1, 2)).max() < LIMIT
    kept = np.asarray(mask)[::4, ::4] == 0
    np.testing.assert_array_equal(
        last.sample[:, :, kept], np.float64(pipeline.encode(to_array(picture, (64, 64))))[:, :, kept]
    )


def test_strengths_that_leave_nothing_are_refused(pipeline: Pipeline, picture: Image.Image) -> None:
    for strength, words in ((0.05, "leaves none of 8 steps"), (0.0, "above 0"), (1.5, "at most 1")):
        with pytest.raises(DexportError, match=words):
            next(pipeline.generate(Request(["red"], image=picture, strength=strength, steps=STEPS)))


def test_a_picture_changes_by_0_8_if_nothing_is_said(pipeline: Pipeline, picture: Image.Image) -> None:
    made = [pipeline("red", image=picture, steps=STEPS, **more) for more in ({}, {"strength": np.float32(0.8)})]
    assert made[0].images[0].tobytes() == made[1].images[0].tobytes()
    assert made[0].settings[0]["strength"] == 0.8 and made[1].settings[0]["strength"] == pytest.approx(0.8)
    json.dumps(made[1].settings)


def test_a_picture_is_cut_evenly_and_laid_on_white() -> None:
    wide = Image.new("RGBA", (30, 10), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 255), (10, 0, 20, 10))
    assert np.array_equal(to_array(wide, (10, 10)), np.broadcast_to([[[0.0]], [[0.0]], [[1.0]]], (1, 3, 10, 10)))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (to_array(clear, (8, 8)) == 1).all()


def test_deep_and_turned_pictures_are_read_as_people_see_them() -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    np.testing.assert_allclose(to_array(Image.fromarray(ramp), (8, 8))[0, 0], ramp / 65535, atol=0.5 / 255 + 1e-6)
    picture = Image.new("RGB", (8, 16), "red")
    picture.paste((0, 0, 255), (0, 0, 8, 8))  # blue above red
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # as a camera notes that it was held on its side
    np.testing.assert_array_equal(to_array(turned, (16, 8)), to_array(picture, (16, 8)))


def test_what_is_no_picture_is_refused(pipeline: Pipeline, picture: Image.Image) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image": "grey.png"}, "image must be an image"),
        ({"strength": "x"}, "must be a number"),
        ({"mask": "grey.png"}, "mask must be an image"),
        ({"mask": Image.new("L", (64, 64))}, "black all over"),
        ({"mask": picture, "image": None}, "give --image too"),
    ]
    for settings, words in wrong:
        with pytest.raises(DexportError, match=words):
            next(pipeline.generate(Request(["red"], steps=STEPS, **({"image": picture} | settings))))
