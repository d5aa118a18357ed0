"""An autoencoder that is given beside a checkpoint: what it decodes and encodes is what diffusers' own does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file, save_file

from exporter import checkpoint, ensemble, reference
from exporter.ensemble import Origin
from runtimes.errors import DexportError
from tests.exporter import ldm


@pytest.fixture
def better(tiny_sd: Path, tmp_path: Path) -> Path:
    """The folder of an autoencoder with other weights, and another scale, for the same latents."""
    torch.manual_seed(5)
    config = {**AutoencoderKL.load_config(tiny_sd / "vae"), "scaling_factor": 0.3}
    vae = AutoencoderKL.from_config(config)
    vae.save_pretrained(tmp_path / "better")
    return tmp_path / "better"


@pytest.fixture
def without(tiny_sd: Path, tmp_path: Path) -> Path:
    """The checkpoint without an autoencoder."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "without"))
    shutil.rmtree(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    return folder


def check(read: checkpoint.Checkpoint, vae: Any, scale: float) -> None:
    """Both graphs give what the autoencoder of diffusers gives with this scale."""
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = (vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
        found = reference.load(read, "decoder")(latents)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        image = torch.rand_like(found)
        encoded = reference.load(read, "encoder")(image)
        expected = vae.encode(image * 2 - 1).latent_dist.mode() * scale
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


def bare(better: Path, file: Path, names: str) -> Path:
    """The autoencoder's weights in one file, in diffusers' names or in those of the training code."""
    tensors = load_file(better / "diffusion_pytorch_model.safetensors")
    if names != "diffusers":
        config = json.loads((better / "config.json").read_text())
        tensors = {name.removeprefix(names): np.ascontiguousarray(value)
                   for name, value in ldm.vae(tensors.items(), config)}  # fmt: skip
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("whose", ["tiny_sd", "without"])
def test_a_folder_is_in_place_of_its_own(whose: str, better: Path, request: pytest.FixtureRequest) -> None:
    read = ensemble.read(Origin(request.getfixturevalue(whose), vae=better))
    check(read, AutoencoderKL.from_pretrained(better), 0.3)
    paths = {file.path for file in read.source()}
    assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= paths
    assert read.files["vae/config.json"] == better / "config.json"


@pytest.mark.parametrize("names", ["diffusers", "first_stage_model.", ""])
def test_one_file_goes_by_the_configuration_of_its_own(names: str, tiny_sd: Path, better: Path, tmp_path: Path) -> None:
    file = bare(better, tmp_path / "vae.safetensors", names)
    read = ensemble.read(Origin(tiny_sd, vae=file))
    scale = AutoencoderKL.load_config(tiny_sd / "vae")["scaling_factor"]
    check(read, AutoencoderKL.from_pretrained(better), scale)
    assert {"vae/vae.safetensors", "vae/config.json"} <= {one.path for one in read.source()}
    assert read.files["vae/config.json"] == tiny_sd / "vae/config.json"


def test_a_single_file_and_a_whole_checkpoint_s_autoencoder(tiny_sd: Path, better: Path, tmp_path: Path) -> None:
    """The one lacks its own; the other has more than that."""
    tensors = ldm.of_folder(tiny_sd)
    save_file(tensors, tmp_path / "whole.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.startswith("first_stage")}, tmp_path / "part.safetensors")
    with pytest.raises(DexportError, match="holds no vae, which its pipeline needs; give one with --vae"):
        checkpoint.read(tmp_path / "part.safetensors", config=tiny_sd)
    own = AutoencoderKL.from_pretrained(tiny_sd / "vae", torch_dtype=torch.float32)
    for name, vae, module in (
        ("part", tmp_path / "whole.safetensors", own),
        ("whole", better, AutoencoderKL.from_pretrained(better)),
    ):
        read = checkpoint.read(tmp_path / f"{name}.safetensors", config=tiny_sd, vae=vae)
        check(read, module, module.config.scaling_factor)


def test_the_checkpoint_s_own_configuration_is_missing(without: Path, better: Path, tmp_path: Path) -> None:
    """Then that of the pipeline's single files is taken, which here is of a larger autoencoder."""
    file = bare(better, tmp_path / "vae.safetensors", "")
    with pytest.raises(DexportError, match=r"vae.safetensors: its vae is not what its configuration says|has the shape|"
                                           "missing"):  # fmt: skip
        checkpoint.read(without, vae=file)
    with pytest.raises(DexportError, match="names no 'vae'; give one with --vae"):
        checkpoint.read(without)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "its latents have 16 channels, each of 4 pixels a side, where .* have 4, of 4"),
        ({"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
          "up_block_types": ["UpDecoderBlock2D"] * 2}, "4 channels, each of 2 pixels a side, where .* have 4, of 4"),
        ({"layers_per_block": 2}, "missing; AutoencoderKL needs it by its config.json"),
        ({"_class_name": "VQModel"}, "its class is 'VQModel'; it must be an AutoencoderKL"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tiny_sd: Path, better: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((better / "config.json").read_text())
    (better / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DexportError, match=words) as caught:
        checkpoint.read(tiny_sd, vae=better)
    assert "\n" not in str(caught.value) and "better" in str(caught.value)


def test_what_is_no_autoencoder(tiny_sd: Path, tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    for path, words in (
        (tmp_path / "a.safetensors", "not an autoencoder in diffusers' names"),
        (tmp_path / "a.ckpt", "a pickle"),
        (tmp_path / "no", "no such folder or file"),
        (tiny_sd, "a whole checkpoint"),
    ):
        with pytest.raises(DexportError, match=words):
            checkpoint.read(tiny_sd, vae=path)
    with pytest.raises(DexportError, match=r"an AutoencoderKL; give it beside its checkpoint, with --vae"):
        checkpoint.read(Path(shutil.copytree(tiny_sd / "vae", tmp_path / "alone")))
