"""Prompts whose words change over the steps, in the syntax of AUTOMATIC1111's web UI, and its marks that are no words.

``[a:b:0.5]`` is a for half of the steps and then b, ``[b:0.5]`` adds b there and ``[a::0.5]`` takes a away; a number
without a point counts steps, and one with a point shares of them. ``[a|b]`` is a and b by turns, from step to step.
They may stand in one another and in brackets that weigh. The grammar is that of the web UI's wiki (Features, "Prompt
editing" and "Alternating Words"); a bracket that is neither is left as it is, for ``runtimes.prompts.parse``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from runtimes.manifest import Stage
from runtimes.table import Row

if TYPE_CHECKING:
    from runtimes.request import Request

NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
DEEPEST = 64  # brackets in brackets; a prompt with more is text
BREAK = re.compile(r"\s*\bBREAK\b\s*")  # starts another chunk
AND = re.compile(r"\bAND\b")
NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")  # which the web UI adds while it runs


@dataclass(frozen=True)
class Scheduled:
    """``before`` for the first steps and then ``after``; when: how many, or if it has a point which share of all."""

    before: tuple[Node, ...]
    after: tuple[Node, ...]
    when: str

    def choose(self, step: int, steps: int) -> tuple[Node, ...]:
        """What is drawn at a step, counted from 1, of all."""
        count = float(self.when) * (steps if "." in self.when else 1)
        return self.before if step <= int(min(count, steps)) else self.after


@dataclass(frozen=True)
class Alternating:
    """Each of the options in turn."""

    options: tuple[tuple[Node, ...], ...]

    def choose(self, step: int, steps: int) -> tuple[Node, ...]:
        """What is drawn at a step, counted from 1."""
        return self.options[(step - 1) % len(self.options)]


Node = str | Scheduled | Alternating


@dataclass
class _Open:
    """A bracket that is open: its parts so far, and what stands between them."""

    mark: str
    parts: list[list[Node]] = field(default_factory=lambda: [[]])
    between: list[str] = field(default_factory=list)

    def text(self) -> list[Node]:
        """The nodes of what turned out to be text."""
        nodes: list[Node] = [self.mark, *self.parts[0]]
        for mark, part in zip(self.between, self.parts[1:], strict=True):
            nodes += [mark, *part]
        return nodes

    def closed(self) -> list[Node]:
        """The nodes of a square bracket that was closed."""
        last = "".join(self.parts[-1]) if all(isinstance(node, str) for node in self.parts[-1]) else ""  # type: ignore[arg-type]
        parts = [tuple(part) for part in self.parts]
        if self.between in ([":"], [":", ":"]) and NUMBER.fullmatch(last):
            return [Scheduled(parts[0] if len(parts) == 3 else (), parts[-2], last.strip())]
        if self.between and set(self.between) == {"|"}:
            return [Alternating(tuple(parts))]
        return [*self.text(), "]"]


def parse(prompt: str) -> tuple[Node, ...]:
    """A prompt as text and what changes in it."""
    stack = [_Open("")]
    for mark in re.findall(r"\\.|[][():|]|[^][():|\\]+|\\", NETWORK.sub("", prompt), re.DOTALL):
        top = stack[-1]
        if len(stack) > DEEPEST:
            return (prompt,)
        if mark in "[(":
            stack.append(_Open(mark))
        elif mark in ":|" and top.mark == "[":
            top.between.append(mark)
            top.parts.append([])
        elif mark == {"[": "]", "(": ")"}.get(top.mark):
            stack.pop()
            stack[-1].parts[-1] += top.closed() if mark == "]" else [*top.text(), ")"]
        else:
            top.parts[-1].append(mark[1:] if top.mark == "[" and mark in ("\\:", "\\|") else mark)
    while len(stack) > 1:  # brackets that nothing closes
        top = stack.pop()
        stack[-1].parts[-1] += top.text()
    return tuple(stack[0].parts[0])


def at_step(nodes: Iterable[Node], step: int, steps: int) -> str:
    """The prompt of a step, counted from 1, of ``steps``."""
    return "".join(node if isinstance(node, str) else at_step(node.choose(step, steps), step, steps) for node in nodes)


def schedule(prompts: Sequence[str], steps: int) -> tuple[list[tuple[str, ...]], list[int]]:
    """The wordings that prompts have, and for each of the steps the number of its own."""
    parsed = [parse(prompt) for prompt in prompts]
    if all(isinstance(node, str) for nodes in parsed for node in nodes):
        return [tuple(prompts)], [0] * steps
    numbers: dict[tuple[str, ...], int] = {}
    order = [
        numbers.setdefault(tuple(at_step(nodes, step, steps) for nodes in parsed), len(numbers))
        for step in range(1, steps + 1)
    ]
    return list(numbers), order


def requests(request: Request, stage: Stage, steps: int) -> tuple[list[Request], list[int]]:
    """The request in each wording that its prompts have for a stage, and the number of each step's own."""
    if not stage.states or not request.prompt_weights:
        return [request], [0] * steps
    texts, order = schedule([*request.prompts, request.negative_prompt], steps)
    # Of a negative prompt that has no words for some steps a space is left: for none at all zeros may stand.
    nothing = " " if request.negative_prompt else ""
    return [replace(request, prompts=own, negative_prompt=negative or nothing) for *own, negative in texts], order


def plan(rows: Sequence[Row], order: Sequence[int]) -> tuple[Row, ...]:
    """The rows of a whole way to an image with the number of the wording at each; ``order``: that of each step.

    A row belongs to the step that it begins, or else to the one before; where as with PNDM more rows begin a step than
    there are, they are spread over the steps.
    """
    begun = sum(bool(row.level) for row in rows)
    planned, count = [], -1
    for row in rows:
        count += bool(row.level)
        planned.append(replace(row, wording=order[max(count, 0) * len(order) // max(begun, 1)]))
    return tuple(planned)


def warnings(what: str, prompt: str, *, chunks: int) -> list[str]:
    """A line for each mark of the web UI in a prompt that is not followed; chunks: the most that there may be."""
    found = [
        f"the {what} holds {network}: it was left out, since a bundle's networks are merged when it is built (--lora)"
        for network in NETWORK.findall(prompt)
    ]
    if AND.search(prompt):
        found.append(f"the {what} holds AND, which is drawn as a word: prompts are not composed")
    if BREAK.search(prompt) and chunks == 1:
        found.append(f"the {what} holds BREAK: it was left out, since this bundle takes one chunk; see --long-prompts")
    return found
