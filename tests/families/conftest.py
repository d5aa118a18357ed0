"""Tiny checkpoints, each built once for the backends that run on a CPU, gate included."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.dexport.conftest import say  # noqa: F401  # a fixture
from tests.families.harness import Built, build_all
from tests.families.small import WRITERS


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds a checkpoint of ``WRITERS`` by its name."""

    @cache
    def made(name: str) -> Built:
        folder = tmp_path_factory.mktemp(name)
        WRITERS[name](folder / "checkpoint")
        return build_all(folder / "checkpoint", folder)

    return made
