"""Every family: what its bundles draw is what diffusers' own pipeline draws from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from exporter import compile as compilers
from exporter import hub
from exporter.inspect import inspect
from runtimes.accuracy import psnr
from runtimes.bench import bench
from runtimes.bundle import verify
from runtimes.session import backend
from runtimes.target import Target
from tests.families.harness import Family, Made, draw_ours, make, picture, save
from tests.tiny import clip, conditional_unet, kl_autoencoder, write_clip_vocabulary

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LATENTS = 1e-3  # largest difference; both sides round what goes into each call of the model to float32
PICTURES = 45.0  # dB
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPTS = ("red apple", "a")


def tokenizer(folder: Path, name: str, pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer of few words."""
    place = folder.with_name(f"{folder.name}-{name}")
    write_clip_vocabulary(place, pad)
    return CLIPTokenizer.from_pretrained(place)


def stable_diffusion(folder: Path, kind: Any, scheduler: Any, unet: dict[str, Any], **text: Any) -> None:
    torch.manual_seed(1)
    words = tokenizer(folder, "words", "!")
    save(
        folder, kind, vae=kl_autoencoder(2), text_encoder=clip(len(words), **text), tokenizer=words,
        unet=conditional_unet(**unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
    )  # fmt: skip


def sd_2(folder: Path) -> None:
    """As 2.1: OpenCLIP's text encoder, linear projections, heads by block, v-prediction down to no signal at all."""
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
    stable_diffusion(
        folder, diffusers.StableDiffusionPipeline, scheduler, unet, hidden_act="gelu", num_hidden_layers=3,
        projection_dim=24,
    )  # fmt: skip


def latent_consistency(folder: Path) -> None:
    scheduler = diffusers.LCMScheduler(**{**SCHEDULE, "steps_offset": 0})
    stable_diffusion(folder, diffusers.LatentConsistencyModelPipeline, scheduler, {"time_cond_proj_dim": 31})


def stable_diffusion_xl(folder: Path, kind: Any, scheduler: Any, *, refiner: bool = False, **options: Any) -> None:
    """Two tokenizers that fill up with other ids, text encoders of two widths, and latents with a mean each."""
    torch.manual_seed(2)
    words, words_2 = tokenizer(folder, "words"), tokenizer(folder, "words-2", "!")
    wide = clip(len(words_2), projected=True, hidden_size=48, projection_dim=24, hidden_act="gelu")
    unet = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=48 if refiner else 32 + 48,
        projection_class_embeddings_input_dim=24 + 8 * (5 if refiner else 6), use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    vae = kl_autoencoder(
        2, scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 2.0, 1.0]
    )
    save(
        folder, kind, vae=vae, text_encoder=None if refiner else clip(len(words)), text_encoder_2=wide,
        tokenizer=None if refiner else words, tokenizer_2=words_2, unet=unet, scheduler=scheduler, **options,
    )  # fmt: skip


def sdxl(folder: Path) -> None:
    stable_diffusion_xl(folder, diffusers.StableDiffusionXLPipeline, diffusers.EulerDiscreteScheduler(**SCHEDULE))


def sdxl_turbo(folder: Path) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**{**SCHEDULE, "timestep_spacing": "trailing"})
    stable_diffusion_xl(folder, diffusers.StableDiffusionXLPipeline, scheduler)


def refiner(folder: Path) -> None:
    stable_diffusion_xl(
        folder, diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.EulerDiscreteScheduler(**SCHEDULE), refiner=True,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip


FAMILIES = [
    Family("sd-2", sd_2, {"prompts": PROMPTS, "steps": 4, "guidance": 6.0}),
    Family("sdxl-refined", sdxl, {"prompts": PROMPTS, "steps": 6, "guidance": 6.0}, refiner=refiner),
    Family("sdxl-turbo", sdxl_turbo, {"prompts": PROMPTS, "steps": 2}, built={"guidance": 0, "steps": 2}),
    Family("refiner", refiner, {"prompts": PROMPTS, "steps": 8, "strength": 0.5, "guidance": 6.0, "image": picture()}),
    Family("lcm", latent_consistency, {"prompts": PROMPTS, "steps": 3, "guidance": 6.0}),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_bundle_draws_what_diffusers_draws(made: Made, name: str) -> None:
    latents, pictures = draw_ours(made, made.bundles[name])
    assert np.abs(latents - made.latents).max() <= LATENTS
    assert psnr(made.pictures, pictures) >= PICTURES
    assert np.std(made.pictures) > 0.01 and np.std(latents[0] - latents[-1]) > 0.01  # else anything would agree


def test_bundle_proves_itself(made: Made) -> None:
    """Golden outputs of every graph, whichever checkpoint it is of; and it is timed and described."""
    folder = made.bundles["onnxruntime"]
    checks, found = verify(folder), inspect(folder)
    assert all(check.passed for check in checks)
    assert {check.graph for check in checks} == set(found["graphs"]) == set(bench(folder, repeats=1)["graphs"])
    assert ("stages" in found) == (made.family.refiner is not None)


def test_engine_of_the_denoiser_is_built(made: Made, tmp_path: Path) -> None:
    if backend("tensorrt").version() is None:
        pytest.skip("TensorRT is not installed")
    model = hub.load(made.hub)
    for stage in model.stages:
        graph = model.graphs[stage.denoiser]
        (tmp_path / stage.denoiser).mkdir()
        built = compilers.compile_graph(
            made.hub / graph.file, graph, tmp_path / stage.denoiser, Target.parse("tensorrt:sm89"), "fp32"
        )
        assert (tmp_path / built.file).stat().st_size > 10_000
