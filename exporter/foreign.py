"""What files hold beside a model's plain weights: tensors that its class does not use, and weights that were quantized.

The first are left out, and said. The second cannot be exported, since a bundle is proven against the weights that the
model was trained with; whatever wrote them, each is refused by the name of its format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import DexportError, first_of
from runtimes.safetensors import Stored

# By class, what transformers leaves out too when it loads the class: the other half of a whole CLIP or T5, as trainers,
# ComfyUI and AUTOMATIC1111's web UI save them, heads, and buffers that modules make anew.
CONTRAST = r"logit_scale|logit_bias|visual_projection\.weight|vision_model\..*"
TURNS = r"(.*\.)?rotary_emb\.inv_freq"
UNUSED = {
    "CLIPTextModel": rf"{CONTRAST}|text_projection(\.weight)?",
    "CLIPTextModelWithProjection": CONTRAST,
    "CLIPVisionModelWithProjection": r"logit_scale|logit_bias|text_projection(\.weight)?|text_model\..*",
    "T5EncoderModel": r"decoder\..*|lm_head\.weight",
    "UMT5EncoderModel": r"decoder\..*|lm_head\.weight",
    "Gemma2Model": rf"lm_head\.weight|{TURNS}",
    "Qwen3Model": TURNS,
    "Qwen3ForCausalLM": TURNS,
    "Qwen2_5_VLForConditionalGeneration": TURNS,
}
# What libraries store beside weights that they quantized, by the name of a tensor.
BESIDE = (
    (r".*\.quant_state\.bitsandbytes__(nf4|fp4)|.*\.(nested_)?(absmax|quant_map)", "4 bits (bitsandbytes' nf4 or fp4)"),
    (r".*\.(SCB|weight_format)", "int8 (bitsandbytes)"),
    (r".*\.(qweight|qzeros|g_idx|wscales|weight_packed)", "packed integers (GPTQ, AWQ or the like)"),
    (r".*\.weight\._(data|scale|scale_and_zeropoint)", "int8 or less (quanto)"),
    (r"(.*\.)?(scaled_fp8|comfy_quant|scale_weight|weight_scale(_2|_inv)?)", "8 bits or less with scales (fp8, int8)"),
)
INTEGERS = {"I8": "int8", "U8": "8 bits or less, packed into bytes"}
WEIGHT = re.compile(r"(.*[._])?weight")
ADVICE = "save the model in fp16 or bf16"


def split(class_name: str, entries: Mapping[str, Stored]) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors of a component that are weights of its class, and the names of those that it does not use."""
    unused = [name for name in entries if re.fullmatch(UNUSED.get(class_name, r"(?!)"), name)]
    return {name: entry for name, entry in entries.items() if name not in unused}, tuple(unused)


def said(what: str, names: Iterable[str]) -> str:
    """The note that tensors were left out; ``what``: the model that does not use them."""
    names = list(names)
    many = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
    return f"{what} does not use {many} of its file: {first_of(names)}; left out"


def check_plain(file: Path, entries: Mapping[str, Stored]) -> None:
    """Raise DexportError for weights that a library quantized, naming the format by a tensor that shows it."""
    for name, entry in entries.items():
        kind = next((kind for pattern, kind in BESIDE if re.fullmatch(pattern, name)), None)
        if kind is None and WEIGHT.fullmatch(name):
            kind = INTEGERS.get(entry.dtype)
        if kind is not None:
            raise DexportError(f"{file}: stored in {kind}, as tensor {name!r} shows; {ADVICE}")


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise DexportError for a config.json that says that its weights were quantized."""
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise DexportError(f"{file}: its weights are quantized by {method or quantized!r:.60}; {ADVICE}")
