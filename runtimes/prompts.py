"""Prompts: what their words weigh, and their chunks where they are longer than a text encoder takes.

``(word)`` weighs 1.1, ``[word]`` 1 / 1.1 and ``(word:1.3)`` 1.3; of brackets in brackets the weights multiply, one that
is not closed goes to the end, and ``\\(`` is a bracket of the text. The states of a token are multiplied by its weight,
and then all of the prompt's states by one number, so that their mean stays what it was. Syntax and meaning are those of
AUTOMATIC1111's web UI (its wiki, Features, "Attention/emphasis") and of diffusers' community pipeline
lpw_stable_diffusion; so is what becomes of a long prompt: each chunk of it goes through the text encoder with marks of
its own, the states are joined, and a shorter prompt beside it is filled with the states of an empty one. What changes
over the steps is runtimes.wording's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as memoize
from pathlib import Path

import numpy as np

from runtimes import wording
from runtimes.errors import DexportError
from runtimes.manifest import SEQUENCE, Graph, Model, Stage
from runtimes.session import Array, Session, run_batched
from runtimes.tokenizer import PromptTokenizer
from runtimes.wording import BREAK, NETWORK

FACTOR = 1.1  # of a pair of brackets
SHOWN = 80  # characters of a prompt in a warning
LARGEST = 100.0  # a weight beyond is a year or a slip of the keyboard
SYNTAX = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)", re.ASCII)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt, what its tokens weigh, and whether it starts another chunk."""

    text: str
    weight: float = 1.0
    starts: bool = False


@dataclass(frozen=True)
class Tokens:
    """Prompts as a text graph takes them.

    ids: by the graph's inputs, int64 [B, chunks, length]. weights: of the tokens of all chunks, [B, chunks * length];
    None where every one is 1. cut: of each prompt the words that did not fit, "" if all did.
    """

    ids: Mapping[str, Array]
    weights: Array | None
    cut: list[str]

    @property
    def chunks(self) -> int:
        """How many chunks the longest prompt has."""
        return max(int(ids.shape[1]) for ids in self.ids.values())


def parse(prompt: str) -> list[Piece]:
    """The pieces of a prompt, without the brackets that weigh them; neighbours of one weight are one piece.

    BREAK between two of them starts another chunk, and names of networks are left out (runtimes.wording). Raises
    DexportError for a weight that is none.
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many pieces there were before each

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [replace(piece, weight=piece.weight * factor) for piece in pieces[start:]]

    end, prompt = 0, NETWORK.sub("", prompt)
    for found in SYNTAX.finditer(prompt):
        pieces.append(Piece(prompt[end : found.start()]))
        mark, end = found[0], found.end()
        if mark in opened:
            opened[mark].append(len(pieces))
        elif mark.endswith(")") and not mark.startswith("\\") and opened["("]:
            weigh(opened["("].pop(), float(mark[1:-1]) if mark != ")" else FACTOR)
        elif mark == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / FACTOR)
        else:
            pieces.append(Piece(mark.removeprefix("\\")))
    pieces.append(Piece(prompt[end:]))
    for start in opened["("]:
        weigh(start, FACTOR)
    for start in opened["["]:
        weigh(start, 1 / FACTOR)
    return [
        replace(piece, text=text, starts=index > 0)
        for piece in _joined(pieces)
        for index, text in enumerate(BREAK.split(piece.text))
    ]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined = [Piece("")]
    for piece in pieces:
        if not abs(piece.weight) <= LARGEST:
            raise DexportError(
                f"the prompt gives {piece.text.strip()!r:.60} the weight {piece.weight:g}, beyond {LARGEST:g}; write "
                "\\( for a bracket that weighs nothing, or leave all of them text with --no-prompt-weights"
            )
        if joined[-1].weight == piece.weight:
            joined[-1] = replace(joined[-1], text=joined[-1].text + piece.text)
        elif piece.text and not joined[-1].text:
            joined[-1] = piece
        elif piece.text:
            joined.append(piece)
    return joined


def weigh(states: Array, weights: Array) -> Array:
    """States [B, S, D] times weights [B, S], each row brought back to its mean; one of weights 1 is as it was."""
    rows = (weights != 1).any(axis=1)
    before = states[rows].astype(np.float64)
    after = before * weights[rows, :, None]
    old, new = (values.mean(axis=(1, 2), keepdims=True) for values in (before, after))
    weighed = states.copy()
    weighed[rows] = after * np.divide(old, new, out=np.ones_like(old), where=new != 0)
    return weighed


class Prompts:
    """What a model makes of prompts: its tokenizers, opened when they are first needed, and its text graphs."""

    def __init__(self, model: Model, folder: Path, open_graph: Callable[[str], Session]) -> None:
        """Take the model, the folder of its tokenizer files, and what opens a graph by its name."""
        self._model, self._open = model, open_graph
        self._tokenizers = memoize(lambda index: PromptTokenizer(folder, model.tokenizers[index]))

    def tokenize(
        self, stage: Stage, prompts: Sequence[str], *, weighted: bool = True, chunks: int = 1, negative: bool = False
    ) -> Tokens:
        """The inputs of a stage's text graph, in as many chunks as the longest prompt needs, and ``chunks`` at least.

        weighted: by the brackets in them. negative: they are negative prompts, which may have a template of their own.
        A stage that names no states leaves brackets text, and cuts at one chunk.
        """
        graph = self._text(stage)
        used = [
            (spec.input, self._tokenizers(i))
            for i, spec in enumerate(self._model.tokenizers)
            if spec.input in names(graph)
        ]
        if not stage.states:
            made = {name: tokenizer(prompts, negative=negative) for name, tokenizer in used}
            cuts = [cut for _, cut in made.values()]
            return Tokens({name: ids[:, None] for name, (ids, _) in made.items()}, None, _least(cuts))
        most = most_chunks(self._model, stage)
        marked = prompts if most > 1 else [BREAK.sub(" ", prompt) for prompt in prompts]
        pieces = [parse(prompt) for prompt in marked] if weighted else [[Piece(prompt)] for prompt in prompts]
        laid = {name: [_lay(tokenizer, own, most) for own in pieces] for name, tokenizer in used}
        chunks = max(chunks, *(len(row.ids) for rows in laid.values() for row in rows))
        full = {name: [_filled(tokenizer, row, chunks) for row in laid[name]] for name, tokenizer in used}
        weights = [np.stack([row.weights for row in rows]).reshape(len(prompts), -1) for rows in full.values()]
        if not all(np.array_equal(weights[0], other) for other in weights[1:]):
            raise DexportError("this model's tokenizers part the prompt differently: leave its words without a weight")
        return Tokens(
            {name: np.stack([row.ids for row in rows]) for name, rows in full.items()},
            weights[0] if (weights[0] != 1).any() else None,
            _least([[row.rest for row in rows] for rows in full.values()]),
        )

    def encode(
        self, stage: Stage, prompts: Sequence[str], *, weighted: bool = True, chunks: int = 1, negative: bool = False
    ) -> dict[str, Array]:
        """A stage's conditioning tensors of the prompts, with one row a prompt; see ``tokenize``."""
        if stage.text is None:
            return {}
        tokens = self.tokenize(stage, prompts, weighted=weighted, chunks=chunks, negative=negative)
        batch, count = len(prompts), tokens.chunks
        rows = run_batched(
            self._open(stage.text),
            {name: np.ascontiguousarray(ids.reshape(batch * count, -1)) for name, ids in tokens.ids.items()},
        )
        made = {}
        for name, value in rows.items():
            if name in stage.states:
                states = value.reshape(batch, count * value.shape[1], value.shape[2])
                made[name] = states if tokens.weights is None else weigh(states, tokens.weights)
            else:  # of the whole prompt, which it knows the first chunk of
                made[name] = value.reshape(batch, count, *value.shape[1:])[:, 0]
        return made

    def zeros(self, stage: Stage, count: int, chunks: int = 1) -> dict[str, Array]:
        """What stands for ``count`` empty prompts where zeros do."""
        made = {}
        for tensor in self._text(stage).outputs:
            first, *others = map(int, tensor.shape[1:])
            first *= chunks if tensor.name in stage.states else 1
            made[tensor.name] = np.zeros((count, first, *others), tensor.dtype)
        return made

    def warnings(self, asked: Mapping[str, Sequence[str]], steps: int, *, weighted: bool = True) -> list[str]:
        """A line for each prompt of which words are cut off or marks are not followed, in any of the steps.

        asked: prompts by what they are called.
        """
        lines = []
        for stage in self._model.stages:
            for name, prompts in asked.items() if stage.text is not None else ():
                every = prompts
                if stage.states and weighted:
                    most = most_chunks(self._model, stage)
                    lines += [line for prompt in prompts for line in wording.warnings(name, prompt, chunks=most)]
                    every = [prompt for own in wording.schedule(prompts, steps)[0] for prompt in own]
                negative = name == "negative prompt"
                cut = filter(None, self.tokenize(stage, every, weighted=weighted, negative=negative).cut)
                lines += [f"the {name} is longer than the model's context: {_short(own)} was cut off" for own in cut]
        return list(dict.fromkeys(lines))

    def _text(self, stage: Stage) -> Graph:
        assert stage.text is not None
        return self._model.graphs[stage.text]


def names(graph: Graph) -> set[str]:
    """What a graph's inputs are called."""
    return {tensor.name for tensor in graph.inputs}


def most_chunks(model: Model, stage: Stage) -> int:
    """The most chunks that a stage's denoiser takes: the longest sequence of states, over that of one chunk."""
    shortest, longest = model.graphs[stage.denoiser].sizes.get(SEQUENCE, (1, 1))
    return longest // shortest


@dataclass(frozen=True)
class _Laid:
    """A prompt in chunks: ids and weights [n, length], and the words that did not fit."""

    ids: Array
    weights: Array
    rest: str


def _lay(tokenizer: PromptTokenizer, pieces: Sequence[Piece], most: int) -> _Laid:
    """Cut a prompt into chunks, at least one and ``most`` at most, each between the tokenizer's marks."""
    start, end = tokenizer.marks
    length = tokenizer.spec.length
    room = length - len(start) - len(end)
    if room < 1:
        raise DexportError(f"{tokenizer.spec.file}: its marks leave no place for a word in {length} tokens")
    found = [(piece, *tokenizer.content(piece.text)) for piece in pieces]
    chunks: list[list[tuple[int, float]]] = [[]]  # ids and weights
    for piece, own, _ in found:
        if piece.starts:
            chunks.append([])
        for number in own:
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append((number, piece.weight))
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()  # nothing comes after the last BREAK
    kept = chunks[:most]
    laid = _Laid(*_empty(tokenizer, len(kept)), _rest(found, sum(map(len, kept))))
    for index, chunk in enumerate(kept):
        own = [number for number, _ in chunk]
        row = [*start, *own, *end]
        at = tokenizer.place(len(row))
        laid.ids[index, at : at + len(row)] = row
        at += len(start)
        laid.weights[index, at : at + len(own)] = [weight for _, weight in chunk]
    return laid


def _empty(tokenizer: PromptTokenizer, count: int) -> tuple[Array, Array]:
    """Ids and weights of ``count`` chunks without a word."""
    ids = np.full((count, tokenizer.spec.length), tokenizer.spec.pad, np.int64)
    marks = [number for side in tokenizer.marks for number in side]
    at = tokenizer.place(len(marks))
    ids[:, at : at + len(marks)] = marks
    return ids, np.ones(ids.shape)


def _filled(tokenizer: PromptTokenizer, laid: _Laid, count: int) -> _Laid:
    """With empty chunks at the end, so that there are ``count``."""
    ids, weights = _empty(tokenizer, count - len(laid.ids))
    return replace(laid, ids=np.concatenate([laid.ids, ids]), weights=np.concatenate([laid.weights, weights]))


def _rest(found: Sequence[tuple[Piece, Sequence[int], Sequence[int]]], kept: int) -> str:
    """The words of pieces from the token ``kept`` on: each piece with its ids, and where in it these begin."""
    rest = ""
    for piece, ids, begins in found:
        if kept < len(ids):
            rest += piece.text[begins[max(kept, 0)] if kept > 0 else 0 :]
        kept -= len(ids)
    return rest.strip()


def _least(cuts: Sequence[Sequence[str]]) -> list[str]:
    """Of each prompt the words that fitted into none of the tokenizers' lengths."""
    return [min(rests, key=len) for rests in zip(*cuts, strict=True)]


def _short(words: str) -> str:
    """The words that were cut off, in quotes; of many the first, and how many there are."""
    if len(words) <= SHOWN:
        return repr(words)
    return f"{words[:SHOWN].rsplit(' ', 1)[0]!r} … ({len(words.split())} words)"
