"""One bundle for all tests of the face, and a way to say a command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Said:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be JSON and nothing else."""
        return json.loads(self.out)


Say = Callable[..., Said]


@pytest.fixture(scope="session")
def say() -> Say:
    """Say words to the command in this process; an exception that is a bug of ours fails the test with its trace."""
    from dexport.cli import main

    def call(*words: object) -> Said:
        result = CliRunner().invoke(main, [str(word) for word in words], prog_name="dexport")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def say_fresh() -> Say:
    """Say words to the command in a fresh interpreter, after running ``first`` (Python code) in it."""

    def call(*words: object, first: str = "") -> Said:
        code = f"{first}\nfrom dexport.cli import main\nmain({[str(word) for word in words]!r}, prog_name='dexport')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
        return Said(done.returncode, done.stdout, done.stderr)

    return call


def environment() -> dict[str, str]:
    """Ours, without what would change the command's output."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("DEXPORT_", "COLUMNS"))}


@dataclass(frozen=True)
class Workshop:
    """A checkpoint, its hub and its ONNX Runtime bundle, and what ``build --json`` said of it."""

    checkpoint: Path
    hub: Path
    bundle: Path
    said: Said


@pytest.fixture(scope="session")
def workshop(say: Say, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Built once by the command line itself."""
    folder = tmp_path_factory.mktemp("workshop")
    said = say(
        "build", tiny_sd, "--target", "onnxruntime", "-o", folder / "bundle", "--keep-hub", folder / "hub",
        "--cache", folder / "cache", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    return Workshop(tiny_sd, folder / "hub", folder / "bundle", said)


@pytest.fixture
def copy_bundle(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(workshop.bundle, tmp_path / "copy"))
