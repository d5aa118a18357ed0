"""Checkpoints are read as diffusers' own pipeline object has them, and a reading that parts from it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from exporter import checkpoint as checkpoints
from exporter import ensemble, oracle, record
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes.errors import DexportError, GateError
from runtimes.manifest import Model
from tests.families import small, small_cascades, small_video
from tests.families.harness import described

# What the constructors say while they repair.
pytestmark = pytest.mark.filterwarnings("ignore:.*configuration file of.*:FutureWarning")
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "checkpoint"
    small_cascades.stable_diffusion(folder)
    return folder


def changed(checkpoint: Path, folder: Path, file: str, change: Change) -> Path:
    """A copy of a checkpoint with one JSON file changed."""
    copy = Path(shutil.copytree(checkpoint, folder / "changed"))
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return copy


def theirs(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (SCHEDULER, lambda content: content.pop("clip_sample")),
        (SCHEDULER, lambda content: content.pop("steps_offset")),
        (SCHEDULER, lambda content: content.update(steps_offset=0, clip_sample=True)),
        (SCHEDULER, lambda content: content.update(_class_name="EulerDiscreteScheduler")),
        (SCHEDULER, lambda content: content.pop("_class_name")),
        ("model_index.json", lambda content: content.update(scheduler=["diffusers", "DPMSolverMultistepScheduler"])),
    ],
    ids=["no clip_sample", "no steps_offset", "old values", "another class", "no class", "model_index says another"],
)
def test_schedulers_are_what_the_pipeline_has(checkpoint: Path, tmp_path: Path, file: str, change: Change) -> None:
    folder = changed(checkpoint, tmp_path, file, change)
    live, read = theirs(folder).scheduler, ensemble.read(folder).scheduler
    assert read["_class_name"] == type(live).__name__
    for name in ("clip_sample", "steps_offset", "set_alpha_to_one", "beta_start", "prediction_type"):
        if name in read:
            assert read[name] == live.config[name], name
    for name in ("clip_sample", "steps_offset"):  # which a constructor repairs: they cannot be left to a default
        if name in live.config:
            assert read[name] == live.config[name], name


def test_a_unet_that_was_saved_long_ago_has_the_size_that_the_pipeline_gives_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = changed(
        checkpoint, tmp_path, "unet/config.json", lambda content: content.update(_diffusers_version="0.6.0")
    )
    pipe, read = theirs(folder), ensemble.read(folder)
    assert pipe.unet.config.sample_size == read.components["unet"].config["sample_size"] == 64
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert read.family.default_shape(read) == (side, side)


def test_lent_weights_are_the_pipelines_own(checkpoint: Path) -> None:
    """Each parameter, when it is asked for; and none of them takes memory in between."""
    (pipe,), _ = oracle.pipelines(ensemble.read(checkpoint))
    own = theirs(checkpoint)
    for name in ("unet", "vae", "text_encoder"):
        modules, wanted = dict(pipe.components[name].named_modules()), getattr(own, name).state_dict()
        for key, value in wanted.items():
            path, _, last = key.rpartition(".")
            assert torch.equal(getattr(modules[path], last), value), f"{name}.{key}"
        hollow = sum(part.untyped_storage().nbytes() for part in pipe.components[name].parameters())
        assert hollow == 4 * sum(1 for _ in pipe.components[name].parameters())


def exported(origin: Path | Origin, folder: Path) -> tuple[Any, Model, Path]:
    """A checkpoint and its model, as an export would write it."""
    source = ensemble.read(origin)
    model = described(source, folder, Shape(*source.family.default_shape(source), free=False))
    return source, model, folder


@pytest.fixture(scope="module")
def read(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model, Path]:
    return exported(checkpoint, tmp_path_factory.mktemp("model"))


def test_a_right_reading_follows(read: tuple[Any, Model, Path]) -> None:
    source, model, folder = read
    found = record.record(source, model, folder)
    assert found.oracle == "diffusers StableDiffusionPipeline"
    assert [case.name for case in found.cases] == ["default settings", "other settings", "image to image", "inpainting"]
    assert {name: bool(calls) for name, calls in found.calls.items()} == dict.fromkeys(model.graphs, True)


def wrong(model: Model, **changes: Any) -> Model:
    return replace(model, stages=(replace(model.stages[0], **changes),))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: wrong(m, scheduler={**m.stages[0].scheduler, "beta_end": 0.015}), "the sample of step 2"),
        (lambda m: wrong(m, scheduler={**m.stages[0].scheduler, "steps_offset": 0}), "the timesteps"),
        (lambda m: wrong(m, scheduler={**m.stages[0].scheduler, "clip_sample": True}), "the sample of step 2"),
        (lambda m: wrong(m, guidance=replace(m.stages[0].guidance, scale=7.0)), "output 1"),
        (lambda m: wrong(m, guidance=replace(m.stages[0].guidance, empty="zeros")), "output 1"),
        (lambda m: replace(m, tokenizers=(replace(m.tokenizers[0], pad=1),)), "the tokens"),
    ],
    ids=["betas", "steps_offset", "clipping", "guidance", "empty prompt", "tokens"],
)
def test_the_first_thing_in_which_a_reading_parts_is_named(
    read: tuple[Any, Model, Path], spoil: Callable[[Model], Model], words: str
) -> None:
    source, model, folder = read
    with pytest.raises(GateError, match=f"parts from diffusers' own .* in {words}") as error:
        record.record(source, spoil(model), folder)
    assert "\n" not in str(error.value) and "nothing was written" in str(error.value)


def test_what_diffusers_cannot_make_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path, SCHEDULER, lambda content: content.update(beta_schedule="no such"))
    with pytest.raises(
        DexportError, match="diffusers' StableDiffusionPipeline cannot be made of it: NotImplementedError"
    ):
        ensemble.read(folder)


@pytest.mark.parametrize(
    ("library", "name"),
    [("diffusers", "DiffusionPipeline"), ("transformers", "AutoModel"), ("diffusers", "UNet2DModel"),
     ("diffusers", "NoSuchScheduler")],
)  # fmt: skip
def test_a_file_that_names_another_class_as_a_scheduler_runs_none_of_its_code(
    checkpoint: Path, tmp_path: Path, library: str, name: str
) -> None:
    folder = changed(
        checkpoint, tmp_path, "model_index.json", lambda content: content.update(scheduler=[library, name])
    )
    with pytest.raises(DexportError, match=f"names '{name}' as a scheduler, and diffusers has none of that name"):
        oracle.construct(checkpoints.read(folder))
    with pytest.raises(DexportError, match=f"no sampler '{name}'; choose one"):
        ensemble.read(folder)


SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("tcd", {}), ("tcd", {"eta": 0.3}), ("lcm", {}), ("ddim", {"eta": 0.5, "use_clipped_model_output": True}),
    ("ddim", {"steps_offset": None}), ("dpm_2s", {}), ("dpm_2_ancestral", {}), ("sa_solver", {"tau": 0.5}),
    ("lms", {}), ("euler", {"sigmas": [10.0, 5.0, 1.0]}), ("ddpm", {"timesteps": [900, 500, 100]}),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "options"), SAMPLERS, ids=str)
def test_diffusers_goes_the_way_of_the_sampler_that_is_asked_for(
    checkpoint: Path, tmp_path: Path, sampler: str, options: dict[str, Any]
) -> None:
    """Whether its options are a scheduler's, an argument of its methods or one of the pipeline's call."""
    found = record.record(*exported(Origin(checkpoint, sampler=sampler, scheduler=options), tmp_path))
    assert not found.left and len(found.cases) == 4


def test_what_is_not_finite_in_diffusers_is_said_to_be_so(checkpoint: Path, tmp_path: Path) -> None:
    """UniPC with bh1, at the last step, whose sigma is 0."""
    origin = Origin(checkpoint, sampler="unipc", scheduler={"solver_type": "bh1"})
    with pytest.raises(GateError, match=r"diffusers' own pipeline \(StableDiffusionPipeline, .* comes to NaN"):
        record.record(*exported(origin, tmp_path))


def test_runge_kutta_steps_are_followed_but_from_an_image(checkpoint: Path, tmp_path: Path) -> None:
    """Where diffusers begins between the calls of one of them."""
    found = record.record(*exported(Origin(checkpoint, sampler="pndm", scheduler={"skip_prk_steps": False}), tmp_path))
    assert [case.name for case in found.cases] == ["default settings", "other settings"]
    assert found.left.keys() == {"image to image", "inpainting"}


def test_a_list_is_given_to_the_scheduler_of_a_pipeline_that_takes_none(tmp_path: Path) -> None:
    small_video.saved(tmp_path / "video")
    found = record.record(*exported(Origin(tmp_path / "video", preset="dmd2-4step"), tmp_path))
    assert not found.left
    assert sorted({call.inputs["timestep"][0] for call in found.calls["denoiser"]}) == [249, 999]


def test_a_sampler_that_diffusers_cannot_go_with_leaves_the_reading_proven_by_the_checkpoints_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    """DPM-Solver's SDE draws from a Brownian path."""
    source, model, folder = exported(Origin(checkpoint, sampler="dpmpp_sde"), tmp_path)
    found = record.record(source, model, folder)
    assert found.oracle == "diffusers StableDiffusionPipeline"
    assert found.left == {"sampler": "DPMSolverSDEScheduler draws from a noise of its own"}
    assert [case.name for case in found.cases] == ["default settings"]
    with pytest.raises(GateError, match="in the tokens"):
        record.record(source, replace(model, tokenizers=(replace(model.tokenizers[0], pad=1),)), folder)


def test_a_checkpoint_whose_own_sampler_diffusers_cannot_share_noise_with_is_held_to_torch_alone(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = changed(
        checkpoint, tmp_path, "model_index.json",
        lambda content: content.update(scheduler=["diffusers", "DPMSolverSDEScheduler"]),
    )  # fmt: skip
    found = record.record(*exported(folder, tmp_path))
    assert found.oracle == "torch modules alone: DPMSolverSDEScheduler draws from a noise of its own"
    assert [case.name for case in found.cases] == ["default settings"] and not found.left


@pytest.mark.parametrize("refined", [False, True])
def test_a_tiny_decoder_stands_beside_the_encoder(tmp_path: Path, refined: bool) -> None:
    """It decodes what the last pipeline made, and what begins with an image is still encoded by the autoencoder."""
    (small.sdxl if refined else small.inpainting)(tmp_path / "model")
    if refined:
        small.refiner(tmp_path / "refiner")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=0.5,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    origin = Origin(tmp_path / "model", decoder=tmp_path / "tiny", refiner=tmp_path / "refiner" if refined else None)
    found = record.record(*exported(origin, tmp_path))
    assert found.oracle.startswith("diffusers ") and not found.left


def test_a_sampler_of_ones_choice_is_made_of_the_pipelines_own(tmp_path: Path) -> None:
    """As users of diffusers do, with from_config; and latents are not clipped where the file says nothing of it."""
    small.sdxl(tmp_path / "sdxl")
    source = ensemble.read(Origin(tmp_path / "sdxl", sampler="ddim"))
    (pipe,), _ = oracle.pipelines(source)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.beta_start == small.SCHEDULE["beta_start"]
