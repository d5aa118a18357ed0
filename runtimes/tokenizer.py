"""Prompts to token ids, by the ``tokenizers`` package and the bundle's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import DexportError
from runtimes.manifest import Tokenizer


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

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """Return the ids, int64 [len(prompts), length], and for each prompt the words that did not fit ("" if all did).

        A long prompt keeps its first tokens and the end mark, as the models were trained and diffusers does.
        """
        length = self.spec.length
        ids = np.full((len(prompts), length), self.spec.pad, np.int64)
        cut = []
        for row, prompt in enumerate(prompts):
            try:
                encoding = self._tokenizer.encode(prompt)
            except (TypeError, UnicodeEncodeError) as error:
                raise DexportError(f"the prompt {prompt!r} is not valid text") from error
            tokens, rest = encoding.ids, ""
            if len(tokens) > length:
                rest = prompt[encoding.offsets[length - 1][0] :].strip()
                tokens = [*tokens[: length - 1], tokens[-1]]
            ids[row, : len(tokens)] = tokens
            cut.append(rest)
        return ids, cut


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
