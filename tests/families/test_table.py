"""docs/families.md is what the families' small checkpoints say, and knows every pipeline class of diffusers."""

from __future__ import annotations

from pathlib import Path

from exporter.families import PIPELINES, SAME
from tests.families import table


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run: python -m tests.families.table"
    assert set(PIPELINES) | set(SAME) <= set(table.classes())


def test_each_class_is_compared_with_diffusers() -> None:
    """By a test that names it, or writes its checkpoint."""
    written = "".join(file.read_text() for file in Path(__file__).parent.glob("*.py") if file.name != "table.py")
    assert not [name for name in PIPELINES if name not in written]
