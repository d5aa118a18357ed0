"""Prompts to token ids, by the ``tokenizers`` package and the bundle's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
