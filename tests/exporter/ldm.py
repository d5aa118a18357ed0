"""A checkpoint's tensors under the names of Stable Diffusion's training code, said without diffusers' converters.

Written from the modules of that code (ldm/modules/diffusionmodules/openaimodel.py and model.py, and open_clip): where a
block sits in ``input_blocks`` and ``output_blocks`` follows from the order in which they are built there.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
"""Where the text encoders of SDXL are."""
Named = Iterable[tuple[str, NDArray[Any]]]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
AROUND = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "conv_in": "input_blocks.0.0", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet(tensors: Named, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """A UNet2DConditionModel's tensors."""
    for name, value in tensors:
        yield f"model.diffusion_model.{unet_name(name, config)}", value


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of one parameter of a UNet, "model.diffusion_model." left out."""
    layers, up = config["layers_per_block"], config["up_block_types"]
    for new, old in AROUND.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = found.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_inside(kind, rest)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|\w+samplers)\.(\d)\.(.*)", name)
    assert found, name
    side, block, kind, index, rest = found.groups()
    if kind == "downsamplers":
        return f"input_blocks.{1 + int(block) * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        slot = 2 if "CrossAttn" in up[int(block)] else 1
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{slot}.{rest}"
    place = int(block) * (layers + 1) + int(index)
    where = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
    return f"{where}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    layer, _, end = rest.partition(".")
    return f"{RESNET[layer]}.{end}" if kind == "resnets" else rest


def vae(tensors: Named, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """An AutoencoderKL's tensors; its attention is made of convolutions there."""
    last = len(config["block_out_channels"]) - 1
    for name, value in tensors:
        if found := re.search(r"mid_block\.attentions\.0\.(.*)\.(weight|bias)$", name):
            name = name[: found.start()] + f"mid.attn_1.{ATTENTION[found[1]]}.{found[2]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{last - int(m[1])}.", name)
        name = re.sub(r"resnets\.(\d)", r"block.\1", name).replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name).replace("conv_norm_out", "norm_out")
        yield f"first_stage_model.{name}", value


def clip(tensors: Named, prefix: str = "cond_stage_model.transformer.") -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of OpenAI's CLIP, which is transformers' class there too."""
    for name, value in tensors:
        yield f"{prefix}text_model.{name.removeprefix('text_model.')}", value


def open_clip(tensors: Named, prefix: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of open_clip: queries, keys and values in one matrix, the projection turned."""
    fused: dict[str, dict[str, NDArray[Any]]] = {}
    for name, value in tensors:
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            yield f"{prefix}text_projection", value.T
            continue
        for new, old in CLIP.items():
            name = name.replace(new, old)
        if found := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            parts = fused.setdefault(f"{found[1]}.attn.in_proj_{found[3]}", {})
            parts[found[2]] = value
            if len(parts) == 3:
                yield f"{prefix}{found[1]}.attn.in_proj_{found[3]}", np.concatenate([parts[key] for key in "qkv"])
                parts.clear()
            continue
        yield f"{prefix}{name}", value


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Each component's config.json."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/config.json"))}


def of_folder(folder: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a folder of Stable Diffusion 1 or XL, all components together."""
    config = configs(folder)
    part = {path.parent.name: load_file(path).items() for path in folder.glob("*/*.safetensors")}
    named = [unet(part["unet"], config["unet"]), vae(part["vae"], config["vae"])]
    if "text_encoder_2" in part:
        named += [clip(part["text_encoder"], XL[0]), open_clip(part["text_encoder_2"], XL[1])]
    else:
        named += [clip(part["text_encoder"])]
    return {name: np.ascontiguousarray(value) for name, value in itertools.chain(*named)}


def write_hollow(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a .safetensors file of fp16 whose tensors are a hole: its header is whole, and it takes no space."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return file
