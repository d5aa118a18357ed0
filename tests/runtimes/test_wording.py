"""Words that change over the steps: the examples of the web UI's wiki and of its parser, and odd brackets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtimes import samplers, wording
from runtimes.wording import at_step, parse, schedule


def runs(prompt: str, steps: int) -> list[tuple[int, str]]:
    """The last step of each wording in a row, as the web UI's parser gives its schedules."""
    nodes = parse(prompt)
    words = [at_step(nodes, step, steps) for step in range(1, steps + 1)]
    return [(step, own) for step, own in enumerate(words, 1) if step == steps or words[step] != own]


# The prompt, the steps and what they become. Those of ten steps with letters for words are the doctests of the web UI's
# own parser (modules/prompt_parser.py, get_learned_conditioning_prompt_schedules).
@pytest.mark.parametrize(
    ("prompt", "steps", "expected"),
    [
        ("plain", 10, [(10, "plain")]),
        ("a [b:3]", 10, [(3, "a "), (10, "a b")]),
        ("a [b: 3]", 10, [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", 10, [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", 10, [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", 10, [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", 10, [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", 10, [(10, "a [unbalanced")]),
        ("a [b:.5] c", 10, [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", 10, [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", 3, [(1, "a"), (2, "(b:1.1)"), (3, "a")]),
        ("a [red:green:0.25] apple", 100, [(25, "a red apple"), (100, "a green apple")]),
        ("a [red:green:4] apple", 10, [(4, "a red apple"), (10, "a green apple")]),
        ("[on a table:0.5] red", 10, [(5, " red"), (10, "on a table red")]),
        ("red[ apple::0.6]", 10, [(6, "red apple"), (10, "red")]),
        ("red[: apple:0.6]", 10, [(6, "red"), (10, "red apple")]),
        ("[a:b:.5]", 5, [(2, "a"), (5, "b")]),
        ("[a:b: 3 ]", 5, [(3, "a"), (5, "b")]),
        ("[a:b:0]", 3, [(3, "b")]),
        ("[a:b:-1]", 3, [(3, "b")]),
        ("[a:b:20]", 3, [(3, "a")]),
        ("[a:b:1.0]", 3, [(3, "a")]),  # with a point it is a share
        ("[a|b]", 4, [(1, "a"), (2, "b"), (3, "a"), (4, "b")]),
        ("[a|b|]c", 4, [(1, "ac"), (2, "bc"), (3, "c"), (4, "ac")]),
        ("[[a:b:2]:[c|d]:4]", 6, [(2, "a"), (4, "b"), (5, "c"), (6, "d")]),
        ("[(a:1.2)|[b]]", 2, [(1, "(a:1.2)"), (2, "[b]")]),
        ("([red:green:1] apple:1.3)", 2, [(1, "(red apple:1.3)"), (2, "(green apple:1.3)")]),
        ("[a \\[x\\]:b\\:c:1]", 2, [(1, "a \\[x\\]"), (2, "b:c")]),
        ("a \\[b:c:1\\] [d]", 2, [(2, "a \\[b:c:1\\] [d]")]),
        ("[a:b:c:1] [a:b] [a:b|c] [a", 2, [(2, "[a:b:c:1] [a:b] [a:b|c] [a")]),
        ("a | b : c ] ) [(d:e:1]", 2, [(2, "a | b : c ] ) [(d:e:1]")]),
        ("[" * 3000 + "a:b:1" + "]" * 3000, 1, [(1, "[" * 3000 + "a:b:1" + "]" * 3000)]),
        ("red <lora:style:0.8>[a<lora:x:1>:b:1]", 2, [(1, "red a"), (2, "red b")]),
    ],
)  # fmt: skip
def test_schedules_are_the_web_uis(prompt: str, steps: int, expected: list[tuple[int, str]]) -> None:
    assert runs(prompt, steps) == expected


def test_wordings_are_numbered_over_all_prompts() -> None:
    texts, order = schedule(["[a|b] red", "apple"], 5)
    assert (texts, order) == ([("a red", "apple"), ("b red", "apple")], [0, 1, 0, 1, 0])
    assert schedule(["red", "[x]"], 3) == ([("red", "[x]")], [0, 0, 0])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ddim", {}, [0, 1, 2, 3, 4]),
        ("heun", {}, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ("pndm", {}, [0, 0, 1, 2, 3, 4]),
        ("PNDMScheduler", {"skip_prk_steps": False}, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]),
    ],
)
def test_calls_belong_to_steps(name: str, options: dict[str, bool], expected: list[int]) -> None:
    table = samplers.compile_table({"_class_name": "DDIMScheduler", **options}, 5, sampler=name)
    assert [row.wording for row in wording.plan(table.rows, range(5))] == expected
    assert [replace(row, wording=0) for row in wording.plan(table.rows, range(5))] == list(table.rows)
