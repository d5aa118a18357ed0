"""Models of pixels: DDPM, DDIM and consistency models against diffusers' own pipelines on the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from calibration import islands
from exporter import hub
from exporter.families.parts import OLD_ATTENTION
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.image import open_image, read_settings
from runtimes.request import Request
from tests.dexport.conftest import Say
from tests.families.harness import Built, build_engines, ours, theirs
from tests.families.small import WRITERS

Make = Callable[[str], Built]
LEAST_DB = 80  # fp32 gives 105 to 130; the bound of a mistake in one coefficient would be far below
TARGETS = ("onnxruntime", "openvino")
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, diffusers'
    "ddpm": ({"images": 2}, {"batch_size": 2}),
    "pndm": ({"images": 2}, {"batch_size": 2}),
    "learned": ({"images": 2}, {"batch_size": 2}),
    "grey": ({"images": 2}, {"batch_size": 2}),
    "consistency": ({"labels": [3, "7"]}, {"batch_size": 2, "class_labels": [3, 7]}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ASKED)
def test_pictures_are_diffusers_own(built: Make, name: str, target: str) -> None:
    own, asked = ASKED[name]
    made = built(name)
    expected = theirs(made.checkpoint, num_inference_steps=4, **asked)
    pictures = ours(made.pipeline(target), Request(steps=4, **own))
    assert pictures.shape == (2, 3, 16, 16)
    assert psnr(np.broadcast_to(expected, pictures.shape), pictures) > LEAST_DB
    assert np.std(expected) > 0.05 and np.abs(expected[0] - expected[1]).max() > 0.1


def test_the_stage_has_the_pipelines_own_steps_and_classes(built: Make) -> None:
    for name, steps in (("ddpm", 1000), ("grey", 50), ("consistency", 1)):
        (stage,) = hub.load(built(name).hub).stages
        assert (stage.text, stage.decoder, stage.encoder, stage.factor) == (None, "decoder", "encoder", 1)
        assert (stage.steps, stage.guidance.kind, stage.multiple) == (steps, "none", 2)
        assert (stage.labels.count if stage.labels else None) == (10 if name == "consistency" else None)


def test_the_learned_variance_goes_to_a_sampler_that_takes_it(built: Make, tmp_path: Path) -> None:
    """And is left out of the graph for one that does not."""
    made = built("learned")
    assert hub.load(made.hub).graphs["denoiser"].outputs[0].shape == ("batch", 6, 16, 16)
    shutil.copytree(made.checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "fixed_small"}))
    model = hub.export(tmp_path / "checkpoint", tmp_path / "hub", graphs=["denoiser"])
    assert model.graphs["denoiser"].outputs[0].shape == ("batch", 3, 16, 16)


def test_a_picture_goes_in_and_comes_out(built: Make) -> None:
    """The encoder is the decoder's inverse; of a grey model's picture the brightness is left, as Pillow has it."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
    for target in TARGETS:
        colour, grey = built("ddpm").pipeline(target), built("grey").pipeline(target)
        np.testing.assert_allclose(colour.decode(colour.encode(image)), image, atol=1e-6)
        luma = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255
        np.testing.assert_allclose(grey.decode(grey.encode(image))[0], [luma] * 3, atol=0.6 / 255)


def test_old_names_of_attention(built: Make, tmp_path: Path) -> None:
    made, folder = built("ddpm"), tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = safetensors.numpy.load_file(file)
    new = {f".{today}.": f".{old}." for old, today in OLD_ATTENTION.items()}
    renamed = {}
    for key, value in weights.items():
        for today, old in new.items():
            key = key.replace(today, old) if ".attentions." in key else key
        renamed[key] = value
    assert set(renamed) != set(weights)
    safetensors.numpy.save_file(renamed, file)
    hub.export(folder, tmp_path / "hub", graphs=["denoiser"])
    assert (tmp_path / "hub/denoiser/model.onnx").read_bytes() == (made.hub / "denoiser/model.onnx").read_bytes()


def test_a_timestep_depends_on_nothing_else(built: Make) -> None:
    """The class multiplies it by ones of the sample's batch; in bf16 it would not stay exact so."""
    import onnx_ir

    for name in ("ddpm", "consistency"):
        graph = onnx_ir.load(built(name).hub / "denoiser/model.onnx").graph
        (timestep,) = [value for value in graph.inputs if value.name == "timestep"]
        assert {use.node.op_type for use in timestep.uses()} == {"Unsqueeze"}


@pytest.mark.parametrize("name", WRITERS)
def test_engines_are_built(built: Make, name: str, tmp_path: Path) -> None:
    build_engines(built(name), tmp_path)


def test_draw_without_a_prompt(say: Say, built: Make, tmp_path: Path) -> None:
    bundle = built("grey").bundles["onnxruntime"]
    said = say("run", bundle, "-n", 4, "--seed", 1, "--steps", 3, "-o", tmp_path / "x.png")
    assert said.code == 0, said.err
    files = sorted(tmp_path.glob("x-*.png"))
    assert [read_settings(file)["seed"] for file in files] == [1, 2, 3, 4]
    assert not {"prompt", "negative_prompt", "class"} & set(read_settings(files[0]))
    pictures = [open_image(file) for file in files]
    assert len({picture.tobytes() for picture in pictures}) == 4 and pictures[0].mode == "RGB"
    for words, line in (
        (("--prompt", "red"), "takes no prompt"),
        (("--negative-prompt", "red"), "takes no prompt"),
        (("--class", "3"), "has no classes"),
        (("--guidance", "3"), "made to draw without guidance"),
    ):
        said = say("run", bundle, *words, "-o", tmp_path / "y.png")
        assert said.code == 2 and line in said.err and said.err.count("\n") == 1


def test_classes_by_number(say: Say, built: Make, tmp_path: Path) -> None:
    bundle = built("consistency").bundles["openvino"]
    said = say("run", bundle, "--class", 3, "--class", 7, "-n", 2, "-o", tmp_path, "--json")
    assert said.code == 0, said.err
    assert [(one["class"], one["seed"]) for one in said.json["images"]] == [(3, 0), (3, 1), (7, 2), (7, 3)]
    for words, line in ((("--class", "10"), "from 0 to 9"), (("--class", "dog"), "from 0 to 9"), ((), "no class")):
        said = say("run", bundle, *words, "-o", tmp_path)
        assert said.code == 2 and line in said.err and said.err.count("\n") == 1
    assert say("inspect", bundle, "--json").json["classes"] == 10
    said = say("bench", bundle, "--repeats", 1, "--json")
    assert said.code == 0 and said.json["steps"] == 1, said.err


def test_int8_is_calibrated_on_classes_or_seeds(say: Say, built: Make, tmp_path: Path) -> None:
    for name, prompts in (("consistency", {"0", "9"}), ("grey", {"picture 1", "picture 19"})):
        file = tmp_path / f"{name}.safetensors"
        said = say("calibrate", built(name).hub, "--calibration-steps", 1, "-o", file, "--json")
        assert said.code == 0, said.err
        assert prompts <= set(said.json["coverage"]["by_prompt"]) and said.json["coverage"]["calls"] == 16
    words = ("--target", "openvino=int8", "--budget", "psnr=10", "--statistics", file, "-o", tmp_path / "bundle")
    said = say("compile", built("grey").hub, *words)
    assert said.code == 0, said.err
    assert say("run", tmp_path / "bundle", "--steps", 2, "-o", tmp_path / "x.png").code == 0
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n4\n5\nhorse\n")
    for name, line in (("grey", "takes no prompts"), ("consistency", "no class 'horse'")):
        said = say("calibrate", built(name).hub, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "other")
        assert said.code == 2 and line in said.err


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("grey", ("picture 1", "picture 2", "picture 3", "picture 4")),
        ("consistency", ("0", "3", "6", "9")),
        ("superresolution", ("picture 1", "picture 2", "picture 3", "picture 4")),
    ],
)
def test_overflows_of_fp16_are_looked_for_without_prompts(built: Make, name: str, shown: tuple[str, ...]) -> None:
    """Each graph is watched; none of these small models comes near fp16's end."""
    made = built(name)
    model = hub.load(made.hub)
    found = islands.find(model, made.hub)
    assert found.prompts == shown and set(found.graphs) == set(model.graphs)
    assert all(0 < kept.peak < 65504 and not kept.nodes for kept in found.graphs.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 4, "out_channels": 4}, "pictures have 3 channels"),
        ({"out_channels": 5}, "3 channels in and 5 out"),
        ({"class_embed_type": "identity"}, "takes more than a class's number"),
        ({"class_embed_type": "timestep"}, "num_class_embeds"),
        ({"sample_size": None}, "sample_size=None must be a whole number"),
        ({"sample_size": 15}, "15x15 pixels: this model needs multiples of 2"),
        ({"block_out_channels": []}, "block_out_channels"),
    ],
)
def test_configs_that_cannot_be_exported(built: Make, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(built("ddpm").checkpoint, folder)
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DexportError, match=words) as error:
        hub.export(folder, tmp_path / "hub")
    assert "\n" not in str(error.value)
