"""Tiny checkpoints, each built once for the backends that run on a CPU, gate included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from exporter.build import build
from runtimes.pipeline import Pipeline
from tests.dexport.conftest import say  # noqa: F401  # a fixture
from tests.families.small import WRITERS


@dataclass(frozen=True)
class Built:
    """Where a checkpoint, its hub and its bundles are."""

    checkpoint: Path
    hub: Path
    bundles: dict[str, Path]  # by backend, in fp32

    def pipeline(self, backend: str) -> Pipeline:
        """The bundle of a backend, its files checked."""
        return Pipeline.load(self.bundles[backend])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds a checkpoint of ``WRITERS`` by its name."""

    @cache
    def made(name: str) -> Built:
        folder = tmp_path_factory.mktemp(name)
        WRITERS[name](folder / "checkpoint")
        backends = ("onnxruntime", "openvino")
        build(folder / "checkpoint", folder / "bundles", targets=backends, keep_hub=folder / "hub")
        bundles = {backend: folder / "bundles" / f"{backend}-fp32" for backend in backends}
        return Built(folder / "checkpoint", folder / "hub", bundles)

    return made
