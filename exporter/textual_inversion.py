"""Textual inversion: learned words, merged into a checkpoint (Gal et al. 2022, https://arxiv.org/abs/2208.01618).

A file holds one or several vectors for a word, as wide as the text encoder's states. They are appended to its table of
tokens when that is read (``exporter.stored.Extended``), and the word to its tokenizer. A word of several vectors is
followed by others that are named after it, ``word_1``, ``word_2``, and stands for all of them, as in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.families import parts
from exporter.stored import FLOATS, Extended
from runtimes.errors import DexportError, first_of
from runtimes.manifest import Adapter
from runtimes.safetensors import Stored, check_finite, read_header

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint, Component

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
TABLE = "embeddings.token_embedding.weight"
XL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # the names of a file for the two encoders of SDXL
ALONE = "emb_params"  # that of AUTOMATIC1111's web UI; diffusers has the word in its place
SIZES = {"hidden_size": 512, "max_position_embeddings": 77}  # with CLIPTextConfig's defaults
WORD = re.compile(r"[^\s()\[\]\\:]+")  # what no syntax of prompts cuts
LEGACY_END = 2  # of configs from before transformers 4.31: the pooled state is then that of the highest id


@dataclass(frozen=True)
class Embedding:
    """A file, and the word for what it holds; None for the file's own."""

    file: Path
    word: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Embedding:
        """Read "FILE" or "FILE:WORD", like style.safetensors:<style>."""
        name, colon, word = str(text).rpartition(":")
        if not colon or not name.endswith(".safetensors") or Path(str(text)).exists():
            return cls(Path(text))
        return cls(Path(name), word)


def merge(checkpoint: Checkpoint, embeddings: Iterable[str | Path]) -> Checkpoint:
    """Return the checkpoint with the words of embedding files ("FILE" or "FILE:WORD").

    Raises DexportError for a file that is no embedding or not of this checkpoint, and for a word that there is already.
    """
    for index, embedding in enumerate(map(Embedding.parse, embeddings), 1):
        checkpoint = _merge(checkpoint, embedding, f"embedding{index}/{embedding.file.name}")
    return checkpoint


def _merge(checkpoint: Checkpoint, embedding: Embedding, path: str) -> Checkpoint:
    from exporter import tokenizer

    file = embedding.file
    encoders = {name: part for name, part in checkpoint.components.items() if name.startswith("text_encoder")}
    has_prior = any(name.startswith("prior") for name in checkpoint.components)  # diffusers has no learned words there
    if has_prior or not encoders or any(part.class_name not in CLASSES for part in encoders.values()):
        raise DexportError(
            f"{file}: only Stable Diffusion, SDXL and what descends from them take embeddings; leave --embedding out "
            f"for a {checkpoint.pipeline}"
        )
    word, vectors = _read(embedding, encoders)
    if not WORD.fullmatch(word) or not word.isprintable():
        raise DexportError(f"{file}: {word!r:.60} cannot be a word of a prompt; name another with {file}:WORD")
    count = _rows(next(iter(vectors.values())))
    words = (word, *(f"{word}_{index}" for index in range(1, count)))
    components = dict(checkpoint.components)
    for name, part in encoders.items():
        made = checkpoint.tokenizers[name.replace("text_encoder", "tokenizer")].made
        known, end = tokenizer.extend(made, checkpoint.words, words, str(file))
        components[name] = _extended(checkpoint, name, part, vectors[name], known, end, file)
    return replace(
        checkpoint,
        components=components,
        files={**checkpoint.files, path: file},
        adapters=(*checkpoint.adapters, Adapter(path, 1.0, word)),
        words=(*checkpoint.words, *words),
    )


def _rows(vectors: Stored) -> int:
    return 1 if len(vectors.shape) == 1 else vectors.shape[0]


def _read(embedding: Embedding, encoders: Mapping[str, Component]) -> tuple[str, dict[str, Stored]]:
    """The word of a file and its vectors for each text encoder, checked for NaN."""
    file = embedding.file
    if file.suffix != ".safetensors" or not file.is_file():
        what = "no such file" if not file.exists() else "not a .safetensors file, and no pickle is opened"
        raise DexportError(f"{file}: {what}; an embedding is one .safetensors file")
    entries = read_header(file)
    if set(XL.values()) <= set(entries):
        wanted = {name: XL.get(name) for name in encoders}
        extra = set(entries) - set(XL.values())
        if "text_encoder_2" not in encoders:
            raise DexportError(f"{file}: an embedding for SDXL's two text encoders, of which this model has one")
    elif len(entries) == 1 and not set(entries) & set(XL.values()):
        wanted, extra = dict.fromkeys(encoders, next(iter(entries))), set()
        if len(encoders) > 1:
            raise DexportError(f"{file}: it has vectors for one text encoder, and this model has {len(encoders)}")
    else:
        wanted, extra = {}, set(entries)
    if extra or not wanted:
        raise DexportError(
            f"{file}: {first_of(sorted(extra))}: not an embedding; one holds one tensor, named by its word or "
            f"{ALONE!r}, or {' and '.join(map(repr, XL.values()))} of SDXL"
        )
    vectors = {name: entries[str(key)] for name, key in wanted.items()}
    check_finite(vectors.values())
    _check(file, vectors, encoders)
    own = next(iter(entries)) if len(entries) == 1 else ALONE
    return embedding.word or (file.stem if own == ALONE else own), dict(vectors)


def _check(file: Path, vectors: Mapping[str, Stored], encoders: Mapping[str, Component]) -> None:
    for name, entry in vectors.items():
        width, length = (parts.whole(name, encoders[name].config, *size) for size in SIZES.items())
        if len(entry.shape) not in (1, 2) or entry.shape[-1] != width or not _rows(entry) or entry.dtype not in FLOATS:
            raise DexportError(
                f"{file}: {entry.name!r} is {entry.dtype} {list(entry.shape)}, and the {name} takes floats "
                f"[n, {width}]; it is an embedding for another model"
            )
        if _rows(entry) > length - 2:
            raise DexportError(f"{file}: {_rows(entry)} vectors for a word, and a prompt has place for {length - 2}")
    if len({_rows(entry) for entry in vectors.values()}) > 1:
        raise DexportError(
            f"{file}: it has {[_rows(entry) for entry in vectors.values()]} vectors, which must be as many"
        )


def _extended(
    checkpoint: Checkpoint, name: str, part: Component, vectors: Stored, known: int, end: int, file: Path
) -> Component:
    """The text encoder with the vectors as the last rows of its table, for a tokenizer of ``known`` tokens before."""
    rename, entries = checkpoint.family.rename, dict(part.entries)
    keys = [key for key in entries if (rename(name, key) or "").endswith(TABLE)]
    if len(keys) != 1 or len(entries[keys[0]].shape) != 2:
        raise DexportError(f"{part.path}: the {name} has no table of tokens that {file} could be added to")
    table = entries[keys[0]]
    if table.shape[0] != known:
        raise DexportError(
            f"{file}: the tokenizer has {known} tokens and the table of the {name} {table.shape[0]}; a word can be "
            "added where they are as many"
        )
    entries[keys[0]] = Extended(table, vectors)
    config = {**part.config, "vocab_size": known + _rows(vectors)}
    if config.get("eos_token_id", LEGACY_END) == LEGACY_END:
        config["eos_token_id"] = end  # else the pooled state would be the word's, whose id is now the highest
    return replace(part, config=config, entries=entries)
