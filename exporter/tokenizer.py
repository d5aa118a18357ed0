"""A checkpoint's tokenizer as one tokenizer.json that the ``tokenizers`` package loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from exporter.families import CLIP_TOKENIZERS
from exporter.single_file import CONFIGS
from runtimes import strict_json
from runtimes.errors import DexportError

END = "<|endoftext|>"
START = "<|startoftext|>"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
Side = Literal["right", "left"]
RIGHT: Side = "right"
DEFAULTS = {"bos_token": START, "eos_token": END, "pad_token": END}  # CLIPTokenizer's


def write(folder: Path, class_name: str, output: Path, words: Sequence[str] = ()) -> tuple[int, Side]:
    """Write ``output`` (tokenizer.json) from a tokenizer's folder; return the id that it pads with, and on which side.

    class_name: of transformers, one of ``exporter.families.TOKENIZERS``. words: tokens to add. What is written puts the
    tokenizer's marks around a text, and neither pads nor cuts it: the pipeline does, and says what it cut. Raises
    DexportError for files that are missing or damaged.
    """
    tokenizer, pad, side = read(folder, class_name)
    _add(tokenizer, words)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    return pad, side


def read(folder: Path, class_name: str) -> tuple[Any, int, Side]:
    """The tokenizer of the ``tokenizers`` package that ``write`` writes, and what it returns."""
    if class_name in CLIP_TOKENIZERS:
        tokenizer, ids = _clip(folder)
        pad, side = ids["pad_token"], RIGHT
    else:
        tokenizer, pad, side = _from_transformers(folder, class_name)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, pad, side


def _from_transformers(folder: Path, class_name: str) -> tuple[Any, int, Side]:
    """A tokenizer as transformers reads it: a tokenizer.json, a vocabulary with merges, or a model of SentencePiece."""
    import transformers

    from exporter.trace import quiet

    _read_options(folder)  # says which file is no JSON
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise DexportError(
            f"{folder}: none of {', '.join(VOCABULARIES)} is there; copy or download the tokenizer again"
        )
    try:
        with quiet():
            found = getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
        pad, side = found.pad_token_id, found.padding_side
    except Exception as error:  # each class fails in its own way over a file that is damaged
        raise DexportError(
            f"{folder}: {class_name} cannot read it ({_line(error)}); copy or download it again"
        ) from error
    if pad is None:
        raise DexportError(f"{folder}: its tokenizer_config.json names no pad_token")
    return found.backend_tokenizer, int(pad), "left" if side == "left" else RIGHT


def _line(error: Exception) -> str:
    """The first line of what a package says; transformers takes what is no SentencePiece model for one of tiktoken."""
    said = next(iter(str(error).splitlines()), "")[:200]
    return f"{type(error).__name__}: {said}" if "tiktoken" not in said else "it is no model of SentencePiece"


def extend(folder: Path, words: Sequence[str], more: Sequence[str], where: str) -> tuple[int, int]:
    """How many tokens a CLIP tokenizer has with ``words``, and the id of its end mark.

    Raises DexportError, which begins with ``where``, if ``more`` cannot be added: one of them means something already.
    """
    tokenizer, ids = _clip(folder)
    _add(tokenizer, words)
    known = tokenizer.get_vocab_size()
    for word in more:
        plain = tokenizer.normalizer.normalize_str(word) if tokenizer.normalizer else word
        if any(tokenizer.token_to_id(form) is not None for form in (word, plain, f"{plain}</w>")):
            raise DexportError(f"{where}: {word!r} is a word of the tokenizer already; name another with FILE:WORD")
        _add(tokenizer, [word])
    return known, ids["eos_token"]


def _add(tokenizer: Any, words: Sequence[str]) -> None:
    """Add words as tokens: whole words only, in small letters or large, where the tokenizer takes them for the same."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])


def _clip(folder: Path) -> tuple[Any, dict[str, int]]:
    """A CLIP tokenizer of a tokenizer.json, or of vocab.json and merges.txt, and the ids of its marks.

    dexport's own configurations leave both to CLIP's vocabulary, which lies beside them.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    options = _read_options(folder)
    start, end, pad = (_token(options, key, default) for key, default in DEFAULTS.items())
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = strict_json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            tokenizer = _convert(folder, vocabulary, _merges(folder / "merges.txt"), start, end, pad)
        elif CONFIGS in folder.parents:
            merges = _merges(CONFIGS / "merges.txt")
            tokenizer = _convert(folder, _vocabulary(merges), merges, start, end, pad)
        else:
            raise DexportError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    except DexportError:
        raise
    except Exception as error:  # the packages raise plain Exception for a damaged file
        raise DexportError(f"{folder}: its files are damaged ({error}); copy or download them again") from error
    ids: dict[str, int] = {}
    for token in (start, end, pad):
        number = tokenizer.token_to_id(token)
        if number is None:
            raise DexportError(f"{folder}: the token {token!r} is not in the vocabulary")
        ids[token] = number
    try:
        tokenizer.post_processor = TemplateProcessing(
            single=[start, "$A", end], special_tokens=[(start, ids[start]), (end, ids[end])]
        )
    except Exception as error:  # as above
        raise DexportError(f"{folder}: {start!r} and {end!r} cannot mark a text ({error})") from error
    return tokenizer, {"eos_token": ids[end], "pad_token": ids[pad]}


def _merges(file: Path) -> list[tuple[str, ...]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _vocabulary(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """CLIP's ids by token: each byte, each byte that ends a word, what each merge makes, and the marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def _convert(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]], start: str, end: str, pad: str
) -> Any:
    """A tokenizer with transformers' own idea of CLIP's way to split a text."""
    from transformers import CLIPTokenizerFast

    for token in (start, end, pad):  # else transformers would add it, with an id beyond the text encoder's table
        if token not in vocabulary:
            raise DexportError(f"{folder}: the token {token!r} is not in the vocabulary")
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges, **marks).backend_tokenizer


def _read_options(folder: Path) -> dict[str, Any]:
    """The special tokens' names; tokenizer_config.json wins over special_tokens_map.json, as in transformers."""
    options: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                options |= strict_json.loads(path.read_text(encoding="utf-8"), finite=False)
            except (ValueError, TypeError) as error:
                raise DexportError(f"{path}: not valid JSON ({error}); copy or download it again") from error
    return options


def _token(options: dict[str, Any], key: str, default: str) -> str:
    """A special token is written as its text, or as an object with "content"."""
    value = options.get(key) or default
    return str(value.get("content", default)) if isinstance(value, dict) else str(value)
