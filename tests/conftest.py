"""Small random checkpoints, made with diffusers' and transformers' own classes and saved by them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests.tiny import clip, conditional_unet, kl_autoencoder, write_clip_vocabulary

# The same examples in every run, so that a change fails for what it changed; `--hypothesis-profile=default` looks for
# others.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a process for each core: libraries that took all cores would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def write_stable_diffusion(folder: Path, prediction: str = "epsilon", dtype: str = "float16") -> Path:
    """Write a Stable-Diffusion-shaped checkpoint with random weights: 64x64 pixels, latents 4x16x16, about 2 MB."""
    import torch
    from diffusers import DDIMScheduler

    size = write_clip_vocabulary(folder / "tokenizer")
    torch.manual_seed(0)
    text, unet, vae = clip(size), conditional_unet(), kl_autoencoder()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    for name, module in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        module.to(getattr(torch, dtype)).save_pretrained(folder / name, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1.x checkpoint: epsilon prediction, fp16."""
    return write_stable_diffusion(tmp_path_factory.mktemp("checkpoints") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction, in bf16."""
    return write_stable_diffusion(tmp_path_factory.mktemp("checkpoints") / "tiny-sd-v", "v_prediction", "bfloat16")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion XL checkpoint in fp32."""
    from tests.families.small import sdxl

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-sdxl"
    sdxl(folder)
    return folder


@pytest.fixture
def copy_checkpoint(tiny_sd: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of ``tiny_sd`` that a test may damage."""
    import shutil

    def copy() -> Path:
        return Path(shutil.copytree(tiny_sd, tmp_path / "checkpoint"))

    return copy


@pytest.fixture(scope="session")
def tiny_hub(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All graphs of ``tiny_sd`` at its own picture size."""
    from exporter import hub

    folder = tmp_path_factory.mktemp("hubs") / "tiny-sd"
    hub.export(tiny_sd, folder)
    return folder
