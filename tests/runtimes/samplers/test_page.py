"""docs/samplers.md is what docs/samplers.py writes, and knows every scheduler class of the installed diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runtimes.samplers import CLASSES

SCRIPT = Path(__file__).parents[3] / "docs" / "samplers.py"


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("samplers_page", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/samplers.py"
    assert set(script.EXCEPT) <= set(CLASSES) <= set(script.every_class())
    assert "unknown" not in {script.state(name) for name in script.every_class()}
