"""Pipelines that tell no latents, most with several ways out of noise: their bundles draw what diffusers' own draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.accuracy import psnr
from runtimes.request import Request
from tests.families.harness import Array, Built, build_all, build_engines, draws, ours, prove, theirs
from tests.families.small_cascades import decoded, kandinsky, stable_cascade, unclip, wuerstchen
from tests.families.small_ldm import ldm_text

DIFFERENCE = 1e-3  # of a pixel in [0, 1]; both sides round what goes into each call of a model to float32
PICTURES = 45.0  # dB
PROMPTS = ("red apple", "a")


@dataclass(frozen=True)
class Kind:
    """``make`` writes the checkpoint into a folder; ``asked``: for ``Request``, ``words``: the same for diffusers."""

    name: str
    make: Callable[[Path], Any]
    asked: Mapping[str, Any]
    words: Mapping[str, Any]
    beside: Mapping[str, str] = field(default_factory=dict)  # for ``Origin``: folders that ``make`` writes beside it
    shape: tuple[int, int] | None = None


KINDS = [
    Kind(
        "kandinsky", kandinsky,
        {"steps": {"prior": 3, "decoder": 4}, "guidance": {"prior": 2.0, "decoder": 3.0}},
        {
            "prior_num_inference_steps": 3, "num_inference_steps": 4, "prior_guidance_scale": 2.0,
            "guidance_scale": 3.0, "height": 16, "width": 16,
        },
    ),
    Kind(
        "unclip", unclip,
        {"steps": {"prior": 3, "decoder": 4, "superresolution": 3}, "guidance": {"prior": 2.0, "decoder": 3.0}},
        {
            "prior_num_inference_steps": 3, "decoder_num_inference_steps": 4, "super_res_num_inference_steps": 3,
            "prior_guidance_scale": 2.0, "decoder_guidance_scale": 3.0,
        },
    ),
    Kind(
        "consistency", decoded, {"steps": 3, "guidance": 6.0}, {"num_inference_steps": 3, "guidance_scale": 6.0},
        {"decoder": "decoder"},
    ),
    *(
        Kind(
            make.__name__, make, {"steps": {"prior": 3, "decoder": 2}, "guidance": 3.0},
            {
                "prior_num_inference_steps": 3, "num_inference_steps": 2, "prior_guidance_scale": 3.0, "height": 128,
                "width": 128,
            },
            shape=(128, 128),
        )
        for make in (stable_cascade, wuerstchen)
    ),
    Kind("ldm-text", ldm_text, {"steps": 3, "guidance": 6.0}, {"num_inference_steps": 3, "guidance_scale": 6.0}),
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """The bundles of a kind, and what diffusers draws."""

    kind: Kind
    built: Built
    pipe: Any
    pictures: Array


@pytest.fixture(scope="module", params=KINDS, ids=lambda one: one.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    one: Kind = request.param
    folder = tmp_path_factory.mktemp(one.name)
    pipe = one.make(folder / "checkpoint")
    pictures = theirs(pipe, prompt=list(PROMPTS), **one.words)
    said = {name: folder / place for name, place in one.beside.items()}
    return Made(one, build_all(folder / "checkpoint", folder, one.shape, **said), pipe, pictures)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_bundle_draws_what_diffusers_draws(made: Made, name: str) -> None:
    pictures = ours(made.built.pipeline(name), Request(PROMPTS, **made.kind.asked))
    assert np.abs(pictures - made.pictures).max() <= DIFFERENCE
    assert psnr(made.pictures, pictures) >= PICTURES
    assert np.std(made.pictures) > 0.01 and np.std(pictures[0] - pictures[-1]) > 0.01  # else anything would agree


@pytest.mark.parametrize("made", KINDS[:1], indirect=True, ids=lambda one: one.name)
def test_negative_prompt_is_what_diffusers_makes_of_it(made: Made) -> None:
    """Kandinsky's prior draws it too: of each draw of diffusers' the second half is the negative prompt's."""
    negative = ["green table"] * len(PROMPTS)
    expected = theirs(made.pipe, prompt=list(PROMPTS), negative_prompt=negative, **made.kind.words)
    pipeline, steps = made.built.pipeline("onnxruntime"), made.kind.asked["steps"]["prior"]
    (first, second), count = (pipeline.sample_shape(Request(), stage) for stage in pipeline.model.stages), len(PROMPTS)
    both = draws((2 * count, *first))
    halves = list(zip(*(np.split(both(), 2) for _ in range(steps)), strict=True))
    own = iter([*halves[0], *halves[1]])
    request = Request(PROMPTS, negative_prompt=negative[0], **made.kind.asked)
    *_, last = pipeline.generate(request, [lambda: next(own), draws((count, *second))])
    assert np.abs(pipeline.decode(last.sample) - expected).max() <= DIFFERENCE
    assert np.abs(expected - made.pictures).max() > 0.01


def test_bundle_proves_itself(made: Made) -> None:
    prove(made.built)


def test_engines_are_built(made: Made, tmp_path: Path) -> None:
    build_engines(made.built, tmp_path)
