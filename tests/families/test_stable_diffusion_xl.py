"""Stable Diffusion XL and its refiner: what is refused, and how two checkpoints become stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import checkpoint, ensemble
from exporter.ensemble import Origin
from exporter.families import Shape
from exporter.inspect import inspect
from runtimes.errors import DexportError
from tests.families.small import refiner, sdxl

SHAPE = Shape(32, 32, free=False)
Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    sdxl(folder / "base")
    refiner(folder / "refiner")
    return {"base": folder / "base", "refiner": folder / "refiner"}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Copy:
    """A copy of a checkpoint of which one file says something else."""

    def make(name: str, file: str = "unet/config.json", **changes: Any) -> Path:
        folder = Path(shutil.copytree(saved[name], tmp_path / name))
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


def test_base_and_refiner_are_two_stages(saved: dict[str, Path]) -> None:
    joined = ensemble.read(Origin(saved["base"], saved["refiner"]))
    specs, (first, last) = ensemble.specs(joined, SHAPE), ensemble.stages(joined, SHAPE)
    assert set(specs) == {"text", "denoiser", "encoder", "refiner_text", "refiner_denoiser", "refiner_decoder"}
    assert [(stage.name, stage.span) for stage in (first, last)] == [("base", (0.0, 0.8)), ("refiner", (0.8, 1.0))]
    assert (first.decoder, last.encoder, last.strength) == (None, None, None)
    size = ["image_height", "image_width"]
    assert first.inputs == {"time_ids": [*size, 0, 0, *size]} and not first.negative
    assert (last.inputs, last.negative) == ({"time_ids": [*size, 0, 0, 6.0]}, {"time_ids": [*size, 0, 0, 2.5]})
    assert (first.guidance.empty, last.guidance.empty) == ("zeros", "text")
    inputs = [tokens.input for _, tokens, _ in ensemble.token_inputs(joined).values()]
    assert inputs == ["tokens", "tokens_2", "refiner_tokens_2"]


def test_a_refiner_alone_reworks_pictures(saved: dict[str, Path]) -> None:
    alone = checkpoint.read(saved["refiner"])
    (stage,) = alone.family.stages(alone, SHAPE)
    assert (stage.strength, stage.span) == (0.3, (0.0, 1.0))
    found = inspect(saved["refiner"])
    assert found["family"] == "stable-diffusion-xl" and "text_encoder" not in found["components"]


@pytest.mark.parametrize(
    ("name", "file", "changes", "words"),
    [
        ("refiner", "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "name one for both"),
        ("refiner", "vae/config.json", {"scaling_factor": 0.2}, "scaling_factor of its autoencoder is 0.2"),
        ("refiner", "model_index.json", {"requires_aesthetics_score": False}, "check requires_aesthetics_score"),
        ("base", "unet/config.json", {"addition_embed_type": None}, "is not Stable Diffusion XL"),
        ("base", "unet/config.json", {"class_embed_type": "timestep"}, "is not Stable Diffusion XL"),
        ("base", "unet/config.json", {"in_channels": 9}, "9 channels in"),
        ("base", "unet/config.json", {"time_cond_proj_dim": 0}, "time_cond_proj_dim=0 must be a whole number"),
        ("base", "vae/config.json", {"latents_std": [1, 1, 0, 1]}, "must be above 0"),
        ("base", "vae/config.json", {"latents_mean": [1, 1]}, "must be 4 usable numbers"),
        ("base", "model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2"),
        ("base", "model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "is exported with CLIPTextModel"),
    ],
)
def test_checkpoints_that_do_not_fit(
    saved: dict[str, Path], copy: Copy, name: str, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = copy(name, file, **changes)
    with pytest.raises(DexportError, match=words) as error:
        joined = ensemble.read(Origin(**{"path": saved["base"], "refiner": saved["refiner"], ROLES[name]: folder}))
        ensemble.specs(joined, SHAPE)
        ensemble.stages(joined, SHAPE)
    assert "\n" not in str(error.value)


ROLES = {"base": "path", "refiner": "refiner"}


def test_a_refiner_is_no_base(saved: dict[str, Path]) -> None:
    with pytest.raises(DexportError, match="does not draw from noise; give the base first"):
        ensemble.stages(ensemble.read(Origin(saved["refiner"], saved["base"])), SHAPE)
