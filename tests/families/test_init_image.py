"""From an image, with a mask and without: the steps, the noise and the defaults of diffusers' own pipelines."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from exporter import ensemble
from exporter.families import Shape
from runtimes import samplers
from runtimes.errors import DexportError
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.families import small, small_cascades, small_flow, small_hints, small_transformers
from tests.families.harness import Array, draw, hole, picture, same_noise, untraced

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LATENTS = 1e-3  # largest difference; both sides round what goes into each call of the model to float32
SIDE = 32
PROMPT = "red apple"


def wide_sd_3(folder: Path) -> None:
    """StableDiffusion3InpaintPipeline takes latents of 16 channels alone."""
    small_flow.sd_3(folder, with_t5=False, channels=16)


def sd(folder: Path) -> None:
    scheduler = diffusers.DDIMScheduler(**small.SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    small.stable_diffusion(folder, diffusers.StableDiffusionPipeline, scheduler, {})


def plain_xl(folder: Path) -> None:
    """Without means of latents, which diffusers' inpainting leaves out when it encodes, and takes in as it decodes."""
    small.stable_diffusion_xl(
        folder, diffusers.StableDiffusionXLPipeline, diffusers.EulerDiscreteScheduler(**small.SCHEDULE), means=False
    )


@dataclass(frozen=True)
class Case:
    """A family, the classes of diffusers that start from an image and paint into one, and what these are told."""

    make: Callable[[Path], Any]
    image: str
    mask: str | None
    told: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    asked: Mapping[str, Any] = field(default_factory=lambda: {"guidance": 3.0})
    side: int = SIDE
    scale: float = 1.0  # of our latents, over those that diffusers hands out


CASES = {
    "sd": Case(sd, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "lcm": Case(small.latent_consistency, "LatentConsistencyModelImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": Case(plain_xl, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd-3": Case(wide_sd_3, "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": Case(small_flow.flux, "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "flux-schnell": Case(
        small_flow.flux_schnell, "FluxImg2ImgPipeline", "FluxInpaintPipeline",
        {"guidance_scale": 0.0, "max_sequence_length": 256}, {},
    ),
    "qwen-image": Case(
        small_flow.qwen_image, "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline",
        {"true_cfg_scale": 3.0, "guidance_scale": None, "negative_prompt": ""},
    ),
    "z-image": Case(
        small_flow.z_image, "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", {"guidance_scale": 2.0},
    ),
    "sana-sprint": Case(
        small_transformers.sana_sprint, "SanaSprintImg2ImgPipeline", None,
        {"guidance_scale": 3.0, "use_resolution_binning": False, "intermediate_timesteps": None},
        scale=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Both:
    """The torch model behind our pipeline, and diffusers' own of its classes."""

    case: Case
    ours: Pipeline
    image: Any
    mask: Any


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    @cache
    def make(name: str) -> Both:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        case.make(folder / "checkpoint")
        ours = untraced(folder / "checkpoint", folder / "tokenizers", Shape(case.side, case.side, free=False))
        return Both(case, ours, *(opened_class(kind, folder / "checkpoint") for kind in (case.image, case.mask)))

    return make


def opened_class(kind: str | None, folder: Path) -> Any:
    """A pipeline of another class than the checkpoint's, of its parts."""
    if kind is None:
        return None
    found = getattr(diffusers, kind)
    known = inspect.signature(found.__init__).parameters
    absent = dict.fromkeys({"safety_checker", "image_encoder", "feature_extractor"} & set(known))
    index = json.loads((folder / "model_index.json").read_text())
    absent |= {name: None for name in known if index.get(name) == [None, None]}
    pipe = found.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(made: Both, steps: int, strength: float, *, masked: bool, **told: Any) -> Array:
    """The last latents of diffusers' pipeline."""
    pipe = made.mask if masked else made.image
    side = made.case.side
    image = picture(side)
    words = {"prompt": PROMPT, "num_inference_steps": steps, "strength": strength, "output_type": "latent"}
    words |= {**made.case.told, **told}
    if masked:
        words |= {"image": image, "mask_image": hole(side)}
    else:
        words["image"] = image
    if "height" in inspect.signature(pipe.__call__).parameters:
        words |= {"height": side, "width": side}
    with same_noise():
        latents = pipe(**words).images
    if latents.ndim == 3:  # tokens of packed latents
        latents = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
    if latents.ndim == 5:  # a video of one frame
        latents = latents[:, :, 0]
    return made.case.scale * np.asarray(latents)


def mine(made: Both, steps: int, strength: float | None, *, masked: bool, **asked: Any) -> Array:
    mask = hole(made.case.side) if masked else None
    request = Request(
        [PROMPT],
        image=picture(made.case.side),
        mask=mask,
        steps=steps,
        strength=strength,
        **{**made.case.asked, **asked},
    )
    return draw(made.ours, request)[0]


# Shares that are whole numbers of steps, that are not, and whose floats fall just below a whole number.
GRID = [(4, 0.6), (7, 0.5), (10, 0.58), (9, 0.3), (3, 0.99), (20, 0.29), (5, 1.0), (5, 0.15)]


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", CASES)
def test_every_strength_starts_where_diffusers_does(both: Callable[[str], Both], name: str, masked: bool) -> None:
    made = both(name)
    if masked and made.mask is None:
        pytest.skip("diffusers has no class for it")
    for steps, strength in GRID:
        try:
            expected = theirs(made, steps, strength, masked=masked)
        except ValueError:  # as most of the classes say it
            expected = np.zeros(0)
        if not expected.size:  # no step is left
            with pytest.raises(DexportError, match=r"a strength of .* leaves .* steps"):
                mine(made, steps, strength, masked=masked)
            continue
        latents = mine(made, steps, strength, masked=masked)
        assert np.abs(latents - expected).max() <= LATENTS, (steps, strength)
        assert np.std(expected) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_strength_is_the_classes_own_if_nothing_is_asked_for(both: Callable[[str], Both], name: str) -> None:
    made = both(name)
    (stage,) = made.ours.model.stages
    assert stage.image_to_image.strength == default(made.case.image)
    assert stage.inpaint.strength == (1.0 if made.case.mask is None else default(made.case.mask))
    assert np.array_equal(mine(made, 4, None, masked=False), mine(made, 4, default(made.case.image), masked=False))


def default(kind: str) -> float:
    return float(inspect.signature(getattr(diffusers, kind).__call__).parameters["strength"].default)


OTHERS = ["LCMScheduler", "TCDScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", ["sd", "lcm"])
def test_another_sampler_keeps_the_rule_of_its_pipeline(both: Callable[[str], Both], name: str, masked: bool) -> None:
    """Of latent consistency models the strength is told to samplers that take one; to the others no class tells it."""
    made = both(name)
    pipe = made.mask if masked else made.image
    own = pipe.scheduler
    for kind in OTHERS:
        eta = {"eta": 0.3} if kind == "TCDScheduler" else {}
        if name == "lcm" and not masked and kind != "LCMScheduler":
            continue  # its class gives every scheduler the arguments of LCM's, and TCD's no eta
        try:
            pipe.scheduler = getattr(diffusers, kind).from_config(
                {**own.config, **made.ours.model.stages[0].scheduler}, **SKIPPED
            )
            expected = theirs(made, 7, 0.5, masked=masked, **eta)
        finally:
            pipe.scheduler = own
        assert np.abs(mine(made, 7, 0.5, masked=masked, sampler=kind) - expected).max() <= LATENTS, kind


SKIPPED = {"skip_prk_steps": True}


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.29, 0.58])
def test_steps_are_spread_over_the_strength(kind: str, strength: float) -> None:
    for steps in (1, 4, 5, 14):
        scheduler = getattr(diffusers, kind)()
        scheduler.set_timesteps(steps, strength=strength)
        table = samplers.compile_table({"_class_name": kind}, steps, strength=strength)
        assert [row.t for row in table.rows] == scheduler.timesteps.tolist()
    listed = [900, 700, 500, 300, 100]
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(timesteps=listed, strength=strength)
    table = samplers.compile_table({"_class_name": kind}, 5, timesteps=listed, strength=strength)
    assert [row.t for row in table.rows] == scheduler.timesteps.tolist()
    with pytest.raises(DexportError, match="takes no strength of your own"):
        samplers.compile_table({"_class_name": "DDIMScheduler"}, 4, strength=0.5)


# Other than in diffusers by themselves: TCD's gamma is an argument there, SA-Solver draws noise that it does not use,
# DPM-SDE's is a path of its own, and LMS takes the weights of a past that it does not have (docs/samplers.md).
APART = ("tcd", "sa_solver", "dpmpp_sde", "lms")
NAMED = [name for name in samplers.NAMES if name not in APART and not name.startswith(("flow_", "ipndm"))]


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", NAMED)
def test_every_sampler_starts_where_diffusers_does(both: Callable[[str], Both], name: str, masked: bool) -> None:
    """The noise of the first step, calls within a step, and of a mask what is put back after each call."""
    made = both("sd")
    pipe = made.mask if masked else made.image
    own, (kind, implied) = pipe.scheduler, samplers.find(name)
    try:
        pipe.scheduler = getattr(diffusers, kind).from_config(own.config, **implied)
        for steps, strength in ((7, 0.6), (5, 1.0)):
            expected = theirs(made, steps, strength, masked=masked)
            assert np.abs(mine(made, steps, strength, masked=masked, sampler=name) - expected).max() <= LATENTS
    finally:
        pipe.scheduler = own


def test_the_calls_of_runge_and_kutta_keep_what_a_mask_leaves(both: Callable[[str], Both]) -> None:
    made = both("sd")
    own = made.mask.scheduler
    try:
        made.mask.scheduler = diffusers.PNDMScheduler.from_config(own.config, skip_prk_steps=False)
        expected = theirs(made, 6, 1.0, masked=True)
    finally:
        made.mask.scheduler = own
    assert np.abs(mine(made, 6, 1.0, masked=True, sampler="PNDMScheduler") - expected).max() <= LATENTS


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("kind", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_every_flow_sampler_starts_where_diffusers_does(both: Callable[[str], Both], kind: str, masked: bool) -> None:
    made = both("sd-3")
    pipe = made.mask if masked else made.image
    own = pipe.scheduler
    try:
        pipe.scheduler = getattr(diffusers, kind).from_config(own.config)
        for steps, strength in ((4, 0.6), (5, 1.0)):
            expected = theirs(made, steps, strength, masked=masked)
            assert np.abs(mine(made, steps, strength, masked=masked, sampler=kind) - expected).max() <= LATENTS
    finally:
        pipe.scheduler = own


@pytest.mark.parametrize("strength", [0.6, 0.3])
def test_kandinsky_starts_where_diffusers_does(tmp_path: Path, strength: float) -> None:
    small_cascades.kandinsky(tmp_path / "checkpoint")
    pipe = opened_class("KandinskyV22Img2ImgCombinedPipeline", tmp_path / "checkpoint")
    ours = untraced(tmp_path / "checkpoint", tmp_path / "tokenizers", Shape(16, 16, free=False))
    assert ours.model.stages[1].image_to_image.strength == default("KandinskyV22Img2ImgCombinedPipeline")
    with same_noise():
        expected = pipe(
            PROMPT, image=picture(16), strength=strength, num_inference_steps=7, guidance_scale=3.0, height=16,
            width=16, prior_num_inference_steps=3, prior_guidance_scale=2.0, output_type="np",
        ).images.transpose(0, 3, 1, 2)  # fmt: skip
    asked = {"steps": {"prior": 3, "decoder": 7}, "guidance": {"prior": 2.0, "decoder": 3.0}}
    _, images = draw(ours, Request([PROMPT], image=picture(16), strength=strength, **asked))
    assert np.abs(images - expected).max() <= LATENTS


@pytest.mark.parametrize("xl", ["", "XL"])
def test_a_control_net_brings_the_strength_of_its_own_class(tmp_path: Path, xl: str) -> None:
    make = small.sdxl if xl else sd
    make(tmp_path / "checkpoint")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint/unet")
    small_hints.control(unet, 1).save_pretrained(tmp_path / "canny")
    small_hints.features(3, "full_adapter_xl" if xl else "full_adapter").save_pretrained(tmp_path / "sketch")
    for network, with_it in (("canny", "ControlNet"), ("sketch", "")):
        source = ensemble.read(ensemble.Origin(tmp_path / "checkpoint", controls=[tmp_path / network]))
        (stage,) = ensemble.stages(source, Shape(32, 32, free=False))
        assert stage.image_to_image.strength == default(f"StableDiffusion{xl}{with_it}Img2ImgPipeline")
        assert stage.inpaint.strength == default(f"StableDiffusion{xl}{with_it}InpaintPipeline")
