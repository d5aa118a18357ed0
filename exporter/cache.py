"""The compile cache: results by a key of everything that they depend on, believed only while their hashes fit.

An entry is a folder ``<cache>/<key>`` with the compiled files and ``entry.json``. It appears whole, by a rename; one
that is damaged is removed and built anew. Deleting any entry, or all, is safe at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache as memoize
from pathlib import Path

from runtimes import bundle
from runtimes.errors import DexportError
from runtimes.manifest import File, Graph, from_json, to_json

ENTRY = "entry.json"
DAY = 24 * 60 * 60  # seconds
ROOT = Path(__file__).resolve().parent.parent
CODE = ("exporter/compile/*.py", "calibration/*.py")  # the sources whose change may change a result


@dataclass(frozen=True)
class Entry:
    """The compiled graph, its file named relative to the entry's own folder, its files, and the hash of all that."""

    graph: Graph
    files: tuple[File, ...]
    seal: str = ""

    def sealed(self) -> Entry:
        """The entry with the hash that it must have."""
        text = to_json(replace(self, seal=""))
        return replace(self, seal=hashlib.sha256(text.encode()).hexdigest())


def key(
    source: Path, graph: Graph, target: str, precision: str, max_batch: int, depends_on: str,
    islands: Collection[str] = frozenset(),
) -> str:  # fmt: skip
    """The sha256, in hex, of everything that a compiled graph depends on: weights, shapes, flags, versions, code."""
    parts = {
        "onnx": {path.name: bundle.hash_file(path) for path in (source, *external_files(source))},
        "graph": {name: value for name, value in asdict(graph).items() if name != "file"},
        "target": target,
        "precision": precision,
        "max_batch": max_batch,
        "depends_on": depends_on,
        "islands": sorted(islands),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def external_files(source: Path) -> list[Path]:
    """The files beside an ONNX file that hold its weights; one outside of its folder is refused."""
    import onnx_ir as ir

    tensors = (value.const_value for value in ir.load(source).graph.initializers.values())
    locations = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for location in sorted(locations):
        path = source.parent / location
        if path.is_symlink() or path.resolve().parent != source.parent.resolve() or not path.is_file():
            raise DexportError(f"{source}: its weights should lie in {location!r}, which is no file beside it")
    return [source.parent / location for location in sorted(locations)]


def fetch(cache: Path, key: str, output: Path) -> Graph | None:
    """Copy an entry's files into ``output`` and return its graph; None if there is none or it was damaged."""
    folder = cache / key
    if not folder.is_dir():
        return None
    try:
        entry = from_json(Entry, (folder / ENTRY).read_text(encoding="utf-8"), str(folder / ENTRY))
        if entry != entry.sealed():
            raise DexportError(f"{folder}: {ENTRY} is damaged")
        present = {path.name for path in folder.iterdir()}
        if present != {ENTRY, *(file.path for file in entry.files)}:
            raise DexportError(f"{folder}: a file is missing or too many")
        for file in entry.files:
            shutil.copyfile(folder / file.path, output / file.path)
        if bundle.list_files(output) != entry.files:  # of the copies, since it is these that are used
            raise DexportError(f"{folder}: a file is damaged")
    except (DexportError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in bundle.NO_SPACE:
            raise  # the output's disk, not the entry, is at fault
        shutil.rmtree(folder, ignore_errors=True)
        for path in output.iterdir():
            path.unlink()
        return None
    return replace(entry.graph, file=f"{output.name}/{entry.graph.file}")


def store(cache: Path, key: str, output: Path, graph: Graph) -> None:
    """Keep the files of ``output`` as the entry ``key``."""
    partial: Path | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        partial = Path(tempfile.mkdtemp(prefix=".partial.", dir=cache))
        files = bundle.list_files(output)
        for file in files:
            shutil.copyfile(output / file.path, partial / file.path)
        entry = Entry(replace(graph, file=graph.file.removeprefix(f"{output.name}/")), files)
        (partial / ENTRY).write_text(to_json(entry.sealed()), encoding="utf-8")
        partial.rename(cache / key)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return  # another process has published the same entry meanwhile
        raise DexportError(f"{cache}: cannot keep what was compiled there ({error.strerror})") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what writers that were killed have left; one that is a day old is nobody's any more."""
    for partial in cache.glob(".partial.*"):
        with suppress(OSError):  # another process may be sweeping too
            if time.time() - partial.stat().st_mtime > DAY:
                shutil.rmtree(partial, ignore_errors=True)


@memoize
def _code() -> str:
    """A hash of dexport's own compiling code: its change makes old entries unreachable, without a number to raise."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
