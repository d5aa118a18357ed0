"""Tokenizers of few words, each of the form that checkpoints of its kind have: a writer into a folder.

Each returns the tokenizer as transformers reads it back.
"""

from __future__ import annotations

import io
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXTS = ("a red apple on a green table, with two pears", "red and green apples, and pears") * 4
MERGES = (("r", "e"), ("re", "d"), ("a", "p"), ("p", "l"), ("ap", "pl"), ("appl", "e"))
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = string.ascii_letters + string.digits + string.punctuation


def write_spiece(folder: Path) -> Any:
    """T5's model of SentencePiece alone, trained on ``TEXTS``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def write_t5(folder: Path) -> Any:
    """T5's as transformers saves it: tokenizer.json and what it says of itself."""
    found = write_spiece(folder.with_name(f"{folder.name}-spiece"))
    found.save_pretrained(folder)
    return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def write_gemma(folder: Path) -> Any:
    """Gemma's: pieces with bytes to fall back on, a mark in front."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "▁", *LETTERS, *("".join(pair) for pair in MERGES)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return _saved(folder, GemmaTokenizer(vocab=ids, merges=list(MERGES), add_bos_token=True))


def write_llama(folder: Path) -> Any:
    """LLaMA's: likewise, with a space in front of a text."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, *("".join(pair) for pair in MERGES)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return _saved(folder, LlamaTokenizer(vocab=ids, merges=list(MERGES), pad_token="</s>", add_bos_token=True))


def write_qwen(folder: Path) -> Any:
    """Qwen 2's: bytes in pairs, the marks of a chat, none around a text."""
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    marks = ["<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(vocab=ids, merges=list(MERGES), extra_special_tokens=marks)
    return _saved(folder, made)


def _saved(folder: Path, made: Any) -> Any:
    made.save_pretrained(folder)
    return type(made).from_pretrained(folder, local_files_only=True)


WRITERS: Mapping[str, Callable[[Path], Any]] = {
    "spiece": write_spiece, "t5": write_t5, "gemma": write_gemma, "llama": write_llama, "qwen": write_qwen,
}  # fmt: skip
