"""Tokenizers against transformers' own objects of the same folders, as transformers 4 and 5 save them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, T5Tokenizer

from exporter import checkpoint, tokenizer
from exporter.families import TOKENIZERS, parts
from exporter.single_file import CONFIGS
from runtimes import manifest
from runtimes.errors import DexportError
from runtimes.prompts import Piece, _lay
from runtimes.tokenizer import PromptTokenizer
from tests.families import small_flow, small_transformers
from tests.tiny import write_clip_vocabulary
from tests.words import TEXTS, WRITERS

PROMPTS = [
    "", " ", "a red apple", "  A  Red\tAPPLE! ", "two\nlines\r\n of  text", "two words, and 123 numbers 2,000.5",
    "déjà vu — 日本 ｆｕｌｌ　ｗｉｄｔｈ ①", "e\u0301 \u212b", "\u200b zero\u00a0width", "🐱 emoji 👨‍👩‍👧",
    "it's DON'T I'LL",
    "!", "!!!", "x" * 300, "red apple, " * 100, "a<|endoftext|>b", "<|startoftext|>red", "</s> a <s> <eos><bos>",
    "<pad> x <unk>", "[MASK] [SEP]", "<extra_id_0> z", "<|im_start|>user\nhi<|im_end|>", "<cat>", "a <cat> on",
    "a<cat>b",
    "<CAT> up <Cat>", "<cat><cat>", " <cat>! ", "red <cat>s", "cattoy", "a cattoy b", "Cattoys xcattoyx",
]  # fmt: skip
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
Copy = Callable[[], Path]


def compare(folder: Path, class_name: str, lengths: tuple[int, ...] = (77, 12, 4)) -> tokenizer.Made:
    """The ids of each prompt, padded and cut, are those of the class of transformers, as diffusers calls it."""
    expected = getattr(transformers, class_name).from_pretrained(folder)
    made = tokenizer.read(folder, class_name)
    assert (made.pad, made.side) == (expected.pad_token_id, expected.padding_side)
    assert made.count == max(expected.get_vocab().values()) + 1
    tokenizer.write(made, folder.parent / "written.json")
    for length in lengths:
        said = manifest.Tokenizer("written.json", "tokens", length, made.pad, side=made.side)
        ours = PromptTokenizer(folder.parent, said)
        wanted = expected(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
        assert ours(PROMPTS)[0].tolist() == wanted
        assert [_lay(ours, [Piece(prompt)], 1).ids[0].tolist() for prompt in PROMPTS] == wanted
    return made


def clip(folder: Path, **options: Any) -> Path:
    """A CLIP tokenizer in the files of transformers 4, with these options in its tokenizer_config.json."""
    write_clip_vocabulary(folder)
    return change(folder, **options)


def change(folder: Path, **options: Any) -> Path:
    file = folder / "tokenizer_config.json"
    value = json.loads(file.read_text()) | options
    file.write_text(json.dumps({name: option for name, option in value.items() if option is not None}))
    return folder


def token(content: str, **options: bool) -> dict[str, Any]:
    """An added token as transformers 4 writes it."""
    said = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    return {"content": content, **said, **options}


SIZE = 520  # tokens of tests.tiny's vocabulary
WORDS = {str(SIZE): token("<cat>"), str(SIZE + 1): token("cattoy", single_word=True)}
MARKS = {str(SIZE - 2): token("<|startoftext|>", special=True), str(SIZE - 1): token("<|endoftext|>", special=True)}
FOLDERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], int]] = {
    # options of tokenizer_config.json, further files, learned words
    "plain": ({}, {}, 0),
    "added_tokens.json": ({}, {"added_tokens.json": {"<cat>": SIZE, "cattoy": SIZE + 1}}, 2),
    "added_tokens_decoder": ({"added_tokens_decoder": MARKS | WORDS}, {}, 2),
    "both": ({"added_tokens_decoder": MARKS | WORDS}, {"added_tokens.json": {"<cat>": SIZE, "cattoy": SIZE + 1}}, 2),
    "additional_special_tokens": ({"additional_special_tokens": ["<cat>"]}, {}, 1),
    "extra_special_tokens": ({"extra_special_tokens": ["<cat>"]}, {}, 1),
    "named": ({"extra_special_tokens": {"cat_token": "<cat>"}}, {}, 1),
    "special_tokens_map.json": (
        {"pad_token": None},
        {
            "special_tokens_map.json": {
                "bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"), "pad_token": "!",
                "unk_token": "<|endoftext|>", "additional_special_tokens": ["<cat>"],
            },
            "added_tokens.json": {"<cat>": SIZE},
        },
        1,
    ),
    "pad": ({"pad_token": "!"}, {}, 0),
    "pad as an object": ({"pad_token": {"__type": "AddedToken", **token("!")}}, {}, 0),
    "pad that is added": ({"pad_token": "<pad>"}, {}, 1),
    "left": ({"padding_side": "left"}, {}, 0),
    "other marks": ({"bos_token": "a", "eos_token": "!"}, {}, 0),
    "options of others": ({"add_prefix_space": True, "do_lower_case": False, "errors": "replace"}, {}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_clip_as_transformers_4_saves_it(tmp_path: Path, name: str) -> None:
    """Learned words, marks and padding, whichever of its files names them."""
    options, files, words = FOLDERS[name]
    folder = clip(tmp_path / "tokenizer", **options)
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value))
    assert compare(folder, "CLIPTokenizer").count == SIZE + words
    compare(folder, "CLIPTokenizerFast")


@pytest.mark.parametrize("class_name", ["CLIPTokenizer", *GENERIC])
def test_clip_as_transformers_5_saves_it(tmp_path: Path, class_name: str) -> None:
    saved = CLIPTokenizer.from_pretrained(clip(tmp_path / "four", added_tokens_decoder=MARKS | WORDS))
    saved.save_pretrained(tmp_path / "five")
    assert (tmp_path / "five" / "tokenizer.json").is_file()
    folder = change(tmp_path / "five", tokenizer_class=class_name)
    assert compare(folder, class_name).count == SIZE + 2
    file = json.loads((folder / "tokenizer.json").read_text())  # as saved by a run that padded and cut
    opened = Tokenizer.from_str(json.dumps(file))
    opened.enable_padding(length=77)
    opened.enable_truncation(8)
    opened.save(str(folder / "tokenizer.json"))
    compare(folder, class_name)


@pytest.mark.parametrize("name", WRITERS)
def test_other_kinds(tmp_path: Path, name: str) -> None:
    """Same ids and marks as transformers' class, with learned words and without, by its name and a generic one."""
    expected = WRITERS[name](tmp_path / "saved")
    kind = type(expected).__name__
    made = compare(tmp_path / "saved", kind)
    expected.add_tokens(["<cat>", "cattoy"])
    expected.save_pretrained(tmp_path / "more")
    for class_name in (kind, f"{kind}Fast", *GENERIC):
        assert class_name in TOKENIZERS and compare(tmp_path / "more", class_name).count == made.count + 2
    marks = {"spiece": (None, "</s>"), "t5": (None, "</s>"), "gemma": ("<bos>", None), "llama": ("<s>", None)}
    encoding = made.open().encode("a red apple")
    around = [token for token, mark in zip(encoding.tokens, encoding.special_tokens_mask, strict=True) if mark]
    assert around == [mark for mark in marks.get(name, ()) if mark]


def test_t5_as_transformers_4_saves_it(tmp_path: Path) -> None:
    """A model of SentencePiece, and learned words beside it."""
    WRITERS["spiece"](tmp_path / "saved")
    size = len(T5Tokenizer.from_pretrained(tmp_path / "saved"))
    extra = [f"<extra_id_{index}>" for index in range(100)]
    files = {
        "added_tokens.json": {"<cat>": size},
        "special_tokens_map.json": {"eos_token": "</s>", "pad_token": "<pad>", "additional_special_tokens": extra},
        "tokenizer_config.json": {"extra_ids": 100, "legacy": True, "model_max_length": 512, "sp_model_kwargs": {}},
    }
    for file, value in files.items():
        (tmp_path / "saved" / file).write_text(json.dumps(value))
    for class_name in ("T5Tokenizer", "T5TokenizerFast"):
        made = compare(tmp_path / "saved", class_name)
        assert (made.count, made.limit) == (size + 1, 512)


def test_a_model_of_sentencepiece_is_read_as_sentencepiece_does(tmp_path: Path) -> None:
    WRITERS["spiece"](tmp_path / "saved")
    plain = tokenizer.read(tmp_path / "saved", "T5Tokenizer").open()
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "saved" / "spiece.model"))
    for prompt in (*PROMPTS[:14], *TEXTS):
        assert plain.encode(prompt).ids == [*original.encode(prompt), original.eos_id()]


def test_qwen_from_vocabulary_and_merges(tmp_path: Path) -> None:
    WRITERS["qwen"](tmp_path / "saved")
    model = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]
    (tmp_path / "plain").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer_config.json", tmp_path / "plain")
    (tmp_path / "plain" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "plain" / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    compare(tmp_path / "plain", "Qwen2TokenizerFast")


@pytest.mark.parametrize("lower", [True, False])
def test_bert_from_its_vocabulary(tmp_path: Path, lower: bool) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s", "A", "Red", "##l", "!", ","]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower, "model_max_length": 512}))
    compare(folder, "BertTokenizer")
    compare(folder, "BertTokenizerFast")


def test_the_vocabulary_of_our_configurations_is_clips(tmp_path: Path) -> None:
    """As transformers makes it of the same merges and of the options of the folder."""
    folder = CONFIGS / "stable-diffusion-2" / "tokenizer"
    made = tokenizer.read(folder, "CLIPTokenizer")
    assert (made.count, made.limit, made.side) == (49408, 77, "right")
    words = json.loads(made.text)["model"]["vocab"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "vocab.json").write_text(json.dumps(words))
    merges = (CONFIGS / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "whole" / "merges.txt").write_text(merges)
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "whole")
    assert compare(tmp_path / "whole", "CLIPTokenizer", (77,)) == made
    # CLIP's own ids, by OpenAI's tokenizer: those of "a photo of a cat"
    assert made.open().encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"truncation_side": "left"}, "truncation_side must be 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens is not supported"),
        ({"model_max_length": "77"}, "model_max_length='77' must be a whole number from 1"),
        ({"model_max_length": 0}, "model_max_length=0 must be a whole number from 1"),
        ({"pad_token": 5}, "CLIPTokenizer cannot read it"),
    ],
)  # fmt: skip
def test_options_that_are_refused(tmp_path: Path, options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        tokenizer.read(clip(tmp_path / "tokenizer", **options), "CLIPTokenizer")
    assert "\n" not in str(caught.value)


def test_damaged(tmp_path: Path) -> None:
    folder = clip(tmp_path / "tokenizer")
    for name in tokenizer.OPTIONS:
        kept = (folder / name).read_text() if (folder / name).is_file() else None
        for text in ("{", '{"a":' * 50_000, "[1]"):
            (folder / name).write_text(text)
            with pytest.raises(DexportError, match=f"{name}: not valid JSON") as caught:
                tokenizer.read(folder, "CLIPTokenizer")
            assert "\n" not in str(caught.value)
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_text(kept)
    shutil.copy(folder / "merges.txt", folder / "tokenizer.json")
    with pytest.raises(DexportError, match="CLIPTokenizer cannot read it"):
        tokenizer.read(folder, "CLIPTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(DexportError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        tokenizer.read(folder, "CLIPTokenizer")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (None, b"", "no tokenizer.json, and no spiece.model"),
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
        tokenizer.read(folder, "T5Tokenizer")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_fill_up(tmp_path: Path) -> None:
    WRITERS["llama"](tmp_path / "saved")
    options = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(DexportError, match="names no pad_token"):
        tokenizer.read(tmp_path / "saved", "LlamaTokenizer")


def test_a_class_is_never_imported_by_a_files_word(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="no tokenizer that is exported"):
        tokenizer.read(clip(tmp_path / "tokenizer"), "AutoTokenizer")


def test_learned_words_are_added_as_diffusers_adds_them(tmp_path: Path) -> None:
    folder = clip(tmp_path / "tokenizer")
    expected = CLIPTokenizer.from_pretrained(folder)
    expected.add_tokens(["<cat>"])
    expected.add_tokens(["cattoy"])
    opened = tokenizer.read(folder, "CLIPTokenizer").open(["<cat>", "cattoy"])
    for prompt in PROMPTS:
        assert opened.encode(prompt).ids == expected(prompt).input_ids


def resized(folder: Path, rows: int) -> None:
    """Give the text encoder's table so many rows."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    table = tensors[name]
    tensors[name] = torch.cat([table, table])[:rows].contiguous()
    save_file(tensors, file)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))


def test_a_table_must_have_a_row_for_each_token_and_no_more(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    resized(folder, SIZE + 2)
    with pytest.raises(DexportError, match=r"has 520 tokens, and the table of the text_encoder 522 rows: 2 learned"):
        tokenizer.check(checkpoint.read(folder))
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat>": SIZE, "cattoy": SIZE + 1}))
    tokenizer.check(checkpoint.read(folder))
    resized(folder, SIZE + 1)
    with pytest.raises(DexportError, match=r"has 522 tokens, and the table of the text_encoder 521 rows; it belongs"):
        tokenizer.check(checkpoint.read(folder))


@pytest.mark.parametrize(
    ("write", "encoder", "tokens"),
    [
        (small_flow.flux, "text_encoder_2", "tokenizer_2"),
        (small_transformers.sana, "text_encoder", "tokenizer"),
        (small_flow.z_image, "text_encoder", "tokenizer"),
    ],
)
def test_tables_of_language_models_may_be_filled_up(tmp_path: Path, write: Any, encoder: str, tokens: str) -> None:
    """To multiples of 8, as published ones are; what is beyond by less is a lost word, and too few rows are too few."""
    folder = tmp_path / "checkpoint"
    write(folder)
    size = len(
        getattr(transformers, checkpoint.read(folder).tokenizers[tokens].class_name).from_pretrained(folder / tokens)
    )
    file = folder / encoder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if tokenizer.TABLE.fullmatch(name))

    def check(rows: int) -> None:
        save_file({**tensors, name: torch.zeros(rows, tensors[name].shape[1])}, file)
        tokenizer.check(checkpoint.read(folder))

    padded = -(-(size + 1) // 8) * 8
    for rows in (size, padded, padded + 64):
        check(rows)
    with pytest.raises(DexportError, match=f"has {size} tokens, and the table of the {encoder} {padded + 1} rows: "):
        check(padded + 1)
    with pytest.raises(DexportError, match=f"has {size} tokens, and the table of the {encoder} 20 rows; it belongs"):
        check(20)


def test_special_tokens_that_no_table_knows(tmp_path: Path) -> None:
    """transformers gives each T5 its sentinels, whether its table has them or not."""
    folder = tmp_path / "checkpoint"
    small_flow.flux(folder)
    place = folder / "tokenizer_2"
    opened = T5Tokenizer.from_pretrained(place)
    first = min(number for word, number in opened.get_vocab().items() if word.startswith("<extra_id_"))
    made = tokenizer.read(place, "T5Tokenizer")
    assert (made.count, made.plain) == (len(opened), first)


def test_how_many_tokens_is_the_tokenizers_word(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    for limit in (77, 40):
        change(folder / "tokenizer", model_max_length=limit)
        assert parts.tokens(checkpoint.read(folder), "text_encoder", "tokens").shape == ("batch", limit)
    for limit, words in ((78, "says model_max_length=78"), (None, "names no model_max_length")):
        change(folder / "tokenizer", model_max_length=limit)
        with pytest.raises(DexportError, match=f"{words}.*77 positions; set model_max_length to 77"):
            parts.tokens(checkpoint.read(folder), "text_encoder", "tokens")
