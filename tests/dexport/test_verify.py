"""``verify`` runs the whole pipeline: a wrong table, tokenizer, guidance or scheduler fails on the device too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest

from runtimes.bundle import MANIFEST, hash_file
from runtimes.verify import RUN, verify
from tests.dexport.conftest import Say


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, as someone would who can change the hashes too."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    for file in manifest["files"]:
        file["size"], file["sha256"] = (bundle / file["path"]).stat().st_size, hash_file(bundle / file["path"])
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def failed(bundle: Path) -> set[str]:
    return {f"{check.graph}: {check.output.partition(' after')[0]}" for check in verify(bundle) if not check.passed}


def test_a_right_bundle_passes_with_its_run(copy_bundle: Path) -> None:
    checks = verify(copy_bundle)
    assert all(check.passed for check in checks)
    run = [check.output for check in checks if check.graph == RUN]
    assert run == ["tokens of tokens", *(f"latents after step {step}" for step in range(1, 4))]


def stage(manifest: dict[str, Any]) -> Any:
    return manifest["model"]["stages"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: stage(manifest)["scheduler"].update(beta_end=0.02),
        lambda manifest: stage(manifest)["scheduler"].update(_class_name="EulerDiscreteScheduler"),
        lambda manifest: stage(manifest)["guidance"].update(scale=5.0),
        lambda manifest: stage(manifest)["guidance"].update(empty="zeros"),
    ],
    ids=["betas", "scheduler", "guidance", "empty prompt"],
)
def test_a_manifest_that_says_something_else_fails(copy_bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(copy_bundle, change)
    assert failed(copy_bundle) == {f"{RUN}: latents"}


def test_a_tokenizer_with_other_ids_fails(copy_bundle: Path) -> None:
    """The words of the vocabulary in reverse, the marks at their places."""
    file = copy_bundle / "tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("<|")]
    tokenizer["model"]["vocab"] = vocabulary | {
        word: vocabulary[other] for word, other in zip(words, reversed(words), strict=True)
    }
    file.write_text(json.dumps(tokenizer))
    edit(copy_bundle, lambda manifest: None)
    assert failed(copy_bundle) == {f"{RUN}: tokens of tokens", f"{RUN}: latents"}


@pytest.mark.parametrize("change", [{"normalizer": None}, {"pre_tokenizer": None}])
def test_a_tokenizer_that_reads_unusual_words_in_another_way_fails(copy_bundle: Path, change: dict[str, Any]) -> None:
    """The run's own prompt, in small letters with single spaces, may have the same tokens."""
    file = copy_bundle / "tokenizer/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    edit(copy_bundle, lambda manifest: None)
    assert f"{RUN}: tokens of tokens" in failed(copy_bundle)


def test_embeddings_of_words_that_are_lost_fail(copy_bundle: Path) -> None:
    """All but those of the marks, which are all that an empty prompt has."""
    file = copy_bundle / "text/model.onnx"
    model = onnx.load(file)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("token_embedding.weight"))
    values = onnx.numpy_helper.to_array(table).copy()
    values[:-2] = 0
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    external = [path for path in file.parent.iterdir() if path != file]
    onnx.save(model, file)
    edit(copy_bundle, lambda manifest: manifest["files"].__setitem__(
        slice(None), [item for item in manifest["files"] if copy_bundle / item["path"] not in external]
    ))  # fmt: skip
    for path in external:
        path.unlink()
    assert {"text: encoder_hidden_states", f"{RUN}: latents"} <= failed(copy_bundle)


def test_the_command_names_what_failed(say: Say, copy_bundle: Path) -> None:
    edit(copy_bundle, lambda manifest: stage(manifest)["guidance"].update(scale=5.0))
    said = say("verify", copy_bundle)
    assert said.code == 1 and "latents after step 1" in said.out and "MISSED" in said.out
    told = say("verify", copy_bundle, "--json").json
    assert told["passed"] is False and {check["graph"] for check in told["checks"] if not check["passed"]} == {RUN}
