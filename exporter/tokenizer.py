"""A checkpoint's tokenizer as one tokenizer.json that the ``tokenizers`` package loads by itself.

transformers makes it, by the class that model_index.json names and of all the files that this class reads, as diffusers
has it made. Only dexport's own configurations, which have no vocabulary, are put together here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exporter.families import TOKENIZERS
from exporter.single_file import CONFIGS
from runtimes import strict_json
from runtimes.errors import DexportError
from runtimes.manifest import PROMPT

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint, Component

END = "<|endoftext|>"
START = "<|startoftext|>"
JSON = "tokenizer.json"
ANY = "tokenizer.model"  # what transformers takes for any class where there is no tokenizer.json
OPTIONS = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
UNLIMITED = 10**20  # transformers' model_max_length of a tokenizer that names none is above it
# Encoders whose table has a row for each token of the tokenizer, and none more. Those of language models are filled up.
EXACT = ("CLIPTextModel", "CLIPTextModelWithProjection", "LDMBertModel")
MULTIPLE = 8  # rows that tables are filled up to whole multiples of, at least: 32128 of T5, 152064 of Qwen 2.5
TABLE = re.compile(r"(.*\.)?(token_embedding|embed_tokens|shared)\.weight")
Side = Literal["right", "left"]
RIGHT: Side = "right"


@dataclass(frozen=True)
class Made:
    """A tokenizer as transformers made it.

    text: its tokenizer.json, which puts the tokenizer's marks around a text, and neither pads nor cuts it: the pipeline
    does, and says what it cut. pad, side: the id that it pads with, and where. end: its mark of the end. limit: how
    many tokens its model takes, None where it does not say. count: how many ids it has. plain: how many of them a text
    may become that holds no special token, with its marks and what fills it up.
    """

    text: str
    pad: int
    side: Side
    end: int | None
    limit: int | None
    count: int
    plain: int

    def open(self, words: Sequence[str] = ()) -> Any:
        """The tokenizer of the ``tokenizers`` package, with words added to it."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        _add(tokenizer, words)
        return tokenizer


def write(made: Made, output: Path, words: Sequence[str] = ()) -> None:
    """Write ``output`` (tokenizer.json); words: tokens to add."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(made.open(words).to_str(pretty=True) + "\n", encoding="utf-8")


def read(folder: Path, class_name: str) -> Made:
    """The tokenizer of a folder; class_name: of transformers, one of ``exporter.families.TOKENIZERS``.

    Raises DexportError for files that are missing or damaged, and for options that a tokenizer.json cannot hold.
    """
    found = load(folder, class_name)
    try:
        pad, side, backend = found.pad_token_id, found.padding_side, found.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        ids = set(backend.get_vocab(with_added_tokens=True).values())
        special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        used = {*(ids - special), *backend.encode("").ids, *([] if pad is None else [pad])}
        text = backend.to_str()
    except Exception as error:  # as in ``load``
        raise _unreadable(folder, class_name, error) from error
    options = folder / "tokenizer_config.json"
    if pad is None:
        raise DexportError(f"{folder}: its tokenizer_config.json names no pad_token")
    if found.truncation_side != "right":
        raise DexportError(f"{options}: truncation_side must be 'right'; prompts are cut at their end")
    if found.split_special_tokens:
        raise DexportError(f"{options}: split_special_tokens is not supported, since no tokenizer.json can hold it")
    limit = found.model_max_length
    if type(limit) in (int, float) and limit > UNLIMITED:
        limit = None
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DexportError(f"{options}: model_max_length={limit!r:.60} must be a whole number from 1")
    return Made(
        text, int(pad), "left" if side == "left" else RIGHT, found.eos_token_id, limit, 1 + max(ids), 1 + max(used)
    )


def load(folder: Path, class_name: str) -> Any:
    """transformers' own tokenizer of a folder; DexportError for files that are missing or damaged."""
    import transformers

    from exporter.trace import quiet

    if class_name not in TOKENIZERS:  # what a file says is looked up in our own list before anything is imported by it
        raise DexportError(f"{folder}: a {class_name:.60} is no tokenizer that is exported")
    for name in OPTIONS:
        _read_options(folder / name)  # says which file is no JSON
    kind = getattr(transformers, class_name)
    names = {key: name for key, name in kind.vocab_files_names.items() if key != "tokenizer_file"}
    shipped = CONFIGS in folder.parents and not (folder / JSON).is_file()
    there = [(folder / name).is_file() for name in names.values()]
    if not shipped and not (folder / JSON).is_file() and not (folder / ANY).is_file() and not (there and all(there)):
        wanted = " with ".join(names.values())
        raise DexportError(f"{folder}: no {JSON}, and no {wanted}; copy or download the tokenizer again")
    try:
        with quiet():
            return _shipped(folder) if shipped else kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # each class fails in its own way over a file that is damaged
        raise _unreadable(folder, class_name, error) from error


def _unreadable(folder: Path, class_name: str, error: Exception) -> DexportError:
    """transformers takes what is no SentencePiece model for one of tiktoken, and says so."""
    said = next(iter(str(error).splitlines()), "")[:200]
    said = f"{type(error).__name__}: {said}" if "tiktoken" not in said else "it is no model of SentencePiece"
    return DexportError(f"{folder}: {class_name} cannot read it ({said}); copy or download it again")


def chat(folder: Path, class_name: str, **options: Any) -> str:
    """What a tokenizer's chat template makes of a user's message, with "{}" where that goes; ``options``: of it."""
    found = load(folder, class_name)
    try:
        message = [{"role": "user", "content": PROMPT}]
        text = str(found.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options))
    except Exception as error:  # there is none, or it is no template
        raise _unreadable(folder, class_name, error) from error
    if text.count(PROMPT) != 1:
        raise DexportError(f"{folder}: its chat_template does not give the prompt as it is; copy or download it again")
    return text


def check(checkpoint: Checkpoint) -> None:
    """Raise DexportError unless each text encoder's table of tokens has a row for each id of its tokenizer.

    Of CLIP and BERT they are as many: rows without a token are those of words that the tokenizer has lost, and that a
    prompt would be split at in silence. Tables of language models are filled up, and some of their tokenizers have
    special tokens that no table knows (T5's <extra_id_0> and the like) and no prompt needs.
    """
    for name, files in checkpoint.tokenizers.items():
        part = _encoder_of(checkpoint, name)
        if part is None:
            continue  # of a model of one's own
        tables = [entry.shape for key, entry in part.entries.items() if TABLE.fullmatch(key)]
        rows = next((shape[0] for shape in tables if len(shape) == 2), None)
        exact, count = part.class_name in EXACT, files.made.count + len(checkpoint.words)
        if rows is None or rows == count:
            continue  # a table that is missing is named when weights are bound
        if rows < (count if exact else files.made.plain):
            raise DexportError(
                f"{files.path}: it has {count} tokens, and the table of the {part.name} {rows} rows; it belongs to "
                "another model, or its files name a special token that is not in the vocabulary"
            )
        if rows > count and (exact or rows % MULTIPLE):
            raise DexportError(
                f"{files.path}: it has {count} tokens, and the table of the {part.name} {rows} rows: {rows - count} "
                "learned words are missing; copy added_tokens.json and tokenizer.json of the training's result, too"
            )


def _encoder_of(checkpoint: Checkpoint, tokenizer: str) -> Component | None:
    """The text encoder that a tokenizer's ids go to; LDMTextToImagePipeline calls it by its kind."""
    name = tokenizer.replace("tokenizer", "text_encoder")
    return checkpoint.components.get(name, checkpoint.components.get("bert"))


def extend(made: Made, words: Sequence[str], more: Sequence[str], where: str) -> tuple[int, int]:
    """How many tokens a CLIP tokenizer has with ``words``, and the id of its end mark.

    Raises DexportError, which begins with ``where``, if ``more`` cannot be added: one of them means something already.
    """
    tokenizer = made.open(words)
    known = tokenizer.get_vocab_size()
    for word in more:
        plain = tokenizer.normalizer.normalize_str(word) if tokenizer.normalizer else word
        if any(tokenizer.token_to_id(form) is not None for form in (word, plain, f"{plain}</w>")):
            raise DexportError(f"{where}: {word!r} is a word of the tokenizer already; name another with FILE:WORD")
        _add(tokenizer, [word])
    if made.end is None:
        raise DexportError(f"{where}: the tokenizer names no eos_token, and so takes no embedding")
    return known, made.end


def _add(tokenizer: Any, words: Sequence[str]) -> None:
    """Add words as tokens, as diffusers does: in whatever case, where the tokenizer makes all letters small."""
    tokenizer.add_tokens(list(words))


def _shipped(folder: Path) -> Any:
    """The tokenizer of a configuration of ours, which leaves the vocabulary to the merges that lie beside them."""
    from transformers import CLIPTokenizer

    merges = _merges(CONFIGS / "merges.txt")
    options = _read_options(folder / "tokenizer_config.json")
    options.pop("tokenizer_class", None)
    return CLIPTokenizer(vocab=_vocabulary(merges), merges=merges, **options)


def _merges(file: Path) -> list[tuple[str, ...]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _vocabulary(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """CLIP's ids by token: each byte, each byte that ends a word, what each merge makes, and the marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def _read_options(path: Path) -> dict[str, Any]:
    """One of ``OPTIONS``, {} where it is not there; DexportError for what is no JSON object."""
    if not path.is_file():
        return {}
    try:
        return dict(strict_json.loads(path.read_text(encoding="utf-8"), finite=False))
    except (ValueError, TypeError) as error:
        raise DexportError(f"{path}: not valid JSON ({error}); copy or download it again") from error
