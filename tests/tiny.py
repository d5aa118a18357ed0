"""Small random models of diffusers' and transformers' own classes, of which the tests put checkpoints together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MERGES = ("r e", "re d</w>", "a p", "p l", "ap pl", "appl e</w>")


def write_clip_vocabulary(folder: Path, pad: str = "<|endoftext|>") -> int:
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
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return len(tokens)


WORDS = ("<s>", "</s>", "red", "green", "apple", "on", "a", "table")


def write_words(file: Path) -> None:
    """Write a tokenizer.json in which each of ``WORDS`` is a token; it adds <s> and </s>."""
    import tokenizers

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def clip(size: int, *, projected: bool = False, **changes: Any) -> Any:
    """A CLIP text encoder over ``size`` tokens, 32 wide; ``projected``: with the projection of its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1,
    }  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config | changes))


def conditional_unet(**changes: Any) -> Any:
    """A UNet with cross-attention for latents 4x16x16 and states 32 wide."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
        "attention_head_dim": 4, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes)


def kl_autoencoder(blocks: int = 3, **changes: Any) -> Any:
    """An autoencoder with 2 ** (blocks - 1) pixels of the picture for each latent, along both sides."""
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (16,) * (blocks - 1) + (32,), "layers_per_block": 1, "norm_num_groups": 8,
        "latent_channels": 4, "sample_size": 64, "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }  # fmt: skip
    return AutoencoderKL(**config | changes)
