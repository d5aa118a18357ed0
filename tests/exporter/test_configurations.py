"""The shipped configurations of single files hold the published values, and make what diffusers makes of such a file.

The values are those of the repositories in ``SOURCES``, as read from copies of their files; where a repository holds a
component that changes nothing here (a safety checker), it is left out. ``DIFFUSERS`` is which of them diffusers itself
takes for a single file (``DIFFUSERS_DEFAULT_PIPELINE_PATHS``).
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS as DIFFUSERS
from safetensors.numpy import load_file, save_file

from exporter import ensemble, single_file
from exporter.build import build
from exporter.ensemble import Origin
from runtimes.errors import DexportError
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.exporter import ldm
from tests.families import harness

SOURCES = {
    "stable-diffusion-1": "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-1-inpainting": "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stable-diffusion-2": "https://huggingface.co/stabilityai/stable-diffusion-2-1",
    "stable-diffusion-2-base": "https://huggingface.co/stabilityai/stable-diffusion-2-1-base",
    "stable-diffusion-2-inpainting": "https://huggingface.co/stabilityai/stable-diffusion-2-inpainting",
    "stable-diffusion-xl": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-xl-inpainting": "https://huggingface.co/diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
}

# scheduler/scheduler_config.json
NOISE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
LATENT = {**NOISE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None}
PNDM = {"_class_name": "PNDMScheduler", **LATENT, "skip_prk_steps": True}
EULER = {
    "_class_name": "EulerDiscreteScheduler", **LATENT, "interpolation_type": "linear", "prediction_type": "epsilon",
    "sample_max_value": 1.0, "skip_prk_steps": True, "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip
SCHEDULERS = {
    "stable-diffusion-1": PNDM,
    "stable-diffusion-1-inpainting": {"_class_name": "DDIMScheduler", **LATENT},
    "stable-diffusion-2": {
        "_class_name": "DDIMScheduler", **LATENT, "prediction_type": "v_prediction", "skip_prk_steps": True,
    },
    "stable-diffusion-2-base": {**PNDM, "prediction_type": "epsilon"},
    "stable-diffusion-2-inpainting": PNDM,
    "stable-diffusion-xl": EULER,
    "stable-diffusion-xl-inpainting": EULER,
}  # fmt: skip
OTHERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler",
)  # fmt: skip

# unet/config.json, vae/config.json, text_encoder/config.json
UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
UNET_2 = UNET | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "use_linear_projection": True,
}  # fmt: skip
UNET_XL = UNET | {
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
    "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAE_XL = VAE | {"force_upcast": True, "scaling_factor": 0.13025}
CLIP = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
CLIP_2 = CLIP | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
CLIP_G = CLIP | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
NINE = {"in_channels": 9}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-1": {"unet": UNET, "vae": VAE, "text_encoder": CLIP},
    "stable-diffusion-1-inpainting": {"unet": UNET | NINE, "vae": VAE, "text_encoder": CLIP},
    "stable-diffusion-2": {"unet": UNET_2 | {"sample_size": 96}, "vae": VAE, "text_encoder": CLIP_2},
    "stable-diffusion-2-base": {"unet": UNET_2, "vae": VAE, "text_encoder": CLIP_2},
    "stable-diffusion-2-inpainting": {"unet": UNET_2 | NINE, "vae": VAE, "text_encoder": CLIP_2},
    "stable-diffusion-xl": {"unet": UNET_XL, "vae": VAE_XL, "text_encoder": CLIP, "text_encoder_2": CLIP_G},
    "stable-diffusion-xl-inpainting": {
        "unet": UNET_XL | NINE, "vae": VAE_XL, "text_encoder": CLIP, "text_encoder_2": CLIP_G,
    },
}  # fmt: skip
# The autoencoder's own size serves its tiling alone; upcast_attention speaks of half precision.
WITHOUT_EFFECT = {"sample_size": "vae", "upcast_attention": "unet"}

# model_index.json: the pipeline, and what it is told
INDEX: dict[str, dict[str, Any]] = {
    "stable-diffusion-1": {"_class_name": "StableDiffusionPipeline"},
    "stable-diffusion-1-inpainting": {"_class_name": "StableDiffusionInpaintPipeline"},
    "stable-diffusion-2": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "stable-diffusion-2-base": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "stable-diffusion-2-inpainting": {
        "_class_name": "StableDiffusionInpaintPipeline", "requires_safety_checker": False,
    },
    "stable-diffusion-xl": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    "stable-diffusion-xl-inpainting": {
        "_class_name": "StableDiffusionXLInpaintPipeline", "force_zeros_for_empty_prompt": True,
    },
}  # fmt: skip


MOTION = (
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe",
    "mid_block.motion_modules.0.temporal_transformer.norm.bias",
)


def shipped(kind: str, path: str) -> dict[str, Any]:
    return dict(json.loads((single_file.CONFIGS / kind / path).read_text()))


def test_every_kind_has_its_source() -> None:
    kinds = {path.name for path in single_file.CONFIGS.iterdir() if path.is_dir()}
    assert kinds == set(SOURCES) == set(SCHEDULERS) == set(PARTS) == set(INDEX)
    for kind, name in single_file.KINDS.items():  # what diffusers would fetch for the same file
        assert SOURCES[name].endswith(str(DIFFUSERS[kind]["pretrained_model_name_or_path"]))


@pytest.mark.parametrize("kind", SOURCES)
def test_the_schedule_is_the_published_one_under_every_class(kind: str) -> None:
    ours, published = shipped(kind, "scheduler/scheduler_config.json"), SCHEDULERS[kind]
    assert ours["_class_name"] == published["_class_name"] == shipped(kind, "model_index.json")["scheduler"][1]
    for name in (published["_class_name"], *OTHERS):
        scheduler = getattr(diffusers, name)
        pair = [dict(scheduler.from_config(config).config) for config in (ours, published)]
        options = inspect.signature(scheduler).parameters
        assert {key: pair[0][key] for key in options} == {key: pair[1][key] for key in options}
        assert not pair[0].get("clip_sample")


@pytest.mark.parametrize("kind", SOURCES)
def test_the_modules_are_the_published_ones(kind: str) -> None:
    for name, published in PARTS[kind].items():
        ours = shipped(kind, f"{name}/config.json")
        if name.startswith("text"):
            pair = [transformers.CLIPTextConfig.from_dict(config).to_dict() for config in (ours, published)]
        else:
            module = diffusers.UNet2DConditionModel if name == "unet" else diffusers.AutoencoderKL
            with torch.device("meta"):
                pair = [dict(module.from_config(config).config) for config in (ours, published)]
        for config in pair:
            for key in [key for key in config if key.startswith("_") or WITHOUT_EFFECT.get(key) == name]:
                del config[key]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_pipeline_is_the_published_one(kind: str) -> None:
    ours = shipped(kind, "model_index.json")
    assert {key: value for key, value in ours.items() if not isinstance(value, list)} == INDEX[kind]


def as_one_file(tiny: Path, kind: str, folder: Path) -> tuple[Path, Path]:
    """A small checkpoint as one file; and its configurations, with the schedule and the index that are shipped."""
    config = Path(shutil.copytree(tiny, folder / "config", ignore=shutil.ignore_patterns("*.safetensors")))
    for path in ("scheduler/scheduler_config.json", "model_index.json"):
        shutil.copyfile(single_file.CONFIGS / kind / path, config / path)
    save_file(ldm.of_folder(tiny), folder / "m.safetensors")
    return folder / "m.safetensors", config


@pytest.mark.parametrize(
    ("kind", "fixture"),
    [("stable-diffusion-1", "tiny_sd"), ("stable-diffusion-2", "tiny_sd"), ("stable-diffusion-xl", "tiny_sdxl")],
)
def test_a_single_file_generates_what_diffusers_pipeline_of_it_does(
    kind: str, fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """By the sampler that diffusers chooses for the file, and by others that may clip."""
    file, config = as_one_file(request.getfixturevalue(fixture), kind, tmp_path)
    (made,) = build(Origin(file, config=config), tmp_path / "bundle", targets="onnxruntime", shape=(64, 64))
    pipeline = Pipeline.load(made.folder)
    theirs = getattr(diffusers, INDEX[kind]["_class_name"]).from_single_file(file, config=str(config))
    theirs.set_progress_bar_config(disable=True)
    own = theirs.scheduler
    assert type(own).__name__ == pipeline.model.stages[0].scheduler["_class_name"]
    for sampler in (None, "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"):
        theirs.scheduler = own if sampler is None else getattr(diffusers, sampler).from_config(own.config)
        settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64}
        expected = harness.theirs(theirs, prompt="red apple", **settings)
        got = harness.ours(pipeline, Request(["red apple"], steps=5, guidance=4.0, sampler=sampler))
        assert abs(got - expected).max() < 1e-3, sampler


def test_latents_are_not_clipped_because_a_key_is_missing(tiny_sd: Path, tmp_path: Path) -> None:
    """Nor where a class without an option of clipping is the checkpoint's own, in a folder as in a file."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "folder"))
    config = {"_class_name": "EulerDiscreteScheduler", **NOISE, "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    for sampler in (None, "ddim", "ddpm", "lcm"):
        assert ensemble.read(Origin(folder, sampler=sampler)).scheduler["clip_sample"] is False


def test_a_schedule_that_ends_in_pure_noise_needs_a_class_that_follows_it(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers' PNDM has no such option, and would ignore it; its DDIM and Euler have."""
    file, config = as_one_file(tiny_sd, "stable-diffusion-1", tmp_path)
    save_file({**load_file(file), "ztsnr": torch.zeros(0).numpy()}, file)
    with pytest.raises(DexportError, match=r"ztsnr.*--sampler ddim"):
        ensemble.read(Origin(file, config=config))
    assert ensemble.read(Origin(file, config=config, sampler="ddim")).scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)}, "SDXL's refiner; give its"),
        ({"edm_mean": (4,)}, "Playground v2.5"),
        ({"model.diffusion_model.input_blocks.10.0.skip_connection.bias": (4,)}, "x4 upscaler"),
        ({"control_model.time_embed.0.weight": (4, 4)}, "a ControlNet in one file"),
        (dict.fromkeys(MOTION, (1, 24, 320)), "a motion adapter in one file"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "like black-forest-labs/FLUX.1-schnell; one file is"),
        ({"joint_blocks.37.x_block.mlp.fc1.weight": (4, 4)}, "stable-diffusion-3.5-large; one file is"),
        ({"transformer_blocks.0.attn.to_q.weight": (4, 4)}, "one component of a diffusers folder"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "InstructPix2Pix"),
    ],
)
def test_kinds_that_diffusers_knows_are_told_what_they_are(
    names: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    file = ldm.write_hollow(tmp_path / "m.safetensors", names)
    with pytest.raises(DexportError) as caught:
        ensemble.read(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)
