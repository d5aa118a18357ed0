"""A bundle is whole or absent, and a changed byte, a missing or an extra file is seen before anything is opened."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtimes import bundle
from runtimes.errors import DexportError, IntegrityError
from runtimes.manifest import Graph, Guidance, Manifest, Model, Stage, Tensor, Tokenizer, from_json, to_json


def make(folder: Path, content: bytes = b"\x08\x0a" * 100) -> Manifest:
    """Write a bundle whose graphs are no graphs: these tests are about files."""
    for name in ("text", "denoiser"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.onnx").write_bytes(content)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    sample = Tensor("sample", "float32", ("batch", 4, 8, 8))
    timestep = Tensor("timestep", "float32", ("batch",))
    tokens, states = Tensor("tokens", "int64", ("batch", 77)), Tensor("states", "float32", ("batch", 77, 8))
    ids = Tensor("ids", "float32", ("batch", 2))
    stage = Stage(
        "base", "denoiser", "text", None, None, (4, 8, 8), 4, {"_class_name": "DDIMScheduler"}, Guidance("cfg", 7.5),
        20, {"ids": [1, 2.5]},
    )  # fmt: skip
    output = (replace(sample, name="output"),)
    graphs = {
        "text": Graph("text", "text/model.onnx", (tokens,), (states,)),
        "denoiser": Graph("denoiser", "denoiser/model.onnx", (sample, timestep, states, ids), output, {"k": "v"}),
    }
    tokenizers = (Tokenizer("tokenizer/tokenizer.json", "tokens", 77, 49407),)
    model = Model("stable-diffusion", "StableDiffusionPipeline", graphs, tokenizers, (stage,), ())
    files, accuracy = bundle.list_files(folder), {"gate": "not run", "why": "these are no graphs"}
    manifest = Manifest(
        bundle.FORMAT, bundle.VERSION, "onnxruntime", "fp32", model, {}, {"numpy": "2"}, files, accuracy
    )
    (folder / bundle.MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(folder: Path, change: object) -> None:
    data = json.loads((folder / bundle.MANIFEST).read_text())
    change(data)  # type: ignore[operator]
    (folder / bundle.MANIFEST).write_text(json.dumps(data))


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = make(tmp_path / "bundle")
    assert bundle.load_manifest(tmp_path / "bundle") == manifest
    assert to_json(from_json(Manifest, to_json(manifest), "x")) == to_json(manifest)


def test_hashes_are_sha256(folder: Path) -> None:
    file = folder / "denoiser/model.onnx"
    assert bundle.hash_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_flipped_bit_is_seen(folder: Path) -> None:
    file = folder / "denoiser/model.onnx"
    content = bytearray(file.read_bytes())
    content[57] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"denoiser/model\.onnx is not what was built"):
        bundle.load_manifest(folder)
    assert bundle.load_manifest(folder, check=False).precision == "fp32"


def test_a_short_a_missing_and_an_extra_file_are_seen(folder: Path) -> None:
    file = folder / "denoiser/model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="has 199 bytes instead of 200"):
        bundle.load_manifest(folder)
    file.unlink()
    with pytest.raises(IntegrityError, match=r"denoiser/model\.onnx is missing"):
        bundle.load_manifest(folder)
    file.write_bytes(whole)
    (folder / "denoiser/other.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"denoiser/other\.onnx does not belong"):
        bundle.load_manifest(folder)


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "denoiser/model.onnx"
    file.rename(tmp_path / "elsewhere.onnx")
    file.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="is a link"):
        bundle.load_manifest(folder)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "c:/x", "./a", "a//b", ".", "", "a\0b", "a\nb", "\ud800"]
)
def test_paths_must_stay_inside(folder: Path, path: str) -> None:
    edit(folder, lambda data: data["files"].append({"path": path, "size": 0, "sha256": ""}))
    with pytest.raises(IntegrityError, match="not a plain path inside its folder"):
        bundle.load_manifest(folder)


def test_a_graph_must_be_listed(folder: Path) -> None:
    edit(folder, lambda data: data["model"]["graphs"]["denoiser"].update(file="denoiser/hidden.onnx"))
    with pytest.raises(IntegrityError, match=r"uses 'denoiser/hidden\.onnx' but does not list it"):
        bundle.load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=99), "format version 99; this dexport reads version 1"),
        (lambda data: data.update(format="zip"), "not a manifest"),
        (lambda data: data.pop("precision"), "'precision' is missing"),
        (lambda data: data.update(colour="red"), "'colour' is unknown"),
        (lambda data: data["model"]["stages"][0].update(steps="many"), r"stages\[0\]: steps: 'many'"),
        (lambda data: data["model"]["stages"][0].update(steps=True), r"steps: True"),
        (lambda data: data["model"]["stages"][0]["guidance"].update(kind="magic"), "kind: 'magic'"),
        (lambda data: data["files"][0].update(size=1.5), "size: 1.5"),
    ],
)
def test_a_wrong_manifest_is_one_clear_line(folder: Path, change: object, message: str) -> None:
    edit(folder, change)
    with pytest.raises(DexportError, match=message) as error:
        bundle.load_manifest(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="no such folder"):
        bundle.load_manifest(tmp_path / "nothing")
    with pytest.raises(DexportError, match="not a bundle"):
        bundle.load_manifest(tmp_path)
    (tmp_path / bundle.MANIFEST).write_text('{"format": "zip"}')
    with pytest.raises(DexportError, match="not a manifest"):
        bundle.load_manifest(tmp_path)
    (tmp_path / bundle.MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(DexportError, match="not valid JSON"):
        bundle.load_manifest(tmp_path)


def test_publishing_is_all_or_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep/er/bundle"
    with pytest.raises(KeyboardInterrupt), bundle.publish(output) as partial:
        (partial / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with bundle.publish(output) as partial:
        assert not output.exists()
        make(partial)
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]
    with pytest.raises(DexportError, match="--overwrite"), bundle.publish(output):
        pass
    first = (output / bundle.MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="late"), bundle.publish(output, overwrite=True) as partial:
        raise ValueError("late")
    assert (output / bundle.MANIFEST).read_bytes() == first
    with bundle.publish(output, overwrite=True) as partial:
        make(partial, b"second")
    assert (output / "denoiser/model.onnx").read_bytes() == b"second"
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_an_interrupt_between_the_two_renames_puts_the_old_bundle_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target) == folder and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    first = (folder / bundle.MANIFEST).read_bytes()
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), bundle.publish(folder, overwrite=True) as partial:
        make(partial, b"second")
    assert (folder / bundle.MANIFEST).read_bytes() == first
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_what_came_while_we_worked_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(DexportError, match="precious"), bundle.publish(output, overwrite=True) as partial:
        make(partial)
        output.mkdir()
        (output / "precious.txt").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "precious.txt"]


def test_a_bundle_with_a_stranger_in_it_is_not_replaced(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DexportError, match=r"notes\.txt, which dexport did not make"):
        bundle.check_free(folder, overwrite=True)


@pytest.mark.parametrize("output", [".", "deeper/out", ".."])
def test_an_output_never_touches_its_input(folder: Path, output: str) -> None:
    with pytest.raises(DexportError, match="is or holds or lies in the input"):
        bundle.check_free(folder / output, True, [folder])


def test_a_folder_of_others_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DexportError, match="did not make"), bundle.publish(tmp_path, overwrite=True):
        pass
    with pytest.raises(DexportError, match="a file or a link of this name"), bundle.publish(tmp_path / "thesis.tex"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="the disk is full"), bundle.publish(tmp_path / "bundle"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
