"""DiT against diffusers' own pipeline on the same noise; and classes by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import checkpoint, hub
from exporter.families import Shape
from runtimes import subject
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.image import read_settings
from runtimes.manifest import Labels
from runtimes.request import Request
from tests.dexport.conftest import Say
from tests.families.harness import Built, ours, theirs
from tests.families.small import NAMES

Make = Callable[[str], Built]
LEAST_DB = 80
TARGETS = ("onnxruntime", "openvino")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("guidance", "batching"), [(4.0, "batched"), (1.0, "batched"), (2.5, "sequential")])
def test_pictures_are_diffusers_own(built: Make, target: str, guidance: float, batching: Any) -> None:
    made = built("dit")
    asked = {"class_labels": [207, 7], "guidance_scale": guidance}
    expected = theirs(made.checkpoint, num_inference_steps=4, **asked)
    request = Request(labels=["golden retriever", 7], guidance=guidance, steps=4, guidance_batch=batching)
    pictures = ours(made.pipeline(target), request)
    assert pictures.shape == (2, 3, 16, 16) and np.std(expected) > 0.05
    assert psnr(expected, pictures) > LEAST_DB


def test_a_class_and_its_guidance_change_the_picture(built: Make) -> None:
    """Or the comparison above would prove little."""
    pipeline = built("dit").pipeline("onnxruntime")
    one, other, more = (
        ours(pipeline, Request(labels=label, guidance=scale, steps=4))
        for label, scale in ((207, 4.0), (7, 4.0), (207, 1.0))
    )
    assert psnr(one, other) < 40 and psnr(one, more) < 40


def test_the_stage(built: Make) -> None:
    model = hub.load(built("dit").hub)
    (stage,) = model.stages
    assert (stage.labels, stage.guidance.kind, stage.guidance.scale) == (Labels(1000, 1000, NAMES), "cfg", 4.0)
    assert (stage.steps, stage.sample, stage.factor, stage.text) == (50, (4, 8, 8), 2, None)
    assert model.graphs["denoiser"].outputs[0].shape == ("batch", 4, 8, 8)  # without the learned variance


def test_the_report_says_its_class_once(built: Make) -> None:
    report = (built("dit").bundles["onnxruntime"] / "report.html").read_text()
    assert "<p>class 999 “tissue”, 3 steps, seed 0</p>" in report


def test_a_learned_variance_is_kept_for_its_sampler(built: Make, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(built("dit").checkpoint, folder)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}))
    read = checkpoint.read(folder)
    specs = read.family.specs(read, Shape(16, 16, False))
    assert specs["denoiser"].outputs[0].shape == ("batch", 8, 8, 8)


def test_draw_classes_by_name(say: Say, built: Make, tmp_path: Path) -> None:
    bundle = built("dit").bundles["onnxruntime"]
    said = say("run", bundle, "--class", "Golden Retriever", "--class", "207", "--steps", 2, "-o", tmp_path)
    assert said.code == 0, said.err
    settings = [read_settings(file) for file in sorted(tmp_path.glob("*.png"))]
    assert [(one["class"], one["class_name"], one["seed"]) for one in settings] == [
        (207, "golden retriever", 0), (207, "golden retriever", 1),
    ]  # fmt: skip
    for words, line in (
        (("--class", "golden retreiver"), "no class 'golden retreiver'; near it are 'golden retriever' (207)"),
        (("--class", "retriever"), "near it are 'golden retriever' (207)"),
        (("--class", "crane"), "'crane' is the name of the classes 134 and 517"),
        (("--class", "1000"), "there is no class 1000; take a number from 0 to 999 or a name"),
        (("--prompt", "dog"), "takes no prompt: leave it out; name a class with --class"),
        ((), "no class given; give one with --class, a number from 0 to 999 or a name"),
    ):
        said = say("run", bundle, *words, "-o", tmp_path / "y.png")
        assert said.code == 2 and line in said.err and said.err.count("\n") == 1, said.err


def test_names_of_classes() -> None:
    labels = Labels(600, None, NAMES)
    assert subject.numbers(labels, ["tinca TINCA", "tench, Tinca tinca", " tench ", "599", 3]) == [0, 0, 0, 599, 3]
    assert subject.numbers(labels, "cock") == [7] and subject.numbers(labels, np.int64(5)) == [5]
    for wrong in ("", "-1", "²", "1.0", 600, True):
        with pytest.raises(DexportError, match="no class"):
            subject.numbers(labels, [wrong])


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"in_channels": 3}, "3 channels in and 8 out"),
        ("transformer/config.json", {"norm_type": "layer_norm"}, "config.json of transformer"),
        ("model_index.json", {"id2label": {"1000": "none"}}, "id2label must give names to numbers below 1000"),
        ("model_index.json", {"id2label": ["tench"]}, "id2label must give names"),
    ],
)
def test_configs_that_cannot_be_exported(
    built: Make, tmp_path: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(built("dit").checkpoint, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(DexportError, match=words) as error:
        hub.export(folder, tmp_path / "hub")
    assert "\n" not in str(error.value)


def test_there_is_one_size(built: Make, tmp_path: Path) -> None:
    for options in ({"shape": (32, 32)}, {"dynamic_shape": True}):
        with pytest.raises(DexportError, match="draws 16x16 pixels alone"):
            hub.export(built("dit").checkpoint, tmp_path / "hub", **options)
