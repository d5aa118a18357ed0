"""Tiny checkpoints, each built once for the backends that run on a CPU, gate included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.dexport.conftest import say  # noqa: F401  # a fixture
from tests.families import small_flow, small_transformers
from tests.families.harness import Built, build_all
from tests.families.small import WRITERS

TRANSFORMERS = {**small_flow.WRITERS, **small_transformers.WRITERS}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds a checkpoint of ``WRITERS`` by its name."""

    @cache
    def made(name: str) -> Built:
        folder = tmp_path_factory.mktemp(name)
        WRITERS[name](folder / "checkpoint")
        return build_all(folder / "checkpoint", folder)

    return made


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a transformer by the name of its writer, made once."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        TRANSFORMERS[name](folder)
        return folder

    return made


@pytest.fixture
def changed(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a checkpoint of which one file says something else."""

    def make(name: str, file: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(saved(name), tmp_path / name))
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
        return folder

    return make
