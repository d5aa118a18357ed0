"""Presets and options of the scheduler, at run and at build: diffusers' own pipeline with the same arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import StableDiffusionPipeline

from exporter import ensemble
from exporter.build import build
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes import presets
from runtimes.errors import DexportError
from runtimes.pipeline import Pipeline
from runtimes.presets import PRESETS
from runtimes.request import Request
from tests.families import harness, small_flow

WORDS = "red apple"


@pytest.fixture(scope="module")
def bundle(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    (made,) = build(tiny_sd, tmp_path_factory.mktemp("bundle") / "b", targets="onnxruntime")
    return Pipeline.load(made.folder)


def pipe_of(folder: Path, scheduler: str, options: dict[str, Any]) -> Any:
    """diffusers' pipeline of a folder with a scheduler ``from_config``."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    return pipe


def steps(count: int, guidance: float = 0, **more: Any) -> dict[str, Any]:
    return {"num_inference_steps": count, "guidance_scale": guidance, **more}


TRAILING = {"timestep_spacing": "trailing"}
# What the cards say in the words of diffusers: the scheduler, its options, and the arguments of the call.
CARDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lcm": ("LCMScheduler", {}, steps(4, 8.0)),
    "lcm-lora": ("LCMScheduler", {}, steps(4)),
    "tcd": ("TCDScheduler", {}, steps(4, eta=0.3)),
    "lightning-1step": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, steps(1)),
    "lightning-2step": ("EulerDiscreteScheduler", TRAILING, steps(2)),
    "lightning-4step": ("EulerDiscreteScheduler", TRAILING, steps(4)),
    "lightning-8step": ("EulerDiscreteScheduler", TRAILING, steps(8)),
    "hyper-1step": ("LCMScheduler", {}, {"timesteps": [800], "guidance_scale": 0}),
    "hyper-2step": ("DDIMScheduler", TRAILING, steps(2)),
    "hyper-4step": ("DDIMScheduler", TRAILING, steps(4)),
    "hyper-8step": ("DDIMScheduler", TRAILING, steps(8)),
    "hyper-8step-cfg": ("DDIMScheduler", TRAILING, steps(8, 5.0)),
    "hyper-12step-cfg": ("DDIMScheduler", TRAILING, steps(12, 5.0)),
    "hyper-unified": ("TCDScheduler", {}, steps(4, eta=1.0)),
    "sd-turbo": ("EulerDiscreteScheduler", TRAILING, steps(1)),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", TRAILING, steps(1)),
    "dmd2-1step": ("LCMScheduler", {}, {"timesteps": [399], "guidance_scale": 0}),
    "dmd2-4step": ("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249], "guidance_scale": 0}),
    "flash": ("LCMScheduler", TRAILING, steps(4)),
}
FLOWS = {  # with the checkpoint's own flow-matching Euler: steps and guidance
    "hyper-sd3-4step": (4, 3.0), "hyper-sd3-8step": (8, 5.0), "hyper-sd3-16step": (16, 7.0),
    "hyper-flux-8step": (8, 3.5), "hyper-flux-16step": (16, 3.5),
}  # fmt: skip


def test_every_preset_has_its_card() -> None:
    assert {**CARDS, **FLOWS}.keys() == PRESETS.keys()
    for name, figures in FLOWS.items():
        preset = PRESETS[name]
        assert (preset.sampler, preset.scheduler, preset.steps, preset.guidance) == ("flow_euler", {}, *figures)


@pytest.mark.parametrize("name", CARDS)
def test_a_preset_is_diffusers_pipeline_with_the_cards_arguments(name: str, bundle: Pipeline, tiny_sd: Path) -> None:
    preset, (scheduler, options, told) = PRESETS[name], CARDS[name]
    expected = harness.theirs(pipe_of(tiny_sd, scheduler, options), prompt=WORDS, **told)
    asked = presets.settings(name, {})
    got = harness.ours(bundle, Request([WORDS], **asked))
    assert abs(got - expected).max() < 1e-3
    if preset.guidance > 1:
        return
    # The call by name is the same, and what is given beside it counts.
    result = bundle(WORDS, preset=name, seed=3)
    assert result.settings[0]["steps"] == preset.steps and result.settings[0]["guidance"] == preset.guidance
    assert result.settings[0].get("scheduler", {}) == preset.scheduler


def test_what_is_given_beside_a_preset_counts(bundle: Pipeline) -> None:
    settings = bundle(WORDS, preset="dmd2-4step", scheduler={"timesteps": [900, 500]}, guidance=2).settings[0]
    assert (settings["steps"], settings["guidance"]) == (2, 2.0)
    settings = bundle(WORDS, preset="hyper-4step", steps=3, sampler="ddpm").settings[0]
    assert (settings["steps"], settings["sampler"]) == (3, "ddpm")
    with pytest.raises(DexportError, match=r"no preset 'x'; there are lcm, "):
        bundle(WORDS, preset="x")
    with pytest.raises(DexportError, match="FlowMatchEulerDiscreteScheduler is for a flow-matching model"):
        bundle(WORDS, preset="hyper-flux-8step")


@pytest.mark.parametrize("name", ["dmd2-4step", "lightning-4step", "hyper-8step-cfg"])
def test_a_preset_at_build_is_the_bundles_default(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    """Sampler, options, steps and guidance are in the manifest, and the run without a word of them is diffusers'."""
    preset = PRESETS[name]
    (made,) = build(Origin(tiny_sd, preset=name), tmp_path / "b", targets="onnxruntime")
    pipeline = Pipeline.load(made.folder)
    (stage,) = pipeline.model.stages
    assert (stage.steps, stage.guidance.scale) == (preset.steps, preset.guidance)
    assert stage.guidance.kind == ("cfg" if preset.guidance > 1 else "none")
    assert {**stage.scheduler, **preset.scheduler} == stage.scheduler
    assert json.loads((made.folder / "dexport.json").read_text())["model"]["stages"][0]["steps"] == preset.steps
    scheduler, options, told = CARDS[name]
    expected = harness.theirs(pipe_of(tiny_sd, scheduler, options), prompt=WORDS, **told)
    assert abs(harness.ours(pipeline, Request([WORDS])) - expected).max() < 1e-3


def test_options_at_build_are_checked_before_anything_is_made(tiny_sd: Path, tmp_path: Path) -> None:
    for origin, words in (
        (Origin(tiny_sd, scheduler={"spacing": "trailing"}), "has no option 'spacing'"),
        (Origin(tiny_sd, preset="none"), "no preset 'none'"),
        (Origin(tiny_sd, scheduler={"timesteps": [9, 5]}, steps=4), "2 timesteps for 4 steps"),
    ):
        with pytest.raises(DexportError, match=words):
            build(origin, tmp_path / "b", targets="onnxruntime")
        assert not (tmp_path / "b").exists()
    read = ensemble.read(Origin(tiny_sd, scheduler={"timesteps": [9, 5]}))
    (stage,) = ensemble.stages(read, Shape(64, 64, free=False))
    assert stage.steps == 2 and stage.scheduler["timesteps"] == [9, 5]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sigmas": [1.0, 0.6, 0.2]}, {"sigmas": [1.0, 0.6, 0.2]}),
        ({"shift": 3.0, "use_dynamic_shifting": False}, {"num_inference_steps": 3}),
    ],
)
def test_a_flow_takes_options_and_sigmas_of_its_own(
    options: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    """In place of the even ones that its pipeline gives to the scheduler."""
    small_flow.flux(tmp_path / "flux")
    origin = Origin(tmp_path / "flux", scheduler=options, steps=None if "sigmas" in options else 3)
    (made,) = build(origin, tmp_path / "b", targets="onnxruntime", shape=(64, 64))
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "flux", torch_dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    if "sigmas" not in options:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **options)
    expected = harness.theirs(pipe, prompt=WORDS, height=64, width=64, max_sequence_length=512, **told)
    got = harness.ours(Pipeline.load(made.folder), Request([WORDS]))
    assert abs(got - expected).max() < 1e-3
