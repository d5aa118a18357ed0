"""Some of the changes of some classes; ``make oracle`` has all of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exactness.compare import SUBJECTS, Outcome, compare
from tests.exactness.mutations import mutations

EVERY = 16
CHOSEN = ("DDIMPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


@pytest.mark.parametrize("subject", [one for one in SUBJECTS if one.pipeline in CHOSEN], ids=lambda one: one.pipeline)
def test_no_change_gives_another_image_without_a_word(subject: object, tmp_path: Path) -> None:
    subject.make(tmp_path / "checkpoint")  # type: ignore[attr-defined]
    assert compare(subject, tmp_path / "checkpoint", None).what == Outcome.SAME  # type: ignore[arg-type]
    every = list(mutations(tmp_path / "checkpoint"))
    assert len(every) > 40
    found = {one.name: compare(subject, tmp_path / "checkpoint", one) for one in every[::EVERY]}  # type: ignore[arg-type]
    assert not {name: outcome for name, outcome in found.items() if outcome.what == Outcome.DIFFERENT}
    assert any(outcome.what == Outcome.SAME for outcome in found.values())
