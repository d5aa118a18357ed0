"""The tokenizer.json of a hub against transformers' own tokenizers, whatever form the checkpoint's had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from exporter import tokenizer
from runtimes.errors import DexportError
from tests.words import TEXTS, WRITERS

PROMPTS = [
    "",
    "a red apple",
    "  A  Red\tAPPLE! ",
    "two words, and 123 numbers",
    "déjà vu — 日本",
    "x" * 300,
    "a<|endoftext|>b",
]
Copy = Callable[[], Path]


def write(folder: Path, output: Path) -> int:
    """Write a CLIP tokenizer; the id that it pads with."""
    pad, side = tokenizer.write(folder, "CLIPTokenizer", output)
    assert side == "right"
    return pad


def check(folder: Path, written: Path, pad: int) -> None:
    """Same ids as CLIPTokenizer for each prompt, not cut and not padded; the same padding id."""
    expected = CLIPTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(written))
    assert pad == expected.pad_token_id
    for prompt in PROMPTS:
        ids = plain.encode(prompt).ids
        assert ids == expected(prompt).input_ids
        assert (ids[0], ids[-1]) == (expected.bos_token_id, expected.eos_token_id)


@pytest.fixture
def folder(copy_checkpoint: Copy) -> Path:
    return copy_checkpoint() / "tokenizer"


def test_from_vocabulary_and_merges(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "out.json", write(folder, tmp_path / "out.json"))
    assert Tokenizer.from_file(str(tmp_path / "out.json")).encode("apple").tokens[1] == "apple</w>"


def test_from_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    """As CLIPTokenizer saves it; and with its marks, padding and cutting set otherwise."""
    saved = tmp_path / "saved"
    CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    check(saved, tmp_path / "out.json", write(saved, tmp_path / "out.json"))
    changed = Tokenizer.from_file(str(saved / "tokenizer.json"))
    changed.enable_padding(length=77)
    changed.enable_truncation(8)
    value = json.loads(changed.to_str()) | {"post_processor": None}
    (saved / "tokenizer.json").write_text(json.dumps(value))
    assert write(saved, tmp_path / "again.json") == Tokenizer.from_file(str(tmp_path / "again.json")).token_to_id(
        "<|endoftext|>"
    )
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()


@pytest.mark.parametrize("form", ["!", {"content": "!", "special": True}])
def test_another_padding_token(folder: Path, tmp_path: Path, form: object) -> None:
    """Stable Diffusion 2 pads with "!"; older files write a special token as an object."""
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"pad_token": form}))
    assert write(folder, tmp_path / "out.json") == json.loads((folder / "vocab.json").read_text())["!"]


def test_damaged(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(json.loads(config) | {"pad_token": "<pad>"}))
    with pytest.raises(DexportError, match="'<pad>' is not in the vocabulary"):
        write(folder, output)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DexportError, match="not valid JSON"):
        write(folder, output)
    (folder / "tokenizer_config.json").write_text(config)
    shutil.copy(folder / "merges.txt", folder / "tokenizer.json")
    with pytest.raises(DexportError, match="damaged"):
        write(folder, output)
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(DexportError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        write(folder, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [('{"a":' * 50_000, "nested too deep"), ('{"bos_token": "$A"}', "not in the vocabulary")],
    ids=["deep", "mark"],
)
def test_damaged_options_are_one_line(tiny_sd: Path, tmp_path: Path, options: str, words: str) -> None:
    folder = Path(shutil.copytree(tiny_sd / "tokenizer", tmp_path / "tokenizer"))
    (folder / "tokenizer_config.json").write_text(options)
    with pytest.raises(DexportError, match=words) as caught:
        write(folder, tmp_path / "out" / "tokenizer.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_other_kinds(tmp_path: Path, name: str) -> None:
    """Same ids and marks as transformers' class, which reads each kind's own form."""
    expected = WRITERS[name](tmp_path / "saved")
    pad, side = tokenizer.write(tmp_path / "saved", type(expected).__name__, tmp_path / "out.json")
    assert (pad, side) == (expected.pad_token_id, expected.padding_side)
    plain = Tokenizer.from_file(str(tmp_path / "out.json"))
    for prompt in (*PROMPTS, *TEXTS, "<|im_start|>user\na</s><eos><extra_id_0>"):
        assert plain.encode(prompt).ids == expected(prompt).input_ids
    marks = {"spiece": (None, "</s>"), "t5": (None, "</s>"), "gemma": ("<bos>", None), "llama": ("<s>", None)}
    encoding = plain.encode("a red apple")
    around = [token for token, mark in zip(encoding.tokens, encoding.special_tokens_mask, strict=True) if mark]
    assert around == [mark for mark in marks.get(name, ()) if mark]


def test_a_model_of_sentencepiece_is_read_as_sentencepiece_does(tmp_path: Path) -> None:
    WRITERS["spiece"](tmp_path / "saved")
    tokenizer.write(tmp_path / "saved", "T5Tokenizer", tmp_path / "out.json")
    plain = Tokenizer.from_file(str(tmp_path / "out.json"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "saved" / "spiece.model"))
    for prompt in (*PROMPTS, *TEXTS, "ｆｕｌｌ　ｗｉｄｔｈ ①"):
        assert plain.encode(prompt).ids == [*original.encode(prompt), original.eos_id()]


def test_other_kinds_from_vocabulary_and_merges(tmp_path: Path) -> None:
    expected = WRITERS["qwen"](tmp_path / "saved")
    model = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]
    (tmp_path / "plain").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer_config.json", tmp_path / "plain")
    (tmp_path / "plain" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "plain" / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    tokenizer.write(tmp_path / "plain", "Qwen2TokenizerFast", tmp_path / "out.json")
    plain = Tokenizer.from_file(str(tmp_path / "out.json"))
    for prompt in (*PROMPTS, "<|im_start|>user\na red apple<|im_end|>"):
        assert plain.encode(prompt).ids == expected(prompt).input_ids


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (None, b"", "none of tokenizer.json, vocab.json, vocab.txt, spiece.model, tokenizer.model is there"),
        ("spiece.model", b"\xff\xff", "no model of SentencePiece"),
        ("tokenizer.json", b"{", "T5Tokenizer cannot read it"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
    ],
)
def test_other_kinds_that_are_damaged(tmp_path: Path, file: str | None, content: bytes, words: str) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if file is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(DexportError, match=words) as caught:
        tokenizer.write(folder, "T5Tokenizer", tmp_path / "out.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()


def test_a_tokenizer_that_cannot_fill_up(tmp_path: Path) -> None:
    WRITERS["llama"](tmp_path / "saved")
    options = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(DexportError, match="names no pad_token"):
        tokenizer.write(tmp_path / "saved", "LlamaTokenizer", tmp_path / "out.json")
