"""Several stages, and what a denoiser is told beside the prompt: against one stage, and in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.check import check_model
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Guidance, Model, Stage, Tensor, Tokenizer, from_json, to_json
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.tiny import write_words

SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
SAMPLE, TIMESTEP = Tensor("sample", "float32", ("batch", 4, 8, 8)), Tensor("timestep", "float32", ("batch",))
SIZES = Tensor("sizes", "float32", ("batch", 3))
KNOWN = Tensor("guidance", "float32", ("batch",))


class Text:
    """The mean of the tokens."""

    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        (tokens,) = inputs.values()
        return {"hidden": tokens.mean(axis=1, keepdims=True).astype(np.float32)}


class Denoiser:
    """0.1 sample + 0.01 hidden + the sum of all further inputs / 1000; keeps its calls."""

    max_batch = None

    def __init__(self) -> None:
        self.calls: list[Mapping[str, Any]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(inputs)
        further = [inputs[name].reshape(len(inputs["sample"]), -1).sum(1) for name in inputs if name not in GIVEN]
        per_image = 0.01 * inputs["hidden"][:, 0] + sum(further, np.zeros(len(inputs["sample"]))) / 1000
        return {"output": (0.1 * inputs["sample"] + per_image[:, None, None, None]).astype(np.float32)}


GIVEN = ("sample", "timestep", "hidden")


def model(tokens: str = "tokens", further: tuple[Tensor, ...] = (), **stage: Any) -> Model:
    """A model of one stage; the changes are of the stage."""
    hidden = Tensor("hidden", "float32", ("batch", 1))
    graphs = {
        "text": Graph("text", "text/t", (Tensor(tokens, "int64", ("batch", 6)),), (hidden,)),
        "denoiser": Graph(
            "denoiser", "denoiser/d", (SAMPLE, TIMESTEP, hidden, *further), (replace(SAMPLE, name="output"),)
        ),
    }
    made = Stage(
        "base", "denoiser", "text", None, None, (4, 8, 8), 4, SCHEDULER, Guidance("cfg", 4.0), 10
    )  # fmt: skip
    tokenizers = (Tokenizer(f"tokenizer_{tokens}/t.json", tokens, 6, 1),)
    return Model("any", "Any", graphs, tokenizers, (replace(made, **stage),), ())


def two(first: Model, second: Model, at: float) -> Model:
    """The second model goes on from ``at``, its graphs under other names."""
    graphs = {**first.graphs, **{f"second_{name}": graph for name, graph in second.graphs.items()}}
    graphs = {name: replace(graph, file=f"{name}/m") for name, graph in graphs.items()}
    stages = (
        replace(first.stages[0], span=(0.0, at)),
        replace(second.stages[0], denoiser="second_denoiser", text="second_text", span=(at, 1.0)),
    )
    return replace(first, graphs=graphs, tokenizers=first.tokenizers + second.tokenizers, stages=stages)


def pipeline(described: Model, folder: Path) -> tuple[Pipeline, dict[str, Any]]:
    check_model(described, "test")
    assert from_json(Model, to_json(described), "test") == described
    for tokenizer in described.tokenizers:
        write_words(folder / tokenizer.file)
    sessions = {name: Text() if graph.kind == "text" else Denoiser() for name, graph in described.graphs.items()}
    return Pipeline(described, folder, sessions.__getitem__), sessions


def last(made: Pipeline, **asked: Any) -> Any:
    *_, step = made.generate(Request(["red", "green apple"], **asked))
    return step


@pytest.mark.parametrize("at", [0.5, 0.8])
def test_two_stages_of_one_model_are_one_stage(tmp_path: Path, at: float) -> None:
    one, _ = pipeline(model(), tmp_path)
    both, sessions = pipeline(two(model(), model("tokens_2"), at), tmp_path)
    asked: dict[str, Any] = {"guidance": [5.0, 2.0], "guidance_interval": (0.1, 0.9), "seed": 3}
    steps = [list(made.generate(Request(["red", "apple"], **asked))) for made in (one, both)]
    assert [(step.index, step.total) for step in steps[1]] == [(index, 10) for index in range(10)]
    for a, b in zip(*steps, strict=True):
        np.testing.assert_array_equal(a.sample, b.sample)
    calls = [len(sessions[name].calls) for name in ("denoiser", "second_denoiser")]
    assert calls == [10 * at, 10 - 10 * at]


def test_sizes_are_the_pictures_and_may_differ_without_the_prompt(tmp_path: Path) -> None:
    free = replace(SAMPLE, shape=("batch", 4, "height", "width"))
    described = model(
        further=(SIZES,), inputs={"sizes": ["image_height", "image_width", 6]}, negative={"sizes": [7, 8, 2.5]}
    )
    graph = described.graphs["denoiser"]
    described.graphs["denoiser"] = replace(graph, inputs=(free, *graph.inputs[1:]))  # type: ignore[index]
    made, sessions = pipeline(described, tmp_path)
    last(made, steps=1, size=(48, 64))
    (call,) = sessions["denoiser"].calls
    np.testing.assert_array_equal(call["sizes"], [[7, 8, 2.5]] * 2 + [[48, 64, 6]] * 2)


@pytest.mark.parametrize(("empty", "words", "expected"), [("text", "", 1.0), ("zeros", "", 0.0), ("zeros", "a", 2.0)])
def test_an_empty_negative_prompt(tmp_path: Path, empty: Any, words: str, expected: float) -> None:
    made, sessions = pipeline(model(guidance=Guidance("cfg", 4.0, empty)), tmp_path)
    last(made, steps=1, negative_prompt=words)
    hidden = sessions["denoiser"].calls[0]["hidden"][:, 0]
    tokens = made.prompts.tokenize(made.model.stages[0], [words]).ids
    assert hidden[:2].tolist() == [np.float32(tokens["tokens"].mean()) if expected else 0.0] * 2
    assert (hidden[2:] > 0).all()


def test_a_scale_that_the_denoiser_knows(tmp_path: Path) -> None:
    """One call a step with the scale of that step; a negative prompt has no place, and this is said."""
    made, sessions = pipeline(model(further=(KNOWN,), guidance=Guidance("embedded", 8.5)), tmp_path)
    last(made, steps=3, guidance=[3, 1])
    told = [call["guidance"].tolist() for call in sessions["denoiser"].calls]
    assert told == [[3, 3], [2, 2], [1, 1]]
    last(made, steps=1)
    assert sessions["denoiser"].calls[-1]["guidance"].tolist() == [8.5, 8.5]
    result = made(["red"], steps=2, negative_prompt="green", guidance_interval=(0.0, 0.5))
    assert result.warnings == ["this model is not guided by a negative prompt: the negative prompt was left out"]


def test_what_a_model_was_not_made_for_is_refused(tmp_path: Path) -> None:
    distilled, _ = pipeline(model(guidance=Guidance("none", 0.0)), tmp_path)
    with pytest.raises(DexportError, match="made to draw without guidance"):
        last(distilled, guidance=5)
    with pytest.raises(DexportError, match="guidance_interval is the part of the steps that is guided, and none is"):
        last(distilled, guidance_interval=(0.2, 0.8))
    assert last(distilled, guidance=0).total == 10
    reworks, _ = pipeline(model(strength=0.3), tmp_path)
    with pytest.raises(DexportError, match="reworks pictures and draws none from noise; give one with --image"):
        reworks("red")


def test_strength_is_the_stages_own(tmp_path: Path) -> None:
    described = model(strength=0.3, encoder="encoder")
    image = Tensor("image", "float32", ("batch", 3, 32, 32))
    described.graphs["encoder"] = Graph("encoder", "encoder/e", (image,), (SAMPLE,))  # type: ignore[index]
    made, sessions = pipeline(described, tmp_path)
    sessions["encoder"].run = lambda inputs: {"sample": np.zeros((1, 4, 8, 8), np.float32)}
    picture = Image.new("RGB", (32, 32))
    assert last(made, image=picture).total == 3
    assert last(made, image=picture, strength=0.5).total == 5


def test_a_picture_may_start_in_the_second_stage(tmp_path: Path) -> None:
    described = two(model(encoder="encoder"), model("tokens_2"), 0.8)
    image = Tensor("image", "float32", ("batch", 3, 32, 32))
    described.graphs["encoder"] = Graph("encoder", "encoder/e", (image,), (SAMPLE,))  # type: ignore[index]
    made, sessions = pipeline(described, tmp_path)
    sessions["encoder"].run = lambda inputs: {"sample": np.zeros((1, 4, 8, 8), np.float32)}
    for strength, calls in ((0.2, (0, 2)), (0.3, (1, 2)), (0.1, (0, 1))):
        for name in ("denoiser", "second_denoiser"):
            sessions[name].calls.clear()
        assert last(made, image=Image.new("RGB", (32, 32)), strength=strength).total == sum(calls)
        assert tuple(len(sessions[name].calls) for name in ("denoiser", "second_denoiser")) == calls


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"span": (0.0, 0.8)}, "spans is .* a way from 0 to 1 without a gap"),
    ({"span": (0.2, 1.0)}, "a way from 0 to 1 without a gap"),
    ({"span": (0.8, 0.2)}, "two numbers that rise within 0 to 1"),
    ({"span": (0.5,)}, "two numbers that rise within 0 to 1"),
    ({"strength": 0.0}, "strength is 0.0"),
    ({"guidance": Guidance("embedded", 4.0)}, "'embedded' for a denoiser with guidance"),
    ({"inputs": {"sizes": ["image_depth", 1, 2]}}, "not numbers of float32 or image_height and image_width"),
    ({"inputs": {"sizes": [1, 2]}}, "the shape of 'sizes' is"),
    ({"negative": {"sizes": [1, 2, 3]}}, "negative is 'sizes'; it must be one of the stage's inputs"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_stages_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words):
        check_model(model(further=(SIZES,), **changes), "test")


def test_stages_that_do_not_fit_each_other() -> None:
    wider = model("tokens_2")
    small = replace(wider.stages[0], sample=(4, 8, 8), factor=8)
    with pytest.raises(DexportError, match="the stages' samples differ"):
        check_model(two(model(), replace(wider, stages=(small,)), 0.5), "test")
    with pytest.raises(DexportError, match="two tokenizers have the same"):
        check_model(two(model(), model(), 0.5), "test")
    lonely = replace(model(), tokenizers=(*model().tokenizers, Tokenizer("tokenizer_x/t.json", "more", 6, 1)))
    with pytest.raises(DexportError, match="no text graph that takes their tokens"):
        check_model(lonely, "test")


def test_a_model_that_paints_needs_a_picture_and_a_mask(tmp_path: Path) -> None:
    hole = (Tensor("mask", "float32", ("batch", 1, 8, 8)), replace(SAMPLE, name="masked_sample"))
    with pytest.raises(DexportError, match="a denoiser that paints into a picture needs an encoder"):
        check_model(model(further=hole), "test")
    made = Pipeline(model(further=hole), tmp_path, {}.__getitem__)
    picture = Image.new("RGB", (32, 32))
    for asked in ({}, {"image": picture}, {"mask": picture}):
        with pytest.raises(DexportError, match="paints into a picture: give it with --image, and with --mask"):
            last(made, **asked)
