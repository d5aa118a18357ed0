"""Hints: which call has which scale, what a graph makes of a picture, and what is refused; without a real model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes import example
from runtimes.check import check_model
from runtimes.errors import DexportError
from runtimes.hints import Hint
from runtimes.image import to_array
from runtimes.manifest import Graph, HintInput, Model, Tensor, from_json, to_json
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.runtimes import test_stages as stages
from tests.tiny import write_words

EDGES = HintInput("edges", None, "edges_image", "edges_scale", 1.0, "lanczos")
STYLE = HintInput("style", "hint_style", "image", "style_scale", 0.6, "bicubic")
FURTHER = (
    Tensor("edges_image", "float32", ("batch", 3, 16, 16)), Tensor("edges_scale", "float32", ("batch",)),
    Tensor("style_tokens", "float32", ("batch", 2)), Tensor("style_scale", "float32", ("batch",)),
)  # fmt: skip
TOKENS = FURTHER[2]
IMAGE = Tensor("image", "float32", ("batch", 3, 4, 4))
GREY, WHITE = Image.new("RGB", (16, 16), (51, 51, 51)), Image.new("RGB", (16, 16), "white")


class Style:
    """The mean of the picture, and -1 for the negative prompt."""

    max_batch = None
    calls = 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        mean = np.repeat(inputs["image"].mean(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0], 2, axis=1)
        return {"style_tokens": mean, "negative_style_tokens": np.full_like(mean, -1)}


def model(**stage: Any) -> Model:
    plain = stages.model(further=FURTHER, **{"hints": (EDGES, STYLE), **stage})
    outputs = (TOKENS, replace(TOKENS, name="negative_style_tokens"))
    return replace(plain, graphs={**plain.graphs, "hint_style": Graph("hint", "hint_style/g", (IMAGE,), outputs)})


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., tuple[Pipeline, stages.Denoiser, Style]]:
    def open_model(**stage: Any) -> tuple[Pipeline, stages.Denoiser, Style]:
        write_words(tmp_path / "tokenizer_tokens/t.json")
        denoiser, style = stages.Denoiser(), Style()
        sessions: dict[str, Any] = {"text": stages.Text(), "denoiser": denoiser, "hint_style": style}
        return Pipeline(model(**stage), tmp_path, sessions.__getitem__), denoiser, style

    return open_model


def run(pipeline: Pipeline, **asked: Any) -> None:
    for _ in pipeline.generate(Request(["red apple", "a"], guidance=2.0, **asked)):
        pass


@pytest.mark.parametrize("steps", [5, 7, 10])
@pytest.mark.parametrize("interval", [(0.2, 0.8), (0.0, 0.58), (0.25, 1.0), (0.0, 1.0), (0.29, 0.71)])
def test_a_scale_holds_in_the_part_that_diffusers_keeps(
    opened: Callable[..., Any], steps: int, interval: tuple[float, float]
) -> None:
    pipeline, denoiser, _ = opened()
    run(pipeline, steps=steps, hints={"edges": Hint(GREY, 0.5, interval), "style": WHITE})
    # StableDiffusionControlNetPipeline's controlnet_keep, its rounding errors left out
    kept = [not (i / steps < interval[0] - 1e-9 or (i + 1) / steps > interval[1] + 1e-9) for i in range(steps)]
    assert [call["edges_scale"].tolist() for call in denoiser.calls] == [[0.5 * keep] * 4 for keep in kept]
    assert all((call["style_scale"] == np.float32(0.6)).all() for call in denoiser.calls)


@pytest.mark.parametrize("batch", ["batched", "sequential"])
def test_pictures_are_for_every_row(opened: Callable[..., Any], batch: str) -> None:
    pipeline, denoiser, style = opened()
    run(pipeline, steps=2, hints={"style": GREY, "edges": WHITE}, guidance_batch=batch)
    assert style.calls == 1  # once, whatever the steps and the guidance
    step = denoiser.calls[: len(denoiser.calls) // 2]
    images, tokens = (np.concatenate([call[name] for call in step]) for name in ("edges_image", "style_tokens"))
    assert (images == 1).all() and images.shape == (4, 3, 16, 16)
    np.testing.assert_allclose(tokens, np.repeat([[-1], [-1], [0.2], [0.2]], 2, axis=1), rtol=1e-6)


def test_one_picture_needs_no_name(opened: Callable[..., Any]) -> None:
    pipeline, denoiser, _ = opened(hints=(STYLE,))
    run(pipeline, steps=1, hints={"": Hint(GREY, -2)})
    assert (denoiser.calls[0]["style_scale"] == -2).all()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "no picture for the hint edges and style; give one with --hint edges=FILE"),
        ({"edges": GREY}, "no picture for the hint style"),
        ({"": GREY}, "name the picture of each hint, like edges=picture.png; there are edges, style"),
        ({"edges": GREY, "style": GREY, "pose": GREY}, "there is no hint 'pose'; this model takes edges, style"),
        ({"edges": "a.png", "style": GREY}, "hint edges: give an image"),
        ({"edges": Hint(GREY, float("nan")), "style": GREY}, "hint edges: the scale must be a number up to 100"),
        ({"edges": Hint(GREY, 1000.0), "style": GREY}, "hint edges: the scale must be a number up to 100"),
        ({"edges": Hint(GREY, 1, (0.8, 0.2)), "style": GREY}, "hint edges: the interval must be two numbers"),
        ({"edges": Hint(GREY, 1, (0.3, 0.4)), "style": GREY}, "holds none of 4 calls whole"),
    ],
)
def test_pictures_that_do_not_fit(opened: Callable[..., Any], given: dict[str, Any], line: str) -> None:
    pipeline, _, _ = opened()
    with pytest.raises(DexportError, match=line) as error:
        run(pipeline, steps=4, hints=given)
    assert "\n" not in str(error.value)


def test_one_hint_has_one_picture(opened: Callable[..., Any]) -> None:
    with pytest.raises(DexportError, match="there are two pictures for the hint edges"):
        run(opened(hints=(EDGES,))[0], steps=4, hints={"": GREY, "edges": GREY})


def test_a_model_without_hints_takes_none(opened: Callable[..., Any]) -> None:
    with pytest.raises(DexportError, match="takes no pictures as hints"):
        run(opened(hints=())[0], hints={"edges": GREY})


def test_settings_say_what_steered(opened: Callable[..., Any]) -> None:
    pipeline, _, _ = opened(decoder=None)
    pipeline.decode = lambda sample, request=None: np.clip(sample[:, :3], 0, 1)  # type: ignore[method-assign]
    made = pipeline("red", steps=2, guidance=1.0, hints={"edges": Hint(GREY, 0.5, (0, 0.5)), "style": GREY})
    assert made.settings[0]["hints"] == {"edges": {"scale": 0.5, "interval": [0.0, 0.5]}, "style": {"scale": 0.6}}


def test_an_example_has_pictures() -> None:
    pictures = example.request(model(), "red").hints
    assert [image.size for image in pictures.values()] == [(32, 32), (32, 32)]
    assert np.std(np.asarray(pictures["edges"]) - np.asarray(pictures["style"])) > 0


def test_a_manifest_with_hints_comes_back() -> None:
    check_model(model(), "it")
    assert from_json(Model, to_json(model()), "it") == model()


@pytest.mark.parametrize(
    ("hints", "line"),
    [
        ((replace(EDGES, name="Edges"),), "a hint's name is 'Edges'"),
        ((EDGES, replace(STYLE, name="edges")), "two hints have the same name"),
        ((EDGES, replace(EDGES, name="other")), "'edges_scale' is filled twice"),
        ((replace(EDGES, input="hidden"),), "input is 'hidden'"),
        ((replace(EDGES, scale="ghost"),), "scale is 'ghost'"),
        ((replace(EDGES, default=float("inf")),), "default is inf"),
        ((replace(STYLE, graph="text"),), "a graph of the kind hint"),
        ((replace(STYLE, input="edges_image"),), "input is 'edges_image'"),
    ],
)
def test_hints_that_make_no_sense(hints: tuple[HintInput, ...], line: str) -> None:
    with pytest.raises(DexportError, match=line):
        check_model(model(hints=hints), "it")


def test_a_graph_must_make_what_the_denoiser_takes() -> None:
    wrong = model()
    graph = replace(wrong.graphs["hint_style"], outputs=(replace(TOKENS, shape=("batch", 3)),))
    with pytest.raises(DexportError, match="an output of its graph is 'style_tokens'"):
        check_model(replace(wrong, graphs={**wrong.graphs, "hint_style": graph}), "it")


@pytest.mark.parametrize("size", [(24, 24), (50, 31), (31, 50), (17, 90)])
def test_bicubic_is_how_clip_sees_a_picture(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels)
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24, do_normalize=False)
    expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(to_array(image, (24, 24), "bicubic"), expected, atol=1e-6)
