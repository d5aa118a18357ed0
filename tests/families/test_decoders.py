"""A tiny autoencoder in place of the full one: its bundles give what diffusers' own pipeline gives with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from exporter import ensemble, reference
from exporter.build import build
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes import bundle
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.dexport.conftest import Say
from tests.families import small_flow
from tests.families.harness import ours, picture, same_noise, theirs
from tests.families.small import sd_2, sdxl, stable_diffusion

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PROMPTS = ("red apple", "a")
LEAST_DB = 60.0


def tiny(folder: Path, channels: int = 4, levels: int = 2, **options: Any) -> Any:
    """A tiny autoencoder of diffusers' own class, saved into a folder."""
    torch.manual_seed(9)
    widths = (8,) * levels  # the class makes no others
    model = AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(2,) + (1,) * (levels - 1), **options,
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(folder)
    return model.eval()


def original(folder: Path, file: Path) -> Path:
    """The decoder in TAESD's own names, whose Sequential begins with a tanh."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    found = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".layers.")
        number, _, end = rest.partition(".")
        if part == "decoder":
            found[f"{int(number) + 1}.{end}"] = value.contiguous()
    save_file(found, file)
    return file


def test_bundles_give_what_diffusers_gives_with_it(tmp_path: Path, say: Say) -> None:
    sd_2(tmp_path / "sd")
    model = tiny(tmp_path / "tiny", scaling_factor=0.7)
    said = say(
        "build", tmp_path / "sd", "--decoder", tmp_path / "tiny", "--target", "onnxruntime", "-o", tmp_path / "bundle",
        "--no-cache",
    )  # fmt: skip
    assert said.code == 0, said.err
    manifest = bundle.load_manifest(tmp_path / "bundle")
    assert "tiny_decoder/config.json" in {file.path for file in manifest.model.source}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    full, pipe.vae = pipe.vae, model
    expected = theirs(pipe, prompt=list(PROMPTS), num_inference_steps=3, guidance_scale=6.0, height=32, width=32)
    images = ours(Pipeline.load(tmp_path / "bundle"), Request(PROMPTS, steps=3, guidance=6.0))
    assert psnr(expected, images) > LEAST_DB and np.std(expected) > 0.02
    latents = load_file(tmp_path / "bundle/golden.safetensors")["decoder/inputs/sample"]
    with torch.no_grad():
        exact, fast = (
            (one.decode(latents / one.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).numpy()
            for one in (full, model)
        )
    found = manifest.accuracy["decoder"]
    assert found["psnr_db"] == pytest.approx(psnr(exact, fast), abs=0.02)
    assert (found["class"], found["against"]) == ("AutoencoderTiny", "AutoencoderKL")
    assert f"decoded by AutoencoderTiny, {found['psnr_db']:.1f} dB from the full decoder" in said.out
    assert f"PSNR {found['psnr_db']:.1f} dB" in (tmp_path / "bundle/report.html").read_text()


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_one_file_is_its_folder(names: str, tmp_path: Path) -> None:
    """Whichever names it has; the configuration is read off the shapes."""
    sd_2(tmp_path / "sd")
    model = tiny(tmp_path / "tiny")
    file = tmp_path / "tiny/diffusion_pytorch_model.safetensors"
    if names == "original":
        file = original(tmp_path / "tiny", tmp_path / "taesd_decoder.safetensors")
    read = ensemble.read(Origin(tmp_path / "sd", decoder=file))
    assert f"tiny_decoder/{file.name}" in {one.path for one in read.source()}
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(reference.load(read, "decoder")(latents), expected)


@pytest.mark.parametrize(
    ("make", "channels"), [(sdxl, 4), (small_flow.sd_3, 4), (small_flow.flux, 4), (small_flow.z_image, 4)]
)
def test_every_family_with_the_same_kind_of_latents(make: Any, channels: int, tmp_path: Path) -> None:
    """What pipelines do before they decode: latents / scaling_factor + shift_factor, of the tiny one's own."""
    make(tmp_path / "checkpoint")
    model = tiny(tmp_path / "tiny", channels, scaling_factor=0.9, shift_factor=0.1)
    read = ensemble.read(Origin(tmp_path / "checkpoint", decoder=tmp_path / "tiny"))
    shape = Shape(32, 32, free=False)
    stages = ensemble.stages(read, shape)
    assert stages[-1].decoder == "decoder" and set(ensemble.specs(read, shape)) >= {"decoder", "denoiser", "encoder"}
    latents = torch.randn(1, channels, 16, 16)
    with torch.no_grad():
        expected = (model.decode(latents / 0.9 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(reference.load(read, "decoder", (32, 32))(latents), expected)


def test_a_checkpoint_s_own_autoencoder_is_a_tiny_one(tmp_path: Path) -> None:
    stable_diffusion(tmp_path / "sd", diffusers.StableDiffusionPipeline, diffusers.DDIMScheduler(clip_sample=False), {})
    shutil.rmtree(tmp_path / "sd/vae")
    model = tiny(tmp_path / "sd/vae")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    (made,) = build(tmp_path / "sd", tmp_path / "bundle", targets=["onnxruntime"])
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    init = picture()
    with same_noise():
        words = {"prompt": "red apple", "image": init, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 6.0}
        expected = pipe(**words, output_type="np").images.transpose(0, 3, 1, 2)
    request = Request(("red apple",), image=init, strength=0.5, steps=4, guidance=6.0)
    images = ours(Pipeline.load(made.folder), request)
    assert psnr(expected, images) > LEAST_DB and model.config.latent_channels == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 16}, "latents of 16 channels, each of 2 pixels a side, where those of .* have 4, of 2"),
        ({"levels": 3}, "latents of 4 channels, each of 4 pixels a side"),
    ],
)
def test_decoders_that_do_not_fit(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    sd_2(tmp_path / "sd")
    tiny(tmp_path / "tiny", **options)
    for given in (tmp_path / "tiny", tmp_path / "tiny/diffusion_pytorch_model.safetensors"):
        with pytest.raises(DexportError, match=words):
            ensemble.read(Origin(tmp_path / "sd", decoder=given))


def test_what_is_no_decoder(tmp_path: Path) -> None:
    sd_2(tmp_path / "sd")
    save_file({"a.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"1.weight": torch.ones(3)}, tmp_path / "b.safetensors")
    for given, words in (
        (tmp_path / "a.safetensors", "not the decoder of an AutoencoderTiny"),
        (tmp_path / "b.safetensors", "not a whole decoder"),
        (tmp_path / "no", "no such folder or file"),
        (tmp_path / "sd/unet", "it must be an AutoencoderTiny or a ConsistencyDecoderVAE"),
    ):
        with pytest.raises(DexportError, match=words):
            ensemble.read(Origin(tmp_path / "sd", decoder=given))
    small_flow.qwen_image(tmp_path / "qwen")
    tiny(tmp_path / "tiny")
    with pytest.raises(DexportError, match="decodes the latents of an AutoencoderKL, which this QwenImagePipeline"):
        ensemble.read(Origin(tmp_path / "qwen", decoder=tmp_path / "tiny"))
