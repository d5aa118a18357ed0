"""Repositories of the hub in place of paths: the real huggingface_hub against a server that speaks the hub's API.

Each call is an interpreter of its own, since huggingface_hub reads its environment once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from exporter import checkpoint, ensemble, repository
from exporter.ensemble import Origin
from exporter.repository import Repository
from runtimes.errors import DexportError
from tests.hub_server import TOKEN, Hub, serve

ROOT = Path(__file__).parents[2]
RESOLVE = """
import json, sys
from exporter import repository
from runtimes.errors import DexportError
place, options = json.loads(sys.argv[1])
try:
    path = repository.resolve(place, **options)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    print(json.dumps({"path": str(path), "names": names, "of": repository.of(path / "x")}))
except DexportError as error:
    print(json.dumps({"error": str(error)}))
"""
THEIRS = """
import json, pathlib, sys
from diffusers import DiffusionPipeline
place, options = json.loads(sys.argv[1])
path = pathlib.Path(DiffusionPipeline.download(place, use_safetensors=True, **options))
print(json.dumps({"names": sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def call(program: str, hub: Hub, home: Path, place: str, more: dict[str, str] | None = None, **options: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([place, options])], cwd=ROOT, capture_output=True, text=True,
        env=environment(hub, home, **more or {}), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refusal(hub: Hub, home: Path, place: str, more: dict[str, str] | None = None, **options: Any) -> str:
    found = call(RESOLVE, hub, home, place, more, **options)
    assert "\n" not in found["error"]
    return str(found["error"])


def published(tiny_sd: Path, folder: Path) -> Path:
    """A checkpoint as repositories are: several variants, one in shards, pickles and the files of other programs."""
    shutil.copytree(tiny_sd, folder)
    (folder / "tokenizer" / "special_tokens_map.json").write_text("{}")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    save_file(text, folder / "text_encoder" / "model.fp16.safetensors")
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(unet)
    halves = {
        f"diffusion_pytorch_model.fp16-0000{1 + i}-of-00002.safetensors": part
        for i, part in enumerate((names[::2], names[1::2]))
    }
    for name, part in halves.items():
        save_file({key: unet[key] for key in part}, folder / "unet" / name)
    places = {key: name for name, part in halves.items() for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    for other in (
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack", "unet/model.onnx",
        "vae/model.onnx_data",
        "unet/openvino_model.xml", "unet/openvino_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors", "safety_checker/pytorch_model.bin", "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors", "README.md", "text_encoder/pytorch_model.bin", "vae_decoder/model.onnx",
    ):  # fmt: skip
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"something else")
    (folder / "safety_checker" / "config.json").write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_files_are_those_that_diffusers_chooses(variant: str | None, hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    """All that diffusers downloads but the safety checker, and nothing more: no pickle, no other program's files."""
    commit = hub.publish("org/tiny", published(tiny_sd, tmp_path / "published"))
    ours = call(RESOLVE, hub, tmp_path / "ours", "org/tiny", variant=variant)
    fetched = sorted(hub.fetched)
    theirs = call(THEIRS, hub, tmp_path / "theirs", "org/tiny", variant=variant, safety_checker=None)
    # Files of a flat repository of transformers' that diffusers takes at the top.
    assert ours["names"] == [name for name in theirs["names"] if name != "README.md"]
    assert len(set(fetched)) == len(fetched) and {name.removeprefix("org/tiny/") for name in fetched} == set(
        ours["names"]
    )
    assert ours["of"] == f"org/tiny@{commit}"
    assert any("fp16" in name for name in ours["names"]) == (variant is not None)
    assert not any(name.endswith((".bin", ".onnx", ".ckpt", ".msgpack", ".xml")) for name in ours["names"])


def test_the_cache_serves_without_a_network(hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    commit = hub.publish("org/tiny", tiny_sd)
    home, offline = tmp_path / "home", {"HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE is set" in (said := refusal(hub, home, "org/tiny", offline))
    assert 'with a network, download it: hf download org/tiny --include "*.json"' in said
    first = call(RESOLVE, hub, home, "org/tiny")
    hub.fetched.clear()
    for place in ("org/tiny", "org/tiny@main", f"org/tiny@{commit}"):
        assert call(RESOLVE, hub, home, place, offline) == first
    assert call(RESOLVE, hub, home, "org/tiny") == first and not hub.fetched  # nor is anything fetched twice
    (Path(first["path"]) / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "missing or not whole" in refusal(hub, home, "org/tiny", offline)
    hub.url = "http://127.0.0.1:9"  # where nothing listens
    said = refusal(hub, home, "org/tiny", variant="fp16")
    assert "http://127.0.0.1:9 cannot be reached" in said and "HF_HUB_OFFLINE=1 takes what its cache has" in said
    assert '--include "*.fp16.safetensors"' in said


def test_revisions_are_resolved(hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    old = hub.publish("org/tiny", tiny_sd, branch="v1")
    new = hub.publish("org/tiny", tiny_sd)
    for place, options, commit in (
        ("org/tiny", {}, new),
        ("org/tiny@v1", {}, old),
        ("org/tiny", {"revision": "v1"}, old),
        (f"org/tiny@{old}", {}, old),
    ):
        assert call(RESOLVE, hub, tmp_path, place, **options)["of"] == f"org/tiny@{commit}"
    assert "no revision 'v2'" in refusal(hub, tmp_path, "org/tiny@v2")
    assert "two revisions" in refusal(hub, tmp_path, "org/tiny@v1", revision="main")


def test_what_the_hub_refuses_is_said(hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    hub.publish("org/gated", tiny_sd, gated=True)
    hub.publish("org/private", tiny_sd, private=True)
    hub.publish("org/loras", {"a.safetensors": b"1", "b.safetensors": b"2", "c.ckpt": b"3"})
    hub.publish("org/pickles", {**{p.relative_to(tiny_sd).as_posix(): p.read_bytes() for p in tiny_sd.rglob("*.json")},
                                "text_encoder/pytorch_model.bin": b"x"})  # fmt: skip
    hub.publish("org/wan", {"model_index.json": b'{"_class_name": "WanPipeline"}', "unet/x.safetensors": b"1" * 9999})
    hub.publish(
        "org/control",
        {"config.json": b'{"_class_name": "ControlNetModel"}', "diffusion_pytorch_model.safetensors": b"x"},
    )
    for place, words in (
        ("org/gated", f"accept its licence at {hub.url}/org/gated, and set HF_TOKEN"),
        ("org/private", f"no such file or folder here, and no such repository on {hub.url}, or a private one"),
        ("org/nothing", "no such repository"),
        ("org/loras", "no model_index.json; to take one file of it, name that, like org/loras/a.safetensors"),
        ("org/loras/d.safetensors", "the repository holds no 'd.safetensors'; it holds 'a.safetensors'"),
        ("org/loras/c.ckpt", "a pickle"),
        ("org/pickles", "text_encoder has no .safetensors weights, only pytorch_model.bin, a pickle"),
        ("org/wan", "WanPipeline"),
    ):
        assert words in refusal(hub, tmp_path / "home", place)
    assert "a whole checkpoint; name the folder" in refusal(
        hub, tmp_path / "home", "org/gated", {"HF_TOKEN": TOKEN}, component=True
    )
    assert "no weights of the variant 'fp16'" in refusal(
        hub, tmp_path / "home", "org/private", {"HF_TOKEN": TOKEN}, variant="fp16"
    )
    assert not any(name.endswith(".safetensors") for name in hub.fetched)  # all of it before a large file
    for place in ("org/gated", "org/private"):
        assert call(RESOLVE, hub, tmp_path / "home", place, {"HF_TOKEN": TOKEN})["names"]
    # Of a component in a checkpoint's place its configuration is enough to say what it is.
    assert call(RESOLVE, hub, tmp_path / "home", "org/control")["names"] == ["config.json"]
    hub.broken = 503
    said = refusal(hub, tmp_path / "home", "org/gated")
    assert "the hub answers with an error (503)" in said or "cannot be reached" in said


def test_files_and_folders_inside_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(
        "org/many",
        {
            "style.safetensors": b"1", "models/encoder/config.json": b"{}", "models/encoder/model.safetensors": b"2",
            "models/encoder/pytorch_model.bin": b"3", "models/other.safetensors": b"4",
        },
    )  # fmt: skip
    found = call(RESOLVE, hub, tmp_path, "org/many/style.safetensors")
    assert found["path"].endswith(f"models--org--many/snapshots/{commit}/style.safetensors")
    found = call(RESOLVE, hub, tmp_path, "org/many/models/encoder@main", component=True)
    assert found["names"] == ["config.json", "model.safetensors"]
    assert sorted(hub.fetched) == [f"org/many/{name}" for name in (
        "models/encoder/config.json", "models/encoder/model.safetensors", "style.safetensors",
    )]  # fmt: skip


def test_a_build_says_where_its_files_are_from(hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    """By name and commit, in the manifest, and no path of this machine anywhere; so for a snapshot's folder."""
    commit = hub.publish("org/tiny", published(tiny_sd, tmp_path / "published"))
    words = [sys.executable, "-m", "dexport", "build", "--target", "onnxruntime", "--no-cache", "--json"]
    env = environment(hub, tmp_path / "home")
    done = subprocess.run(
        [*words, "org/tiny", "--revision", "main", "--variant", "fp16", "-o", str(tmp_path / "bundle")], cwd=ROOT,
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "bundle" / "dexport.json").read_text())["model"]["source"]
    assert {file["repository"] for file in source} == {f"org/tiny@{commit}"}
    assert "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors" in {file["path"] for file in source}
    for file in (tmp_path / "bundle").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()
    # The snapshot is a folder of links, and a checkpoint like any other.
    snapshot = tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / commit
    assert (snapshot / "unet" / "config.json").is_symlink()
    read = ensemble.read(Origin(snapshot, variant="fp16"))
    assert [
        {"path": f.path, "sha256": f.sha256, "size": f.size, "repository": f.repository} for f in read.source()
    ] == source
    assert {file.repository for file in checkpoint.read(tiny_sd).source()} == {None}


def test_every_path_may_be_a_repository(hub: Hub, tmp_path: Path) -> None:
    """LoRAs with their scale, networks with the name that their repository gives them, by one mechanism."""
    for name in ("org/base", "org/refiner"):
        hub.publish(name, {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'})
    hub.publish("org/files", {"style.safetensors": b"1", "ip.safetensors": b"2"})
    for name in ("org/Canny-net", "org/depth", "org/encoder", "org/motion"):
        hub.publish(name, {"config.json": b"{}", "model.safetensors": b"1"})
    program = """
import json, sys
from exporter import ensemble
place, options = json.loads(sys.argv[1])
made = ensemble.local(ensemble.Origin(place, **options))
print(json.dumps({name: made.__dict__[name] for name in made.__dict__}, default=str))
"""
    made = call(
        program, hub, tmp_path, "org/base@main", refiner="org/refiner", loras=["org/files/style.safetensors:0.5"],
        embeddings=["org/files/style.safetensors@main:<style>"], controls=["org/Canny-net", "d=org/depth@main"],
        ip_adapters=["org/files/ip.safetensors"], image_encoder="org/encoder", motion_adapter="org/motion",
        config="stable-diffusion-xl",
    )  # fmt: skip
    assert made["config"] == "stable-diffusion-xl" and made["path"].split("/")[-3] == "models--org--base"
    assert made["loras"][0].endswith("/style.safetensors:0.5")
    assert made["embeddings"][0].endswith("/style.safetensors:<style>")
    assert [text.partition("=")[0] for text in made["controls"]] == ["canny_net", "d"]
    assert made["ip_adapters"][0].startswith("ip=") and made["ip_adapters"][0].endswith("/ip.safetensors")
    for name in ("refiner", "image_encoder", "motion_adapter"):
        assert "/snapshots/" in made[name]


def test_what_is_here_is_taken_and_what_is_ambiguous_said(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, or a word to it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd, tmp_path / "org" / "name")
    assert repository.resolve("org/name") == Path("org/name")
    for place, options, words in (
        ("org/name@main", {}, "org/name is on this disk, and has no revisions; leave @main out"),
        ("org/name", {"revision": "main"}, "it is on this disk; leave --revision out"),
        ("name", {"revision": "main"}, "it is not one; leave --revision out"),
    ):
        with pytest.raises(DexportError, match=words):
            repository.resolve(place, **options)
    for place in ("name", "./org/other", "/org/name", "../org/name", "org/model.safetensors", "a//b/c", "org/x y", ""):
        assert Repository.parse(place) is None
    assert repository.resolve("org/model.safetensors") == Path(
        "org/model.safetensors"
    )  # whose reader says it is missing
    assert Repository.parse("org/name/a/b.safetensors@refs/pr/3") == Repository(
        "org/name", "a/b.safetensors", "refs/pr/3"
    )


def test_the_folder_of_a_cache_gets_a_hint(tmp_path: Path) -> None:
    folder, (old, new) = tmp_path / "models--org--name", ("0" * 40, "f" * 40)
    for place in ("blobs", "refs", "snapshots"):
        (folder / place).mkdir(parents=True)
    with pytest.raises(DexportError, match="holds no snapshot yet"):
        ensemble.read(folder)
    for commit in (old, new):
        (folder / "snapshots" / commit).mkdir()
    with pytest.raises(DexportError, match=f"give .*snapshots/{old} or another of its 2 commits"):
        ensemble.read(folder)
    (folder / "refs" / "main").write_text(new)
    for origin in (Origin(folder), Origin(tmp_path, refiner=folder), Origin(tmp_path, controls=[f"canny={folder}"])):
        with pytest.raises(DexportError, match=f"snapshots/{new}$"):
            ensemble.read(origin)


def test_variants_of_a_folder(tiny_sd: Path, tmp_path: Path) -> None:
    """A component without the variant gives its plain weights, as with diffusers; one that none has is refused."""
    folder = published(tiny_sd, tmp_path / "folder")
    for variant, words in (("fp16", ["model.fp16", ".fp16-00001"]), (None, ["model.safetensors", "model.safetensors"])):
        files = [name for name in checkpoint.read(folder, variant=variant).files if name.endswith(".safetensors")]
        assert words[0] in next(name for name in files if name.startswith("text_encoder"))
        assert words[1] in next(name for name in files if name.startswith("unet"))
        assert "vae/diffusion_pytorch_model.safetensors" in files
    with pytest.raises(DexportError, match="no weights of the variant 'bf16'; there is fp16"):
        checkpoint.read(folder, variant="bf16")


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.safetensors"], "fp16", ["model.safetensors"]),
        (["model.fp16.safetensors", "model.bf16.safetensors"], None, ["model.bf16.safetensors"]),
        (["model.ema.safetensors", "model.bin"], None, ["model.ema.safetensors"]),
        (["model-00001-of-00002.safetensors"], None, []),
        (["pytorch_model.bin", "openvino_model.bin"], None, []),
    ],
)
def test_one_set_of_weights(names: list[str], variant: str | None, chosen: list[str]) -> None:
    assert repository.weight_files(names, variant) == chosen


def test_a_full_disk_is_said() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(DexportError, match="is full; make room, or set HF_HOME"),
        repository._explained(Repository("org/name"), None),
    ):
        raise error
