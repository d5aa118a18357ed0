"""What inspect says of a checkpoint and its hub, against what torch and the file system say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from exporter import estimate, hub, own
from exporter.inspect import inspect
from exporter.own import OwnModel
from runtimes.errors import DexportError


def test_a_checkpoint_has_the_parameters_that_torch_counts(tiny_sd: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    found = inspect(tiny_sd)
    classes = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for name, kind in classes.items():
        module = kind.from_pretrained(tiny_sd / name)
        component = found["components"][name]
        assert component["parameters"] == sum(parameter.numel() for parameter in module.parameters())
        assert component["class"] == kind.__name__
        assert set(component["dtypes"]) == {"F16"}
        assert component["size"] == 2 * component["parameters"]
    assert found["parameters"] == sum(component["parameters"] for component in found["components"].values())


def test_a_hub_graph_has_the_component_s_parameters(tiny_sd: Path, tmp_path: Path) -> None:
    hub.export(tiny_sd, tmp_path / "hub", graphs=["text"])
    found = inspect(tmp_path / "hub")
    graph = found["graphs"]["text"]
    # Tensors that are equal are stored once (all norms of a fresh model are), and folding adds a constant or two.
    weights = inspect(tiny_sd)["components"]["text_encoder"]["parameters"]
    assert 0.97 * weights < graph["parameters"] < 1.03 * weights
    assert graph["size"] == sum(path.stat().st_size for path in (tmp_path / "hub" / "text").iterdir())
    assert graph["nodes"] == sum(graph["operators"].values())
    assert graph["inputs"] == {"tokens": "int64 [batch, 77]"}


def test_what_a_build_needs(tiny_sd: Path, tmp_path: Path) -> None:
    needs = inspect(tiny_sd)["needs"]
    hub.export(tiny_sd, tmp_path / "hub")
    written = sum(file.stat().st_size for file in (tmp_path / "hub").rglob("*.data"))
    assert 0.8 * needs["export"]["disk"] < written <= needs["export"]["disk"]  # equal tensors are stored once
    assert needs["build"]["disk"] == 2 * needs["export"]["disk"]
    for what in ("memory", "time"):
        assert 0 < needs["export"][what] <= needs["build"][what]


def test_operations_are_those_of_the_formula() -> None:
    denoiser = _Convolution()
    model = OwnModel(denoiser, (3, 16, 12), betas=[0.1, 0.2], steps=2)
    graphs = estimate.measure(own.read(model))
    assert graphs["denoiser"].flops == 2 * 3 * 5 * 9 * 16 * 12 + 2 * 5 * 3 * 9 * 16 * 12
    weights = [4 * parameter.numel() for parameter in denoiser.parameters()]
    assert graphs["denoiser"].weights == sum(weights) and graphs["denoiser"].largest == max(weights)
    assert graphs["decoder"].weights == graphs["decoder"].flops == 0


class _Convolution(nn.Module):
    """Two convolutions, whose operations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, sample: Any, timestep: Any) -> Any:
        """As a denoiser."""
        return self.two(self.one(sample))


def test_why_a_checkpoint_cannot_be_built(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_embed_type": "timestep"}))
    found = inspect(tmp_path / "checkpoint")
    assert "needs" not in found and "class_embed_type" in found["cannot be built"]


def test_what_is_none_of_the_three_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match=r"model_index\.json"):
        inspect(tmp_path)
