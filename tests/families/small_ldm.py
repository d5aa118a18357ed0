"""A tiny checkpoint of latent diffusion from text, with a BERT of few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer

from tests.families.small_cascades import save
from tests.tiny import conditional_unet, kl_autoencoder

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "a", "##s", "table")


def ldm_text(folder: Path) -> Any:
    """Eight pixels for each latent, as the pipeline has it whatever the autoencoder."""
    torch.manual_seed(7)
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir(parents=True)
    (words / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (words / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 77, "do_lower_case": True})
    )
    config = LDMBertConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=77, encoder_layers=1, encoder_ffn_dim=32, d_model=32,
        encoder_attention_heads=2, head_dim=8,
    )  # fmt: skip
    bert = LDMBertModel(config)
    bert.model.embed_tokens.weight.data.normal_()  # else all prompts are nearly the same
    return save(
        folder, diffusers.LDMTextToImagePipeline, bert=bert, tokenizer=BertTokenizer.from_pretrained(words),
        vqvae=kl_autoencoder(4), unet=conditional_unet(sample_size=8),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
    )  # fmt: skip
