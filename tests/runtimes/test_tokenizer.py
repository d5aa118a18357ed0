"""Prompts to ids as transformers makes them: templates, both sides to fill up, and what is cut of a long prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter import tokenizer
from runtimes.errors import DexportError
from runtimes.manifest import Tokenizer
from runtimes.tokenizer import PromptTokenizer
from tests.words import WRITERS

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["", "a red apple", "red {} apple", "a red apple on a green table, with two pears, and more red apples " * 3]


def opened(folder: Path, name: str, **said: Any) -> tuple[PromptTokenizer, Any]:
    """A tokenizer as a device opens it, and as transformers does."""
    expected = WRITERS[name](folder / "saved")
    made = tokenizer.read(folder / "saved", type(expected).__name__)
    tokenizer.write(made, folder / "tokenizer.json")
    return PromptTokenizer(
        folder, Tokenizer("tokenizer.json", "tokens", pad=made.pad, **{"side": made.side, **said})
    ), expected


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("length", [2, 12, 80])
def test_ids_are_those_of_transformers(tmp_path: Path, name: str, length: int) -> None:
    """Of the length that is asked for, filled up on the tokenizer's side, and cut before the marks."""
    ours, theirs = opened(tmp_path, name, length=length, template=CHAT)
    before, after = CHAT.split("{}")
    texts = [before + prompt + after for prompt in PROMPTS]
    wanted = theirs(texts, padding="max_length", max_length=length, truncation=True).input_ids
    assert ours(PROMPTS)[0].tolist() == wanted


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_cut_is_the_end_of_the_prompt(tmp_path: Path, name: str) -> None:
    ours, theirs = opened(tmp_path, name, length=16, template="two {} and")
    prompt = "red apples on a green table with pears"
    ids, cut = ours(["red apple", prompt, "  "])
    assert cut[0] == cut[2] == "" and cut[1]
    kept = theirs.decode(ids[1], skip_special_tokens=True)
    assert "".join(f"{kept}{cut[1]}".split()) == "".join(f"two {prompt}".split())


def test_negative_prompts_and_lower_case(tmp_path: Path) -> None:
    said = {"length": 12, "template": "so: {}", "negative": "{}", "lower": True}
    ours, theirs = opened(tmp_path, "t5", **said)
    for negative, text in ((False, "so: red apple"), (True, "red apple")):
        ids, _ = ours([" RED Apple "], negative=negative)
        assert ids.tolist() == theirs([text], padding="max_length", max_length=12).input_ids


def test_what_is_no_text(tmp_path: Path) -> None:
    for lower in (False, True):
        ours, _ = opened(tmp_path / str(lower), "t5", length=12, lower=lower)
        for prompt in ("\ud800", None):
            with pytest.raises(DexportError, match="is not valid text"):
                ours([prompt])  # type: ignore[list-item]
