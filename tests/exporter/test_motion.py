"""A motion adapter in a UNet: the same model in each way that it may be given, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from exporter import ensemble, hub, reference
from exporter.checkpoint import Checkpoint
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes.errors import DexportError
from tests.families.small_video import LONGEST, adapter, animatediff

SHAPE = Shape(16, 16, free=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion beside an adapter; both as diffusers saves the pipeline; and with the UNet as it was."""
    place = tmp_path_factory.mktemp("motion")
    pipe = animatediff(place / "pictures")
    pipe.save_pretrained(place / "videos")
    shutil.copytree(place / "videos", place / "apart")
    shutil.rmtree(place / "apart" / "unet")
    shutil.copytree(place / "pictures" / "unet", place / "apart" / "unet")
    change(place / "apart", unet=["diffusers", "UNet2DConditionModel"])
    return place


def change(folder: Path, **entries: Any) -> None:
    """Change model_index.json."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def read(place: Path, name: str) -> Checkpoint:
    return ensemble.read(Origin(place / name, motion_adapter=place / "adapter" if name == "pictures" else None))


@pytest.mark.parametrize("name", ["pictures", "videos", "apart"])
def test_each_way_is_the_same_model(folder: Path, name: str) -> None:
    unet = diffusers.UNetMotionModel.from_pretrained(folder / "videos" / "unet").eval()
    checkpoint = read(folder, name)
    torch.manual_seed(0)
    sample, states = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 32)
    timestep = torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        found = reference.load(checkpoint, "denoiser")(sample, timestep, states)
        expected = unet(sample, timestep, states.repeat_interleave(3, dim=0)).sample
        still = [unet(sample[:, :, [index]], timestep, states).sample for index in range(3)]
    assert torch.allclose(found, expected, atol=1e-5)
    assert (expected - torch.cat(still, dim=2)).abs().max() > 0.01  # the frames know of each other
    (stage,) = ensemble.stages(checkpoint, SHAPE)
    assert (stage.sample, stage.fps, stage.scheduler["beta_schedule"]) == ((4, LONGEST, 8, 8), 8.0, "linear")
    names = {file.path for file in ensemble.source(checkpoint)}
    assert ("motion_adapter/config.json" in names) == (name != "videos")  # there the UNet has all


def test_config_is_what_diffusers_makes(folder: Path) -> None:
    expected = json.loads((folder / "videos" / "unet" / "config.json").read_text())
    for name in ("pictures", "apart"):
        found = read(folder, name).components["unet"].config
        built = diffusers.UNetMotionModel.from_config(dict(found)).config
        assert {key: built[key] for key in expected if key != "_diffusers_version"} == {
            key: value for key, value in expected.items() if key != "_diffusers_version"
        }


def test_frames_are_as_many_as_asked_for(folder: Path) -> None:
    checkpoint = ensemble.read(Origin(folder / "videos", frames=2))
    assert ensemble.specs(checkpoint, SHAPE)["denoiser"].inputs[0].shape == ("batch", 4, 2, 8, 8)
    with pytest.raises(DexportError, match=f"has 1 to {LONGEST} frames, not 7"):
        ensemble.stages(ensemble.read(Origin(folder / "videos", frames=7)), SHAPE)
    with pytest.raises(DexportError, match="a StableDiffusionPipeline draws pictures; leave --frames out"):
        hub.export(Origin(folder / "pictures", frames=4), folder / "hub")
    assert not (folder / "hub").exists()


def test_what_is_no_adapter_for_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, name: str = "pictures", **said: Any) -> None:
        with pytest.raises(DexportError, match=message):
            ensemble.read(Origin(folder / name, **said))

    for options, message in (
        ({"block_out_channels": (32, 64)}, r"block_out_channels is \[32, 64\], that of the UNet \[32, 32\]"),
        ({"motion_layers_per_block": 2}, r"motion_layers_per_block is \[2, 2\], that of the UNet \[1, 1\]"),
        ({"conv_in_channels": 9}, "PIA"),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        adapter(**options).save_pretrained(place)
        refused(message, motion_adapter=place)
    refused("motion modules already", "videos", motion_adapter=folder / "adapter")
    refused("it must be a MotionAdapter", motion_adapter=folder / "pictures" / "unet")
    refused("no such folder", motion_adapter=folder / "nowhere")
    shutil.copytree(folder / "apart", tmp_path / "alone")
    change(tmp_path / "alone", motion_adapter=[None, None])
    with pytest.raises(DexportError, match="no motion adapter; give one with --motion-adapter"):
        ensemble.read(tmp_path / "alone")
    change(tmp_path / "alone", _class_name="LatentConsistencyModelPipeline")
    with pytest.raises(
        DexportError, match="takes no motion adapter; only StableDiffusionPipeline and StableDiffusionXLPipeline do"
    ):
        ensemble.read(Origin(tmp_path / "alone", motion_adapter=folder / "adapter"))
