"""Some of the changes of every class, others for each of them; ``make oracle`` has all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import pytest
import torch

from exporter.families import PIPELINES, SAME
from tests.exactness import compare
from tests.exactness.compare import Comparison, Outcome
from tests.exactness.mutations import Mutation
from tests.exactness.page import Change, Sweep, page
from tests.exactness.subjects import SUBJECTS

COUNT = 1  # changes of each class
STRIDE = 37  # from a class's change to that of the next class, so that they are of all kinds
LEAST = 0.75  # share of all changes that must give the same image: what is refused proves nothing of the reading


@cache
def sweep(number: int) -> Sweep:
    """One class as it is, and some of its changes."""
    torch.set_num_threads(1)
    subject = SUBJECTS[number]
    with Comparison.of(subject) as comparison:
        every = comparison.mutations
        chosen = [every[(number * STRIDE + index * len(every) // COUNT) % len(every)] for index in range(COUNT)]
        changes = tuple(Change(one.kind, one.name, comparison.outcome(one)) for one in chosen)
        return Sweep(subject.pipeline, subject.task, comparison.as_it_is(), changes, len(every))


def test_every_class_is_a_subject() -> None:
    assert sorted(subject.pipeline for subject in SUBJECTS) == sorted([*PIPELINES, *SAME])


@pytest.mark.parametrize("number", range(len(SUBJECTS)), ids=[subject.pipeline for subject in SUBJECTS])
def test_no_change_gives_another_image_without_a_word(number: int) -> None:
    found = sweep(number)
    assert found.unchanged.what == Outcome.SAME, found.unchanged.how
    assert found.total > 70
    assert not found.wrong()


def test_most_changes_give_the_same_image() -> None:
    found = [sweep(number).counts()[Outcome.SAME] for number in range(len(SUBJECTS))]
    assert sum(found) >= LEAST * COUNT * len(SUBJECTS)


def comparison(pipeline: str) -> AbstractContextManager[Comparison]:
    return Comparison.of(next(subject for subject in SUBJECTS if subject.pipeline == pipeline))


def change(found: Comparison, name: str) -> Mutation:
    return next(one for one in found.mutations if one.name == name)


def test_a_misreading_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with comparison("DDIMPipeline") as found:
        monkeypatch.setattr(compare, "_ours", lambda *_: found.unchanged)
        other = found.outcome(change(found, "scheduler/scheduler_config.json: prediction_type='sample'"))
    assert other.what == Outcome.DIFFERENT and "a build goes through" in other.how


def test_what_diffusers_alone_takes_is_counted_for_classes_of_pictures_too() -> None:
    with comparison("StableDiffusionInpaintPipeline") as found:
        outcome = found.outcome(change(found, "vae/config.json: use_quant_conv=False"))
    assert outcome.what == Outcome.REFUSED and "tensors" in outcome.how


def test_the_page_says_what_was_compared() -> None:
    found = [sweep(number) for number in range(2)]
    total = sum(one.total for one in found)
    assert f"here {2 * COUNT} of {total} changes were compared, one of 90 of each class" in page(found, 90, "1.0")
    changes = (Change("a kind", "b", Outcome(Outcome.DIFFERENT, "c")),)
    text = page([Sweep("APipeline", "", Outcome(Outcome.SAME), changes, 1)], 1, "1.0")
    assert "all 1 changes were compared" in text and "- `APipeline`, b: silently different, c\n" in text
