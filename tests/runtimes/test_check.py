"""A manifest that was tampered with, or that makes no sense, is one clear line before anything is done by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import hub
from runtimes import bundle
from runtimes.errors import DexportError
from runtimes.manifest import to_json
from tests.runtimes.test_bundle import make

Change = Callable[[dict[str, Any]], object]


def graph(name: str, **changes: Any) -> Change:
    return lambda model: model["graphs"][name].update(changes)


def stage(**changes: Any) -> Change:
    return lambda model: model["stages"][0].update(changes)


def scheduler(**changes: Any) -> Change:
    return lambda model: model["stages"][0]["scheduler"].update(changes)


def tokenizer(**changes: Any) -> Change:
    return lambda model: model["tokenizers"][0].update(changes)


def rename(name: str) -> Change:
    """Give the text graph another name, all the rest fitting."""

    def change(model: dict[str, Any]) -> None:
        model["graphs"][name] = model["graphs"].pop("text")
        model["graphs"][name]["file"] = f"{name}/model.onnx"
        model["stages"][0]["text"] = name

    return change


def first(owner: str, **changes: Any) -> Change:
    """Change the first input of a graph."""
    return lambda model: model["graphs"][owner]["inputs"][0].update(changes)


def spare(kind: str, taken: str, given: str) -> Change:
    """A graph that the stages do not name."""
    tensors = [[{"name": name, "dtype": "float32", "shape": ["batch", 4, 8, 8]}] for name in (taken, given)]
    made = {"kind": kind, "file": f"{kind}/model.onnx", "inputs": tensors[0], "outputs": tensors[1]}
    return lambda model: model["graphs"].update({kind: {**model["graphs"]["text"], **made}})


def more(name: str, dtype: str, shape: list[Any]) -> Change:
    """Give the denoiser one more input."""
    tensor = {"name": name, "dtype": dtype, "shape": shape}
    return lambda model: model["graphs"]["denoiser"]["inputs"].append(tensor)


def long(sizes: list[int], *, states: list[str], free: bool = True) -> Change:
    """Let the denoiser take long prompts."""

    def change(model: dict[str, Any]) -> None:
        model["graphs"]["denoiser"]["inputs"][2]["shape"] = ["batch", "sequence", 8]
        model["graphs"]["denoiser"]["sizes"] = {"sequence": sizes} if free else {}
        model["stages"][0]["states"] = states

    return change


WRONG: list[tuple[Change, str]] = [
    (rename("../../evil"), "graph's name is"),
    (rename("/tmp/evil"), "graph's name is"),
    (rename("Text"), "graph's name is"),
    (rename("a\nb"), "graph's name is"),
    (rename("tokenizer"), "graph's name is"),
    (spare("decoder", "sample", "image"), "graphs is 'decoder'; it must be used by a stage"),
    (graph("text", file="../text/model.onnx"), "not a plain path"),
    (graph("text", file="denoiser/model.onnx"), "a file in the folder text"),
    (graph("text", file="hub.json"), "a file in the folder text"),
    (lambda model: model.update(notes=["two\nlines"]), "notes is"),
    (tokenizer(file="dexport.json"), "tokenizer's file"),
    (tokenizer(file="text/model.onnx"), "tokenizer's file"),
    (tokenizer(file="tokenizer/../text/model.onnx"), "not a plain path"),
    (tokenizer(length=0), "length is 0"),
    (tokenizer(length=10**9), "length is 1000000000"),
    (tokenizer(pad=-1), "pad is -1"),
    (tokenizer(pad=2**40), "pad is"),
    (tokenizer(template="a picture"), "template is 'a picture'"),
    (tokenizer(negative="{} not {}"), "template is '{} not {}'"),
    (tokenizer(side="top"), "side: 'top'"),
    (tokenizer(input="words"), "the tokenizers give"),
    (lambda model: model["tokenizers"].append(model["tokenizers"][0]), "the same file"),
    (lambda model: model.update(tokenizers=[]), "the tokenizers give"),
    (lambda model: model.update(graphs={}), "no graphs"),
    (lambda model: model.update(stages=[]), "no stages"),
    (stage(denoiser="ghost"), "denoiser is 'ghost'"),
    (stage(denoiser="text"), "denoiser is 'text'"),
    (stage(text="denoiser"), "text is 'denoiser'"),
    (stage(decoder="ghost"), "decoder is 'ghost'"),
    (stage(encoder="text"), "encoder is 'text'"),
    (stage(sample=[4, 8]), "sample is"),
    (stage(sample=[4, 8, 0]), "sample is"),
    (stage(sample=[4, 8, 10**9]), "sample is"),
    (stage(sample=[65536, 65536, 65536], factor=1), "sample and factor"),
    (stage(sample=[4, 8, 16]), "the denoiser's"),
    (stage(factor=0), "sample and factor"),
    (stage(factor=10**6), "sample and factor"),
    (stage(patch=0), "patch is 0"),
    (stage(patch=2), "patch is 2"),
    (stage(sigmas="odd"), "sigmas: 'odd'"),
    (stage(guidance={"kind": "cfg", "scale": 5.0, "normalize": "tokens"}), "normalize tokens needs patch"),
    (stage(guidance={"kind": "cfg", "scale": 5.0, "normalize": "words"}), "normalize: 'words'"),
    (stage(steps=0), "steps is 0"),
    (stage(steps=10**9), "steps is"),
    (stage(steps=2000), "steps must be at most 1000"),
    (stage(inputs={"ghost": 1}), "inputs is 'ghost'"),
    (stage(inputs={"sample": 1}), "inputs is 'sample'"),
    (stage(inputs={"ids": [1, 2, 3]}), "shape of 'ids'"),
    (stage(inputs={"ids": ["a", "b"]}), "'ids': not numbers"),
    (stage(inputs={"ids": [1e300, 0]}), "'ids': not numbers"),
    (stage(scheduler={}), "scheduler: no sampler None"),
    (scheduler(_class_name="Other"), "no sampler 'Other'"),
    (scheduler(_class_name=["DDIMScheduler"]), "no sampler"),
    (scheduler(num_train_timesteps=10**9), "num_train_timesteps=1000000000"),
    (scheduler(num_train_timesteps=True), "wrong type"),
    (scheduler(beta_start=-1.0, beta_schedule="scaled_linear"), "beta_start=-1.0"),
    (scheduler(beta_start=1e-30, beta_end=1e-30), "no usable steps"),
    (scheduler(beta_start=0.5, beta_end=0.9, _class_name="EulerDiscreteScheduler"), "no usable steps"),
    (scheduler(trained_betas=["a"]), "trained_betas"),
    (scheduler(trained_betas=5), "trained_betas"),
    (scheduler(steps_offset=10**400), "steps_offset"),
    (scheduler(sigma_min="x", use_karras_sigmas=True, _class_name="EulerDiscreteScheduler"), "sigma_min='x'"),
    (scheduler(_use_default_values=5), "_use_default_values"),
    (first("text", dtype="object"), "dtype is 'object'"),
    (first("text", dtype="float32"), "must be int64"),
    (first("text", shape=["batch", 76]), "shape of 'tokens'"),
    (first("denoiser", shape=["batch", 4, "depth", 8]), "'depth'"),
    (first("denoiser", shape=["batch", 4, -1, 8]), "shape is -1"),
    (first("denoiser", shape=[1] * 40), "1 to 8 dimensions"),
    (first("denoiser", name="x"), "must have 'sample'"),
    (graph("denoiser", outputs=[]), "at least one"),
    (graph("denoiser", sizes={"sequence": [77, 154]}), "sizes: 'sequence' is"),
    (graph("denoiser", sizes={"batch": [2, 1]}), "sizes: 'batch' is"),
    (long([77, 154], states=[]), "states is ()"),
    (long([77, 154], states=["states"], free=False), "sizes must say how long"),
    (long([76, 152], states=["states"]), "sizes of sequence is"),
    (long([77, 155], states=["states"]), "77 and a multiple of it"),
    (stage(states=["ghost"]), "states is 'ghost'"),
    (lambda model: (stage(states=["states"])(model), tokenizer(side="left")(model)), "those of a prompt as it is"),
    (stage(states=["ids"]), "states is 'ids'"),
    (more("mask", "float32", ["batch", 1, 8, 8]), "the denoiser's 'masked_sample' must be float32"),
    (more("masked_sample", "float32", ["batch", 4, 8, 8]), "the denoiser's 'mask' must be float32"),
    (graph("denoiser", properties={"max_batch": "many"}), "max_batch is 'many'"),
]


def line(error: pytest.ExceptionInfo[DexportError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_hubs_and_bundles_that_make_no_sense(tmp_path: Path, change: Change, message: str) -> None:
    manifest = make(tmp_path)
    data = json.loads(to_json(manifest))
    change(data["model"])
    (tmp_path / bundle.MANIFEST).write_text(json.dumps(data))
    (tmp_path / bundle.HUB).write_text(json.dumps(data["model"]))
    with pytest.raises(DexportError) as error:
        bundle.load_manifest(tmp_path, check=False)
    assert message in line(error)
    with pytest.raises(DexportError) as error:
        hub.load(tmp_path)
    assert message in line(error)


BANDS = {"graphs": {"text": 90.0, "denoiser": 90.0}, "latents": 80.0}
TEST: dict[str, Any] = {"subject": "a", "steps": {"base": 2}, "bands": BANDS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "abacus"}, "target: no backend 'abacus'"),
        ({"target": "openvino:fpga"}, "openvino has no device 'fpga'"),
        ({"precision": "int3"}, "precision is 'int3'"),
        ({"accuracy": {}}, "gate is None"),
        ({"accuracy": {"gate": "sure"}}, "gate is 'sure'"),
        ({"self_test": TEST}, r"uses 'golden.safetensors' but does not list it"),
        ({"self_test": TEST | {"steps": {"base": 0}}}, "steps: base is 0"),
        ({"self_test": TEST | {"steps": {"other": 1}}}, "steps: other is 1"),
        ({"self_test": TEST | {"strength": 2.0}}, "strength is 2.0"),
        ({"self_test": TEST | {"bands": {"graphs": {"text": 1.0}, "latents": 1.0}}}, "bands: graphs"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = json.loads(to_json(make(tmp_path))) | changes
    (tmp_path / bundle.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(DexportError) as error:
        bundle.load_manifest(tmp_path, check=False)
    assert message in line(error)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}'], ids=range(4))
def test_what_is_no_strict_json(tmp_path: Path, text: str) -> None:
    for name, load in ((bundle.MANIFEST, bundle.load_manifest), (bundle.HUB, hub.load)):
        (tmp_path / name).write_text(text)
        with pytest.raises(DexportError, match="not valid JSON") as error:
            load(tmp_path)
        line(error)


def test_a_hub_of_some_graphs_loads_where_that_is_asked_for(tmp_path: Path) -> None:
    data = json.loads(to_json(make(tmp_path).model)) | {"stages": []}
    (tmp_path / bundle.HUB).write_text(json.dumps(data))
    assert hub.load(tmp_path, whole=False).stages == ()
