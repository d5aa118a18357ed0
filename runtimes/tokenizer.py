"""Prompts to token ids, by the ``tokenizers`` package and the bundle's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import DexportError
from runtimes.manifest import PROMPT, Tokenizer


class PromptTokenizer:
    """A tokenizer file, opened."""

    def __init__(self, folder: Path, spec: Tokenizer) -> None:
        """Open ``folder / spec.file``; DexportError where the tokenizers package is missing."""
        try:
            import tokenizers
        except ImportError as error:
            raise DexportError("prompts need the tokenizers package; run: pip install 'dexport[text]'") from error
        self.spec = spec
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / spec.file))
        except Exception as error:  # the package raises bare Exception for every kind of damage
            raise DexportError(f"{folder / spec.file}: not a tokenizer file ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._following = _following(self._tokenizer)

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before a text and after it."""
        encoding = self._tokenizer.encode("a")
        own = [index for index, mark in enumerate(encoding.special_tokens_mask) if not mark]
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]

    def place(self, count: int) -> int:
        """Where in a row ``count`` ids begin, beside those that fill it up."""
        return 0 if self.spec.side == "right" else self.spec.length - count

    def content(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text without marks, and the place in it where each begins.

        A word that was added with others that are named after it, word_1, word_2 and so on, stands for all of them, as
        in diffusers.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DexportError(f"the prompt {text!r} is not valid text") from error
        every = [
            (number, start)
            for own, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            for number in (own, *self._following.get(own, ()))
        ]
        return [number for number, _ in every], [start for _, start in every]

    def __call__(self, prompts: Sequence[str], *, negative: bool = False) -> tuple[NDArray[np.int64], list[str]]:
        """Return the ids, int64 [len(prompts), length], and for each prompt the words that did not fit ("" if all did).

        negative: with the template of negative prompts. A long text keeps its first tokens and the marks that the
        tokenizer puts at its end, as diffusers does; so of a template's words those behind the prompt go first.
        """
        template = self.spec.template if self.spec.negative is None or not negative else self.spec.negative
        before, after = template.split(PROMPT)
        ids = np.full((len(prompts), self.spec.length), self.spec.pad, np.int64)
        cut = []
        for row, prompt in enumerate(prompts):
            try:
                own = prompt.strip().lower() if self.spec.lower else prompt
                encoding = self._tokenizer.encode(before + own + after)
            except (TypeError, AttributeError, UnicodeEncodeError) as error:
                raise DexportError(f"the prompt {prompt!r} is not valid text") from error
            tokens, end = _shortened(encoding, self.spec.length)
            start = self.place(len(tokens))
            ids[row, start : start + len(tokens)] = tokens
            cut.append("" if end is None else own[max(end - len(before), 0) :].strip())
        return ids, cut


def _shortened(encoding: Any, length: int) -> tuple[list[int], int | None]:
    """The ids of a text, ``length`` at most, and where in the text they end; None where nothing was cut."""
    tokens, marks = encoding.ids, encoding.special_tokens_mask  # 1 for what the tokenizer put around the text
    if len(tokens) <= length:
        return tokens, None
    last = len(marks) - next((index for index, mark in enumerate(reversed(marks)) if not mark), len(marks))
    kept = max(length - (len(tokens) - last), 0)
    return [*tokens[:kept], *tokens[last:]][-length:], encoding.offsets[kept][0]


def _following(tokenizer: Any) -> dict[int, list[int]]:
    """The ids that stand behind that of an added word: those of the words with _1, _2 and so on at its end."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    following = {}
    for word, number in added.items():
        more: list[int] = []
        while (name := f"{word}_{len(more) + 1}") in added:
            more.append(added[name])
        following[number] = more
    return following
