"""Make a checkpoint of Stable Diffusion 1.5's size and shape with random weights: fp16 safetensors, 2.1 GB.

    python benchmarks/checkpoints.py OUT [--vocabulary bpe_simple_vocab_16e6.txt.gz] [--seed 0]

Speed and memory depend on shapes alone, so random weights will do, and nothing has to be downloaded. The vocabulary is
CLIP's 49,408 entries if a file of its merges is given (the ``open-clip-torch`` wheel has it, as
open_clip/bpe_simple_vocab_16e6.txt.gz; a .whl is taken too), else as many made-up ones. Memory: one tensor at a time.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter.families import Spec, parts  # the path above comes first
from exporter.trace import build
from exporter.weights import parameter_shapes

TOKENS = 49_408
BPE = "bpe_simple_vocab_16e6.txt.gz"
# The configs of Stable Diffusion 1.5, without what the classes have as default.
TEXT = {
    "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": TOKENS, "bos_token_id": 49406,
    "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
    "layers_per_block": 2, "sample_size": 512, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False,
    "feature_extractor": [None, None], "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
PARTS = {
    "text_encoder": (TEXT, parts.build_text, "model"),
    "unet": (UNET, parts.build_unet, "diffusion_pytorch_model"),
    "vae": (VAE, parts.build_vae, "diffusion_pytorch_model"),
}


def write_component(folder: Path, name: str, seed: int) -> int:
    """Write config.json and random fp16 weights; return the number of parameters."""
    config, builder, stem = PARTS[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    spec = Spec("denoiser", {name: lambda: builder(config)}, lambda modules: None, (), (), {})
    shapes = {key.partition(".")[2]: shape for key, shape in sorted(parameter_shapes(build(spec)).items())}
    if name == "text_encoder":
        shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}  # as the real checkpoints have it
    header: dict[str, Any] = {}
    offset = 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.SFC64(seed))
    with (folder / f"{stem}.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            stream.write(_values(random, key, shape).tobytes())
    return offset // 2


def _values(random: np.random.Generator, key: str, shape: tuple[int, ...]) -> Any:
    """Values that keep activations near 1: norms at 1, biases 0, matrices with a variance of 1/fan-in."""
    if len(shape) == 1:
        return np.full(shape, key.endswith("weight"), np.float16)
    fan_in = 2500 if "embedding." in key and key.startswith("text") else math.prod(shape[1:])
    return (random.standard_normal(shape, np.float32) / math.sqrt(fan_in)).astype(np.float16)


def write_tokenizer(folder: Path, vocabulary: Path | None) -> None:
    """Write vocab.json and merges.txt: CLIP's own from its file of merges, else made-up ones of the same count."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = letters + [f"{letter}</w>" for letter in letters]
    count = TOKENS - len(words) - 2
    if vocabulary is None:
        merges = [" ".join(pair) for pair in itertools.islice(itertools.product(letters, words), count)]
    elif vocabulary.suffix == ".whl":
        with zipfile.ZipFile(vocabulary) as wheel:
            merges = gzip.decompress(wheel.read(f"open_clip/{BPE}")).decode().split("\n")[1 : count + 1]
    else:
        merges = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1 : count + 1]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    ids = {word: index for index, word in enumerate(words)}
    assert len(words) == TOKENS and ids["<|endoftext|>"] == TOKENS - 1, len(words)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=2) + "\n")


def main() -> None:
    """Write the checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocabulary", type=Path, help=f"{BPE}, or the open-clip-torch wheel that has it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists")
    try:
        for index, name in enumerate(PARTS):
            count = write_component(options.output / name, name, options.seed + index)
            print(f"{name}: {count / 1e6:.1f} M parameters", flush=True)
        write_tokenizer(options.output / "tokenizer", options.vocabulary)
        (options.output / "scheduler").mkdir()
        (options.output / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
        (options.output / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(options.output, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
