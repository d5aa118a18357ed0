"""Make a checkpoint of a well-known model's size and shape with random weights, in the precision that it is shared in.

    python benchmarks/checkpoints.py /tmp/sd15
    python benchmarks/checkpoints.py /tmp/sdxl --like stable-diffusion-xl
    python benchmarks/checkpoints.py /tmp/flux --like flux --layers 0.25

Speed and memory depend on shapes alone, so random weights will do, and nothing has to be downloaded. The sizes: 2.1 GB,
6.9 GB, and 24 GB for Flux's transformer, of whose blocks --layers takes a share. Memory: one tensor at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter import tokenizer  # the path above comes first
from exporter.checkpoint import Checkpoint, Component
from exporter.families import Shape
from exporter.single_file import CONFIGS
from exporter.trace import build
from exporter.weights import parameter_shapes

# black-forest-labs/FLUX.1-dev as it is, but for its second text encoder: one block of T5-XXL's 24.
FLUX: dict[str, dict[str, Any]] = {
    ".": {
        "_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
        "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64,
        "num_heads": 64, "num_layers": 1, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "use_cache": False,
    },
    "transformer": {
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
        "patch_size": 1, "pooled_projection_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
        "layers_per_block": 2, "sample_size": 1024, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
BLOCKS = ("num_layers", "num_single_layers")
T5_WORDS = 32_100  # of its vocabulary, with the ids beyond left unused


def configuration(like: str, layers: float) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint by folder, model_index.json as "."; ``layers``: the share of the blocks."""
    if like != "flux":
        found = {path.parent.name: json.loads(path.read_text()) for path in sorted((CONFIGS / like).glob("*/*.json"))}
        return {".": json.loads((CONFIGS / like / "model_index.json").read_text()), **found}
    own = configuration("stable-diffusion-xl", 1.0)
    transformer = FLUX["transformer"] | {name: max(round(FLUX["transformer"][name] * layers), 1) for name in BLOCKS}
    return {**FLUX, "text_encoder": own["text_encoder"], "tokenizer": own["tokenizer"], "transformer": transformer}


def write(output: Path, like: str, layers: float, seed: int) -> None:
    """Write the checkpoint, and print the number of parameters of each component."""
    configs = configuration(like, layers)
    for name, config in configs.items():
        kind = {".": "model_index", "scheduler": "scheduler_config"}.get(name, "config")
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        if name.startswith("tokenizer"):
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
            words = tokenizer.read(CONFIGS / "stable-diffusion-1" / "tokenizer", "CLIPTokenizer")
            tokenizer.write(words, folder / tokenizer.JSON)
        else:
            (folder / f"{kind}.json").write_text(json.dumps(config, indent=2) + "\n")
    if like == "flux":
        write_t5_tokenizer(output / "tokenizer_2")
    for index, (name, shapes) in enumerate(sorted(parameters(output, configs).items())):
        folder = output / name
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        count = write_weights(folder / f"{stem}.safetensors", shapes, "BF16" if like == "flux" else "F16", seed + index)
        print(f"{name}: {count / 1e6:.1f} M parameters", flush=True)


def parameters(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each component's parameters, by the names that its class gives them."""
    index = configs["."]
    components = {
        name: Component(name, index[name][1], path, config, {})
        for name, config in configs.items()
        if name in index and name != "scheduler" and not name.startswith("tokenizer")
    }
    read = Checkpoint(path, index["_class_name"], components, configs["scheduler"], {}, {}, index=index)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for spec in read.family.specs(read, Shape(*read.family.default_shape(read), free=False)).values():
        for key, shape in parameter_shapes(build(spec)).items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = shape
    return found


def write_weights(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> int:
    """Write random weights of two bytes each; return their number."""
    header: dict[str, Any] = {}
    offset = 0
    for key, shape in sorted(shapes.items()):
        size = 2 * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.SFC64(seed))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape in sorted(shapes.items()):
            values = _values(random, key, shape, text=file.stem == "model")
            bits = values.astype(np.float16) if dtype == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16)
            stream.write(bits.tobytes())
    return offset // 2


def _values(random: np.random.Generator, key: str, shape: tuple[int, ...], *, text: bool) -> Any:
    """Values that keep activations near 1: norms at 1, biases 0, matrices with a variance of 1/fan-in."""
    if len(shape) == 1:
        return np.full(shape, key.endswith("weight"), np.float32)
    fan_in = 2500 if text and ("embedding" in key or "shared" in key) else math.prod(shape[1:])
    return random.standard_normal(shape, np.float32) / np.float32(math.sqrt(fan_in))


def write_t5_tokenizer(folder: Path) -> None:
    """A Unigram vocabulary of T5's size and marks; its words are made up."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    words = ["▁", *letters, *(f"▁{letter}" for letter in letters)]
    words += [f"▁{one}{two}{three}" for one in letters for two in letters for three in letters]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(word))) for word in words)][:T5_WORDS]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", **marks}, indent=2) + "\n"
    )


def main() -> None:
    """Write the checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output", type=Path)
    kinds = [path.name for path in sorted(CONFIGS.iterdir()) if path.is_dir()]
    parser.add_argument("--like", choices=[*kinds, "flux"], default="stable-diffusion-1")
    parser.add_argument("--layers", type=float, default=1.0, help="share of Flux's blocks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists")
    try:
        write(options.output, options.like, options.layers, options.seed)
    except BaseException:
        shutil.rmtree(options.output, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
