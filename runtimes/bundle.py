"""Bundles on disk: publish one whole or not at all, and believe no byte of one before its hash fits.

docs/bundle-format.md is the specification.
"""

from __future__ import annotations

import errno
import hashlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from runtimes import strict_json
from runtimes.check import check_manifest
from runtimes.errors import DexportError, IntegrityError, Progress, silent
from runtimes.manifest import File, Manifest, Model, from_json

MANIFEST, SIGNATURE, GOLDEN = "dexport.json", "dexport.sig", "golden.safetensors"
HUB = "hub.json"
FORMAT: Literal["dexport-bundle"] = "dexport-bundle"
VERSION = 1
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def list_files(folder: Path, without: Iterable[str] = ()) -> tuple[File, ...]:
    """Return every file below ``folder`` but those named, sorted by path; links and special files are errors."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError(f"{folder}: {name} is a link or a special file, which a bundle must not hold")
        if path.is_file() and name not in without:
            found.append(File(name, path.stat().st_size, hash_file(path)))
    return tuple(found)


@contextmanager
def publish(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder beside ``output`` to write into; it becomes ``output`` if all goes well, else it is removed.

    An existing ``output`` is replaced only with ``overwrite``, and only if it is empty or all in it is of dexport's
    making. A full disk becomes a DexportError.
    """
    output = output.absolute()
    check_free(output, overwrite)
    missing = [parent for parent in output.parents if not parent.exists()]
    # Named before they exist, so that an interrupt at any moment finds what to remove and what to put back.
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    old = partial.with_name(f"{partial.name}.old")
    try:
        _make(partial, output)
        yield partial
        check_free(output, overwrite)  # again: it may have come while we worked
        if output.exists():
            output.rename(old)
        partial.rename(output)
    except BaseException as error:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:  # the deepest first: leave nothing behind that was not there
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError) and _no_space(error):
            raise DexportError(f"{output}: the disk is full; free some space and run it again") from error
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _make(folder: Path, output: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DexportError(f"{output}: cannot be written there ({error.strerror}); choose another output") from error


def _no_space(error: OSError) -> bool:
    # numpy's tofile forgets the errno of a write that was cut short: "16640 requested and 250 written".
    return error.errno in NO_SPACE or (error.errno is None and "requested and" in str(error))


def check_free(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise DexportError if ``output`` may not be written: it is in use, or touches one of ``inputs``."""
    place = output.resolve()
    for source in inputs:
        other = source.resolve()
        if place == other or place in other.parents or other in place.parents:
            raise DexportError(f"{output}: is or holds or lies in the input {source}; choose another output")
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise DexportError(f"{output}: there is a file or a link of this name; choose another output")
    if not any(output.iterdir()):
        return
    if strangers := sorted(_files(output) - _made(output)):
        raise DexportError(f"{output}: holds {strangers[0]}, which dexport did not make; choose another output")
    if not overwrite:
        raise DexportError(f"{output}: exists; choose another output or replace it with --overwrite")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def _made(folder: Path) -> set[str]:
    """The files of a bundle or a hub, by its own manifest; none where there is no manifest that can be read."""
    try:
        if (folder / MANIFEST).is_file():
            manifest = from_json(Manifest, (folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST))
            return {MANIFEST, SIGNATURE, *(file.path for file in manifest.files)}
        model = from_json(Model, (folder / HUB).read_text(encoding="utf-8"), str(folder / HUB))
    except (OSError, ValueError, DexportError):
        return set()
    graphs = {graph.file for graph in model.graphs.values()}
    return {HUB, *graphs, *(f"{file}.data" for file in graphs), *(tokenizer.file for tokenizer in model.tokenizers)}


def load_manifest(folder: Path, *, check: bool = True, progress: Progress = silent) -> Manifest:
    """Read a bundle's manifest; with ``check``, compare every file's size and sha256 with it first.

    Raises DexportError for what is no bundle, of a newer format or makes no sense (``runtimes.check``), IntegrityError
    for a changed, missing or extra file.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise DexportError(f"{folder}: no such folder")
    if not file.is_file():
        raise DexportError(f"{folder}: not a bundle: it has no {MANIFEST}; make one with: dexport build")
    try:
        text = file.read_text(encoding="utf-8")
        head = strict_json.loads(text)
    except ValueError as error:
        raise DexportError(f"{file}: not valid JSON ({error}); build the bundle anew") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise DexportError(f"{file}: not a manifest of a {FORMAT}")
    if head.get("version") != VERSION:
        raise DexportError(f"{file}: format version {head.get('version')!r}; this dexport reads version {VERSION}")
    manifest = from_json(Manifest, text, str(file))
    check_manifest(manifest, str(file))
    _check_listed(manifest, file)
    if check:
        _check_files(folder, manifest, progress)
    return manifest


def _check_listed(manifest: Manifest, where: Path) -> None:
    """Every file that the bundle needs must be listed, once, with its hash."""
    listed = {file.path for file in manifest.files}
    if len(listed) != len(manifest.files):
        raise IntegrityError(f"{where}: lists a file twice")
    used = [GOLDEN] if manifest.self_test is not None else []
    used += [graph.file for graph in manifest.model.graphs.values()]
    used += [tokenizer.file for tokenizer in manifest.model.tokenizers]
    for path in used:
        if path not in listed:
            raise IntegrityError(f"{where}: uses {path!r} but does not list it")


def _check_files(folder: Path, manifest: Manifest, progress: Progress) -> None:
    expected = {file.path: file for file in manifest.files}
    present = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError(f"{folder}: {name} is a link or a special file; copy the bundle again")
        if path.is_file():
            present.add(name)
    if extra := sorted(present - set(expected) - {MANIFEST, SIGNATURE}):
        raise IntegrityError(f"{folder}: {extra[0]} does not belong to the bundle; remove it or copy the bundle again")
    if missing := sorted(set(expected) - present):
        raise IntegrityError(f"{folder}: {missing[0]} is missing; copy the bundle again")
    total, done = sum(file.size for file in manifest.files) or 1, 0
    for name, file in expected.items():
        size = (folder / name).stat().st_size
        if size != file.size:
            raise IntegrityError(f"{folder}: {name} has {size} bytes instead of {file.size}; copy the bundle again")
        if hash_file(folder / name) != file.sha256:
            raise IntegrityError(f"{folder}: {name} is not what was built (its sha256 differs); copy the bundle again")
        done += file.size
        progress(f"checking {name}", done / total)
