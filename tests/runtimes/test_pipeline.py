"""The pipeline around graphs whose answers are known in closed form: guidance, batches, seeds, sizes, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import DexportError
from runtimes.manifest import Graph, Guidance, Model, Stage, Tensor, Tokenizer
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import run_batched
from tests.tiny import write_words

SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


class Text:
    """Each prompt's mean token, so that a prompt steers by its words."""

    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"hidden": inputs["tokens"].mean(axis=1, keepdims=True).astype(np.float32)}


class Denoiser:
    """eps = 0.1 sample + 0.01 hidden + bias; counts calls and remembers batches."""

    max_batch: int | None = None

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.bias = 0.0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.batches.append(len(inputs["sample"]))
        assert inputs["sample"].dtype == inputs["timestep"].dtype == np.float32
        return {"output": 0.1 * inputs["sample"] + 0.01 * inputs["hidden"][:, :, None, None] + self.bias}


class Decoder:
    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": np.repeat(np.repeat(inputs["sample"][:, :3], 4, 2), 4, 3) / 8 + 0.5}


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser()


@pytest.fixture
def pipeline(tmp_path: Path, denoiser: Denoiser) -> Pipeline:
    write_words(tmp_path / "tokenizer.json")
    sample = Tensor("sample", "float32", ("batch", 4, 8, 8))
    hidden = Tensor("hidden", "float32", ("batch", 1))
    image = Tensor("image", "float32", ("batch", 3, 32, 32))
    tokens = Tensor("tokens", "int64", ("batch", 6))
    timestep = Tensor("timestep", "float32", ("batch",))
    graphs = {
        "text": Graph("text", "t", (tokens,), (hidden,)),
        "denoiser": Graph("denoiser", "d", (sample, timestep, hidden), (replace(sample, name="output"),)),
        "decoder": Graph("decoder", "c", (sample,), (image,)),
    }
    guidance = Guidance("cfg", 5.0)
    stage = Stage("base", "denoiser", "text", "decoder", None, (4, 8, 8), 4, SCHEDULER, guidance, 10)
    model = Model("any", "Any", graphs, (Tokenizer("tokenizer.json", "tokens", 6, 1),), (stage,), ())
    sessions: dict[str, Any] = {"text": Text(), "denoiser": denoiser, "decoder": Decoder()}
    return Pipeline(model, tmp_path, sessions.__getitem__)


def last(pipeline: Pipeline, request: Request) -> Any:
    *_, step = pipeline.generate(request)
    return step.sample


def test_batched_and_sequential_guidance_agree(pipeline: Pipeline, denoiser: Denoiser) -> None:
    request = Request(["red apple", "green table"], negative_prompt="on a table", images=2, seed=3)
    one = last(pipeline, request)
    assert denoiser.batches == [8] * 10
    denoiser.batches.clear()
    other = last(pipeline, replace(request, guidance_batch="sequential"))
    assert denoiser.batches == [4] * 20
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_guidance_is_the_formula(pipeline: Pipeline) -> None:
    """The model is linear in the conditioning: guidance g is the model with conditioning u + g (c - u)."""
    request = Request(["red apple"], negative_prompt="a table", guidance=3.0)
    tokens = pipeline.prompts.tokenize(pipeline.model.stages[0], ["red apple", "a table"]).ids["tokens"]
    c, u = tokens.mean(axis=2)
    with_guidance = next(pipeline.generate(request))
    mixed = u + 3.0 * (c - u)
    from runtimes.loop import noise_source

    start = noise_source([0], (4, 8, 8))()
    np.testing.assert_allclose(with_guidance.output, 0.1 * start + 0.01 * mixed, rtol=1e-5, atol=1e-6)


def test_without_guidance_a_step_costs_one_call_of_one_row(pipeline: Pipeline, denoiser: Denoiser) -> None:
    last(pipeline, Request(["red"], guidance=1.0, steps=5))
    assert denoiser.batches == [1] * 5


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline, denoiser: Denoiser) -> None:
    together = last(pipeline, Request(["red apple"], images=3, seed=7))
    for index in range(3):
        alone = last(pipeline, Request(["red apple"], seed=7 + index))
        np.testing.assert_allclose(together[index : index + 1], alone, rtol=1e-12)
    denoiser.max_batch = 2
    denoiser.batches.clear()
    pieces = last(pipeline, Request(["red apple"], images=3, seed=7))
    assert denoiser.batches[:3] == [2, 2, 2]
    np.testing.assert_allclose(together, pieces, rtol=1e-12)


def test_pieces_of_an_odd_batch(denoiser: Denoiser) -> None:
    denoiser.max_batch = 2
    sample = np.random.default_rng(0).standard_normal((5, 4, 2, 2)).astype(np.float32)
    inputs = {"sample": sample, "timestep": np.ones(5, np.float32), "hidden": np.arange(5, dtype=np.float32)[:, None]}
    pieces = run_batched(denoiser, inputs)["output"]
    assert denoiser.batches == [2, 2, 1]
    np.testing.assert_array_equal(pieces, denoiser.run(inputs)["output"])


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_cut(pipeline: Pipeline) -> None:
    result = pipeline("red apple on a green table", steps=1)
    assert len(result.warnings) == 1
    assert "'green table' was cut off" in result.warnings[0]
    tokens = pipeline.prompts.tokenize(pipeline.model.stages[0], ["red apple on a green table", "red"])
    assert tokens.ids["tokens"].tolist() == [[[0, 2, 4, 5, 6, 1]], [[0, 2, 1, 1, 1, 1]]] and tokens.chunks == 1
    assert pipeline("red", negative_prompt="a a a a a red", steps=1).warnings == [
        "the negative prompt is longer than the model's context: 'a red' was cut off"
    ]
    assert pipeline("red apple", steps=1).warnings == []


def test_each_picture_has_the_settings_that_make_it_again(pipeline: Pipeline) -> None:
    result = pipeline(["red apple", "green apple"], images=2, seed=5, steps=3)
    assert [(s["prompt"], s["seed"]) for s in result.settings] == [
        ("red apple", 5), ("red apple", 6), ("green apple", 7), ("green apple", 8),
    ]  # fmt: skip
    assert all(s["steps"] == 3 and s["guidance"] == 5.0 and s["sampler"] == "DDIMScheduler" for s in result.settings)
    again = pipeline("green apple", seed=8, steps=3)
    assert again.images[0].tobytes() == result.images[3].tobytes()


def test_an_overflow_is_an_error_and_no_black_picture(pipeline: Pipeline, denoiser: Denoiser) -> None:
    denoiser.bias = float("nan")
    with pytest.raises(DexportError, match="output at timestep 901 holds NaN"):
        pipeline("red")
    with pytest.raises(DexportError, match="decoder gave values that are not finite"):
        pipeline.decode(np.full((1, 4, 8, 8), np.inf))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"images": 0}, "images must be 1 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"guidance": float("inf")}, "from 0 to 1000"),
        ({"guidance_batch": "both"}, "'batched' or 'sequential'"),
        ({"size": (64, 64)}, "makes images of 32x32 pixels"),
        ({"sampler": "magic"}, "no sampler 'magic'"),
        ({"sampler": ""}, "no sampler ''"),
        ({"sampler": "flow_euler"}, "for a flow-matching model, and this checkpoint is a diffusion model"),
        ({"sampler": "DDIMInverseScheduler"}, "goes from an image to noise"),
        ({"strength": 0.8}, "give --image too"),
        ({"strength": ""}, "strength must be a number, not ''"),
        ({"guidance_rescale": None}, "guidance_rescale must be a number, not None"),
        ({"guidance_interval": 0.5}, "two numbers that rise within 0 to 1, not 0.5"),
        ({"guidance": "abc"}, "guidance must be a number from 0 to 1000, or several, not 'abc'"),
        ({"image": "grey.png"}, "image must be an image"),
        ({"steps": "4"}, "steps must be a whole number, not '4'"),
        ({"seed": "1"}, "seed must be a whole number, not '1'"),
        ({"images": 1.5}, "images must be a whole number"),
        ({"size": "32x32"}, "size must be height and width"),
        ({"size": 32}, "size must be height and width"),
    ],
)
def test_wrong_requests_are_one_clear_line(pipeline: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DexportError, match=message) as error:
        last(pipeline, Request(**{"prompts": ["red"], **settings}))
    assert "\n" not in str(error.value)


def test_steps_outside_of_the_interval_cost_half(pipeline: Pipeline, denoiser: Denoiser) -> None:
    last(pipeline, Request(["red"], steps=10, guidance_interval=(0.2, 0.5)))
    assert denoiser.batches == [1] * 2 + [2] * 3 + [1] * 5
    denoiser.batches.clear()
    last(pipeline, Request(["red"], steps=4, guidance=[1.0, 4.0]))
    assert denoiser.batches == [1, 2, 2, 2]


def test_settings_tell_of_guidance_only_what_was_asked(pipeline: Pipeline) -> None:
    plain = pipeline("red", steps=2).settings[0]
    assert plain["guidance"] == 5.0 and not {"guidance_interval", "guidance_rescale", "strength"} & set(plain)
    asked = pipeline("red", steps=2, guidance_interval=(0.0, 0.5), guidance_rescale=0.7).settings[0]
    assert (asked["guidance_interval"], asked["guidance_rescale"]) == ([0.0, 0.5], 0.7)


def test_settings_are_plain_numbers(pipeline: Pipeline) -> None:
    numbers = {"guidance_interval": np.array([0, 0.5]), "guidance_rescale": np.float32(0.5)}
    for given, told in ((np.float32(3.0), 3.0), (np.array([9, 1]), [9.0, 1.0]), ((9, 1.5), [9.0, 1.5]), (7, 7.0)):
        settings = pipeline("red", steps=2, guidance=given, **numbers).settings[0]
        assert json.loads(json.dumps(settings)) == settings
        assert (settings["guidance"], settings["guidance_interval"]) == (told, [0.0, 0.5])
        assert settings["guidance_rescale"] == 0.5


def test_a_picture_needs_an_encoder(pipeline: Pipeline) -> None:
    from PIL import Image

    with pytest.raises(DexportError, match="no encoder"):
        pipeline("red", image=Image.new("RGB", (32, 32)))


def test_a_learned_variance_is_the_prompts_own(pipeline: Pipeline, denoiser: Denoiser) -> None:
    """A model with twice the channels: its first half is guided, and the second is left out by DDIM."""
    request = Request(["red apple"], negative_prompt="a table", guidance=3.0, guidance_rescale=0.5)
    plain = last(pipeline, request)
    run = denoiser.run

    def doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
        output = run(inputs)["output"]
        return {"output": np.concatenate([output, 100 + output], axis=1)}

    denoiser.run = doubled  # type: ignore[method-assign]
    np.testing.assert_array_equal(last(pipeline, request), plain)
