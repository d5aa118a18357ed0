"""The tokenizer.json of a hub against transformers' CLIPTokenizer, whatever form the checkpoint's had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from exporter import tokenizer
from runtimes.errors import DexportError

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
    check(folder, tmp_path / "out.json", tokenizer.write(folder, tmp_path / "out.json"))
    assert Tokenizer.from_file(str(tmp_path / "out.json")).encode("apple").tokens[1] == "apple</w>"


def test_from_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    """As CLIPTokenizer saves it; and with its marks, padding and cutting set otherwise."""
    saved = tmp_path / "saved"
    CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    check(saved, tmp_path / "out.json", tokenizer.write(saved, tmp_path / "out.json"))
    changed = Tokenizer.from_file(str(saved / "tokenizer.json"))
    changed.enable_padding(length=77)
    changed.enable_truncation(8)
    value = json.loads(changed.to_str()) | {"post_processor": None}
    (saved / "tokenizer.json").write_text(json.dumps(value))
    assert tokenizer.write(saved, tmp_path / "again.json") == Tokenizer.from_file(
        str(tmp_path / "again.json")
    ).token_to_id("<|endoftext|>")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()


@pytest.mark.parametrize("form", ["!", {"content": "!", "special": True}])
def test_another_padding_token(folder: Path, tmp_path: Path, form: object) -> None:
    """Stable Diffusion 2 pads with "!"; older files write a special token as an object."""
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"pad_token": form}))
    assert tokenizer.write(folder, tmp_path / "out.json") == json.loads((folder / "vocab.json").read_text())["!"]


def test_damaged(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(json.loads(config) | {"pad_token": "<pad>"}))
    with pytest.raises(DexportError, match="'<pad>' is not in the vocabulary"):
        tokenizer.write(folder, output)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DexportError, match="not valid JSON"):
        tokenizer.write(folder, output)
    (folder / "tokenizer_config.json").write_text(config)
    shutil.copy(folder / "merges.txt", folder / "tokenizer.json")
    with pytest.raises(DexportError, match="damaged"):
        tokenizer.write(folder, output)
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(DexportError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        tokenizer.write(folder, output)
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
        tokenizer.write(folder, tmp_path / "out" / "tokenizer.json")
    assert "\n" not in str(caught.value)
