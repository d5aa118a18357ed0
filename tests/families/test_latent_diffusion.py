"""Latent diffusion with a VQ autoencoder, unconditional and for superresolution, against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from exporter import hub
from exporter.compile import compile_graph
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.image import read_settings, to_images
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import backend
from runtimes.target import Target
from tests.dexport.conftest import Say
from tests.families.harness import Built, ours, theirs
from tests.families.small import vq

Make = Callable[[str], Built]
LEAST_DB = 80  # fp32 gives 100 and more where no latent falls to another vector of the codebook; none does here
TARGETS = ("onnxruntime", "openvino")


def low(height: int = 32, width: int = 32) -> Image.Image:
    """A picture to be made larger."""
    random = np.random.default_rng(3).random((1, 3, 8, 8))
    return to_images(random)[0].resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_are_diffusers_own(built: Make, target: str) -> None:
    made = built("ldm")
    expected = theirs(made.checkpoint, num_inference_steps=4, batch_size=2)
    pictures = ours(made.pipeline(target), Request(images=2, steps=4))
    assert pictures.shape == (2, 3, 64, 64) and np.std(expected) > 0.05
    assert psnr(expected, pictures) > LEAST_DB


@pytest.mark.parametrize("target", TARGETS)
def test_larger_pictures_are_diffusers_own(built: Make, target: str) -> None:
    made = built("superresolution")
    expected = theirs(made.checkpoint, image=low(), num_inference_steps=4)
    picture = ours(made.pipeline(target), Request(image=low(), steps=4))
    assert picture.shape == (1, 3, 128, 128) and np.std(expected) > 0.05
    assert psnr(expected, picture) > LEAST_DB
    other = ours(made.pipeline(target), Request(image=Image.new("RGB", (32, 32)), steps=4))
    assert psnr(expected, other) < 40  # it goes by what it is shown


def test_the_nearest_vector_of_the_codebook_is_the_classs_own() -> None:
    """Also where its vectors are wider than the autoencoder's latents, and where the decoder's norms go by them."""
    from exporter.families.latent_diffusion import decode

    for options in ({"vq_embed_dim": 5}, {"norm_type": "spatial", "block_out_channels": (32, 32, 32)}):
        model = vq(**options).eval()
        latents = torch.randn(3, options.get("vq_embed_dim", 3), 6, 10)
        with torch.no_grad():
            expected = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
            got = decode(type("Modules", (), {"vqvae": model}), latents)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_encoder_is_the_classs_own(built: Make) -> None:
    made = built("ldm")
    model = diffusers.VQModel.from_pretrained(made.checkpoint / "vqvae")
    image = np.random.default_rng(0).random((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(image) * 2 - 1).latents.numpy() * model.config.scaling_factor
    for target in TARGETS:
        np.testing.assert_allclose(made.pipeline(target).encode(image), expected, atol=1e-5)


def test_a_free_size_is_that_of_the_picture(built: Make, tmp_path: Path) -> None:
    made = built("superresolution")
    model = hub.export(made.checkpoint, tmp_path, dynamic_shape=True, overwrite=True)
    assert model.stages[0].multiple == 2
    runtime = backend("onnxruntime")
    for name in model.graphs:
        (tmp_path / f"{name}-ort").mkdir()

    def load(name: str) -> Any:
        graph = model.graphs[name]
        done = compile_graph(
            tmp_path / graph.file, graph, tmp_path / f"{name}-ort", Target.parse("onnxruntime"), "fp32"
        )
        return runtime.open(tmp_path / done.file, done, "cpu", 2, None)

    pipeline = Pipeline(model, tmp_path, load)
    picture = low(32, 64)
    expected = theirs(made.checkpoint, image=picture, num_inference_steps=2)
    got = ours(pipeline, Request(image=picture, steps=2))
    assert got.shape == (1, 3, 128, 256) and psnr(expected, got) > LEAST_DB
    assert pipeline.sample_shape(Request(image=low(33, 65))) == (3, 32, 64)
    with pytest.raises(DexportError, match="multiple of 8 pixels"):
        pipeline.sample_shape(Request(image=picture, size=(132, 128)))
    with pytest.raises(DexportError, match="needs 2 at least"):
        pipeline.sample_shape(Request(image=low(1, 64)))


def test_make_a_picture_larger(say: Say, built: Make, tmp_path: Path) -> None:
    bundle = built("superresolution").bundles["onnxruntime"]
    low().save(tmp_path / "low.png")
    said = say("run", bundle, "--image", tmp_path / "low.png", "--steps", 2, "-o", tmp_path / "x.png")
    assert said.code == 0, said.err
    settings = read_settings(tmp_path / "x.png")
    assert settings["size"] == [128, 128] and not {"prompt", "strength"} & set(settings)
    for words, line in (
        ((), "give a picture with --image"),
        (("--image", tmp_path / "low.png", "--strength", 0.5), "leave strength and mask out"),
    ):
        said = say("run", bundle, *words, "-o", tmp_path / "y.png")
        assert said.code == 2 and line in said.err and said.err.count("\n") == 1
    said = say("bench", bundle, "--repeats", 1, "--json")
    assert said.code == 0 and said.json["steps"] == 100, said.err


@pytest.mark.parametrize(
    ("name", "component", "changes", "words"),
    [
        ("superresolution", "unet", {"in_channels": 7}, "7 channels in and 3 out; a LDMSuperResolutionPipeline has 3"),
        ("ldm", "vqvae", {"scaling_factor": 0}, "vqvae/config.json: scaling_factor=0"),
        ("ldm", "vqvae", {"latent_channels": 4}, "3 channels in and 3 out"),
        ("ldm", "unet", {"sample_size": 17}, "68x68 pixels: this model needs multiples of 8"),
    ],
)
def test_configs_that_cannot_be_exported(
    built: Make, tmp_path: Path, name: str, component: str, changes: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(built(name).checkpoint, folder)
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DexportError, match=words) as error:
        hub.export(folder, tmp_path / "hub")
    assert "\n" not in str(error.value)
