"""Several ways out of noise: what one ends with goes into the denoisers of the next, against closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes import cascade
from runtimes.check import check_model
from runtimes.errors import DexportError
from runtimes.loop import noise_source
from runtimes.manifest import Graph, Guidance, Model, Stage, Tensor, Tokenizer, from_json, to_json
from runtimes.pipeline import Pipeline
from runtimes.request import Request, unused
from tests.tiny import write_words

EULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
TIMESTEP, HIDDEN = Tensor("timestep", "float32", ("batch",)), Tensor("hidden", "float32", ("batch", 1))
EMBEDS, LATENT = Tensor("embeds", "float32", ("batch", 5)), Tensor("sample", "float32", ("batch", 5))
SAMPLE = Tensor("sample", "float32", ("batch", 4, "height", "width"))
IMAGE = Tensor("image", "float32", ("batch", 3, "image_height", "image_width"))


class Text:
    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"hidden": inputs["tokens"].mean(axis=1, keepdims=True).astype(np.float32)}


class Denoiser:
    """0.1 sample + what it is told, as a constant; keeps its calls."""

    max_batch = None

    def __init__(self) -> None:
        self.calls: list[Mapping[str, Any]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(inputs)
        sample = inputs["sample"]
        told = sum(inputs[name].mean(axis=1) for name in ("hidden", "embeds") if name in inputs)
        return {"output": (0.1 * sample + np.reshape(told, (-1, *[1] * (sample.ndim - 1)))).astype(np.float32)}


class Embedding:
    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"embeds": 2 * inputs["sample"] + 1, "negative_embeds": np.full_like(inputs["sample"], -3)}


def model(**changes: Any) -> Model:
    """A prior of five numbers and a decoder of latents, whose picture has twice their sides; changes of the prior."""
    graphs = {
        "text": Graph("text", "text/t", (Tensor("tokens", "int64", ("batch", 6)),), (HIDDEN,)),
        "prior": Graph("denoiser", "prior/d", (LATENT, TIMESTEP, HIDDEN), (replace(LATENT, name="output"),)),
        "embedding": Graph("decoder", "embedding/d", (LATENT,), (EMBEDS, replace(EMBEDS, name="negative_embeds"))),
        "denoiser": Graph("denoiser", "denoiser/d", (SAMPLE, TIMESTEP, EMBEDS), (replace(SAMPLE, name="output"),)),
        "decoder": Graph("decoder", "decoder/d", (SAMPLE,), (IMAGE,)),
    }
    prior = Stage("prior", "prior", "text", "embedding", None, (5,), 1, EULER, Guidance("cfg", 2.0), 3, gives="embeds")
    decoder = Stage(
        "decoder", "denoiser", None, "decoder", None, (4, 8, 8), 2, EULER, Guidance("cfg", 4.0), 5, multiple=2
    )
    tokenizers = (Tokenizer("tokenizer/t.json", "tokens", 6, 1),)
    return Model("any", "Any", graphs, tokenizers, (replace(prior, **changes), decoder), ())


def pipeline(described: Model, folder: Path) -> tuple[Pipeline, dict[str, Any]]:
    check_model(described, "test")
    assert from_json(Model, to_json(described), "test") == described
    write_words(folder / described.tokenizers[0].file)
    sessions: dict[str, Any] = {"text": Text(), "prior": Denoiser(), "embedding": Embedding(), "denoiser": Denoiser()}
    return Pipeline(described, folder, sessions.__getitem__), sessions


def test_result_of_a_way_is_an_input_of_the_next(tmp_path: Path) -> None:
    made, sessions = pipeline(model(), tmp_path)
    steps = list(made.generate(Request(["red", "green apple"], seed=3)))
    assert [(step.index, step.total) for step in steps] == [(index, 8) for index in range(8)]
    assert [step.sample.shape for step in steps] == [(2, 5)] * 3 + [(2, 4, 8, 8)] * 5
    given = 2 * steps[2].sample.astype(np.float32) + 1
    for call in sessions["denoiser"].calls:
        np.testing.assert_array_equal(call["embeds"], [*np.full((2, 5), -3), *given])
    assert (given[0] != given[1]).all()


def test_negative_prompt_is_drawn_where_its_result_is_given(tmp_path: Path) -> None:
    """By the prior unguided, after the pictures' own, with noise of its own."""
    made, sessions = pipeline(model(gives_negative=True), tmp_path)
    steps = list(made.generate(Request(["red", "green apple"], negative_prompt="table", seed=3)))
    assert [step.total for step in steps] == [3 + 3 + 5] * 11
    alone, _ = pipeline(model(guidance=Guidance("cfg", 1.0)), tmp_path / "alone")
    draw = noise_source([3, 4], (5,))
    draw()
    sources = [draw, noise_source([0, 0], (4, 8, 8))]
    *_, last = list(alone.generate(Request(["table"] * 2, steps=1), sources))[:3]
    for call in sessions["denoiser"].calls:
        given = [2 * one.sample.astype(np.float32) + 1 for one in (last, steps[2])]
        np.testing.assert_array_equal(call["embeds"], np.concatenate(given))
    calls = [len(call["sample"]) for call in sessions["prior"].calls]
    assert calls == [4] * 3 + [2] * 3


def test_each_way_has_noise_of_its_own(tmp_path: Path) -> None:
    """The decoder's does not depend on how many steps the prior makes, nor on the pictures beside."""
    made, sessions = pipeline(model(), tmp_path)
    for steps in (2, 3):
        list(made.generate(Request(["red"], seed=7, steps={"prior": steps, "decoder": 1})))
    first, second = (call["sample"][0] for call in sessions["denoiser"].calls)
    np.testing.assert_array_equal(first, second)
    own = noise_source(cascade.seeds(7, 1, 1), (4, 8, 8))()[0]
    np.testing.assert_allclose(first / first.std(), own / own.std(), atol=1e-5)
    assert cascade.seeds(7, 2, 0) == [7, 8]  # as without a second way


@pytest.mark.parametrize(
    ("asked", "prior", "decoder"),
    [({}, (3, 6), (5, 10)), ({"steps": 2}, (3, 6), (2, 4)), ({"steps": {"prior": 1}}, (1, 2), (5, 10)),
     ({"guidance": 1.0}, (3, 6), (5, 5)), ({"guidance": {"prior": 1.0}}, (3, 3), (5, 10))],
)  # fmt: skip
def test_request_is_of_the_main_way_or_by_name(
    tmp_path: Path, asked: dict[str, Any], prior: tuple[int, int], decoder: tuple[int, int]
) -> None:
    """Calls of each denoiser, and rows in them: two for each picture where it is guided."""
    made, sessions = pipeline(model(), tmp_path)
    list(made.generate(Request(["red"], **asked)))
    for name, expected in (("prior", prior), ("denoiser", decoder)):
        calls = sessions[name].calls
        assert (len(calls), sum(len(call["sample"]) for call in calls)) == expected


def test_size_is_the_pictures(tmp_path: Path) -> None:
    made, _ = pipeline(model(), tmp_path)
    *_, step = made.generate(Request(["red"], size=(8, 24), steps=1))
    assert step.sample.shape == (1, 4, 4, 12)
    with pytest.raises(DexportError, match="multiple of 4 pixels"):
        list(made.generate(Request(["red"], size=(8, 10))))


def test_main_way_is_the_last_that_is_guided() -> None:
    prior, decoder = model().stages
    assert cascade.main([prior, decoder]) == (decoder,)
    unguided = replace(decoder, guidance=Guidance("none", 1.0))
    assert cascade.main([prior, unguided]) == (prior,)
    assert cascade.main([replace(prior, guidance=unguided.guidance), unguided])[0].name == "prior"
    refined = [replace(prior, gives=None, span=(0.0, 0.8)), replace(prior, name="refiner", span=(0.8, 1.0)), unguided]
    assert [len(way) for way in cascade.ways(refined)] == [2, 1]
    assert cascade.main(refined) == tuple(refined[:2])


def test_what_has_nothing_to_act_on_is_said(tmp_path: Path) -> None:
    """The rescaling and the interval are of the main way alone."""
    made, sessions = pipeline(model(), tmp_path)
    asked = {"guidance_rescale": 0.5, "negative_prompt": "table"}
    left = ["guidance is off: guidance_rescale was left out"]
    assert unused(made.model, Request(["red"], **asked)) == []
    assert unused(made.model, Request(["red"], guidance=1.0, **asked)) == left
    off = unused(made.model, Request(["red"], guidance={"": 1.0, "prior": 1.0}, **asked))
    assert off == ["guidance is off: the negative prompt was left out", *left]
    for interval in ((0.0, 0.6), 0.5):
        with pytest.raises(DexportError, match="guidance_interval is the part"):
            list(made.generate(Request(["red"], guidance=1.0, guidance_interval=interval)))
    assert not sessions["prior"].calls


def test_a_picture_without_an_encoder_is_said_first(tmp_path: Path) -> None:
    made, sessions = pipeline(model(), tmp_path)
    with pytest.raises(DexportError, match="no encoder"):
        next(made.generate(Request(["red"], image=Image.new("RGB", (16, 16)))))
    assert not sessions["prior"].calls


def test_the_main_stage_needs_no_name(tmp_path: Path) -> None:
    made, _ = pipeline(model(), tmp_path)
    main = cascade.main(made.model.stages)[0].name
    for asked in ({"": 3, "prior": 2}, {main: 3, "prior": 2}):
        assert len(list(made.generate(Request(["red"], steps=asked)))) == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"steps": {"base": 3}}, "there is no stage 'base'; there is prior and decoder"),
     ({"steps": {"prior": 0}}, "steps must be 1 or more"), ({"guidance": {"x": 1.0}}, "there is no stage 'x'")],
)  # fmt: skip
def test_request_that_names_no_stage_is_refused(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    made, _ = pipeline(model(), tmp_path)
    with pytest.raises(DexportError, match=said):
        list(made.generate(Request(["red"], **asked)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"gives": "other"}, "a decoder must have 'other'"), 
     ({"decoder": None, "gives": "hidden"}, "'hidden'; it must be"),
     ({"gives": "timestep", "decoder": None}, "a further input"), ({"gives": None}, "three numbers"),
     ({"sample": (6,)}, "denoiser's"), ({"name": "decoder"}, "the stages' names"),
     ({"span": (0.0, 0.5)}, "the stages' spans")],
)  # fmt: skip
def test_ways_that_do_not_meet_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DexportError, match=said):
        check_model(model(**changes), "test")


def test_what_is_given_has_the_shape_that_is_taken() -> None:
    made = model()
    other = replace(made.graphs["denoiser"], inputs=(SAMPLE, TIMESTEP, replace(EMBEDS, shape=("batch", 6))))
    with pytest.raises(DexportError, match="of the shape that later denoisers take"):
        check_model(replace(made, graphs={**made.graphs, "denoiser": other}), "test")


def test_last_stage_gives_nothing() -> None:
    made = model()
    stages = (made.stages[0], replace(made.stages[1], gives="embeds"))
    with pytest.raises(DexportError, match="null, since it draws the picture"):
        check_model(replace(made, stages=stages), "test")
