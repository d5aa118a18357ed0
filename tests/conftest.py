"""Small random checkpoints, made with diffusers' and transformers' own classes and saved by them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a change fails for what it changed; `--hypothesis-profile=default` looks for
# others.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a process for each core: libraries that took all cores would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MERGES = ("r e", "re d</w>", "a p", "p l", "ap pl", "appl e</w>")


def write_clip_vocabulary(folder: Path) -> int:
    """Write vocab.json and merges.txt of a CLIP byte-level BPE with few merges; return the number of tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    options = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return len(tokens)


def write_stable_diffusion(folder: Path, prediction: str = "epsilon", dtype: str = "float16") -> Path:
    """Write a Stable-Diffusion-shaped checkpoint with random weights: 64x64 pixels, latents 4x16x16, about 2 MB."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    size = write_clip_vocabulary(folder / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
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
