"""What inspect says of a checkpoint and its hub, against what torch and the file system say."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter import hub
from exporter.inspect import inspect
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


def test_what_is_none_of_the_three_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match=r"model_index\.json"):
        inspect(tmp_path)
