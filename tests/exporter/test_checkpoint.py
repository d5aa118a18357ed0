"""What a checkpoint is, and each way that a folder may not be one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from exporter import checkpoint, families, reference
from exporter.families.refused import YET, reason
from exporter.inspect import inspect
from runtimes.errors import DexportError

UNET = "unet/diffusion_pytorch_model.safetensors"
Copy = Callable[[], Path]


def refusal(folder: Path, **options: Any) -> str:
    """The error's line; it must be one line."""
    with pytest.raises(DexportError) as caught:
        checkpoint.read(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_reads_what_diffusers_saved(tiny_sd: Path) -> None:
    read = checkpoint.read(tiny_sd)
    assert read.pipeline == "StableDiffusionPipeline"
    assert sorted(read.components) == ["text_encoder", "unet", "vae"] and sorted(read.tokenizers) == ["tokenizer"]
    assert read.scheduler["_class_name"] == "DDIMScheduler" and read.scheduler["beta_end"] == 0.012
    expected = load_file(tiny_sd / UNET)
    entries = read.components["unet"].entries
    assert sorted(entries) == sorted(expected)
    assert all(np.array_equal(entries[name].load(), value) for name, value in expected.items())


def test_source_has_the_hash_of_every_file_that_is_used(tiny_sd: Path) -> None:
    source = {file.path: file for file in checkpoint.read(tiny_sd).source()}
    used = {path.relative_to(tiny_sd).as_posix() for path in tiny_sd.rglob("*") if path.is_file()}
    assert set(source) == used
    for path, file in source.items():
        data = (tiny_sd / path).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_clip_skip(tiny_sd: Path) -> None:
    """The states that transformers gives for the layer before, under the last norm; the encoder has two layers."""
    read = checkpoint.read(tiny_sd, clip_skip=2)
    tokens = torch.randint(0, 500, (2, 77))
    model = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder", torch_dtype=torch.float32)
    with torch.no_grad():
        found = reference.load(read, "text")(tokens)
        states = model(tokens, output_hidden_states=True)
        expected = model.final_layer_norm(states.hidden_states[-2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (states.last_hidden_state - expected).norm() > 0.01 * expected.norm()
    assert "must be 1 to 2, the layers of the text encoder, not 3" in refusal(tiny_sd, clip_skip=3)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a diffusers checkpoint" in refusal(tmp_path)
    assert "model_index.json" in refusal(tmp_path / "notes.txt")


def test_a_component_alone(tiny_sd: Path) -> None:
    assert f"give the whole: {tiny_sd}" in refusal(tiny_sd / "unet")


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ({"_class_name": "ControlNetModel"}, "--control"),
        ({"_class_name": "T2IAdapter"}, "--control"),
        ({"_class_name": "MotionAdapter"}, "--motion-adapter"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "--decoder"),
        ({"architectures": ["CLIPVisionModelWithProjection"]}, "--image-encoder"),
    ],
)
def test_what_is_given_beside_a_checkpoint_is_told_its_option(
    tmp_path: Path, config: dict[str, Any], option: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"give it beside its checkpoint, with {option}" in refusal(tmp_path)
    with pytest.raises(DexportError, match=option):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("StableDiffusionPAGPipeline", "over parts of a picture; the same checkpoint is exported as the plain class, "
         "where that is; nearest to it: StableDiffusionPipeline, "),
        ("AudioLDMPipeline", "sound: a bundle has no way out for it yet; docs/families.md lists all"),
        ("WanPipeline", "video beyond AnimateDiff; docs/families.md lists all"),
        ("StableDiffusionFooPipeline", "is not supported; nearest to it: StableDiffusionPipeline, "),
    ],
)  # fmt: skip
def test_an_unsupported_pipeline_is_told_why(copy_checkpoint: Copy, kind: str, said: str) -> None:
    folder = copy_checkpoint()
    edit(folder / "model_index.json", _class_name=kind)
    message = refusal(folder)
    assert f"the pipeline class {kind} is not supported" in message and said in message


def test_every_refused_class_of_diffusers_is_told_its_reason() -> None:
    for name in (name for name in dir(diffusers) if name.endswith("Pipeline")):
        if name in families.PIPELINES or name in families.SAME:
            continue
        why = reason(name)
        with pytest.raises(DexportError) as caught:
            families.find(name)
        assert why is YET or why.why in str(caught.value)
        assert ("nearest to it" in str(caught.value)) <= why.others_help


def test_a_class_with_the_parts_of_another_is_taken_as_that(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    edit(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert checkpoint.read(folder).pipeline == "StableDiffusionPipeline"


@pytest.mark.parametrize(("kind", "same"), families.SAME.items())
def test_classes_that_are_taken_as_another_have_its_parts(kind: str, same: str) -> None:
    parts = [getattr(diffusers, name)._get_signature_keys(getattr(diffusers, name))[0] for name in (kind, same)]
    assert parts[0] == parts[1]


def test_classes_come_from_the_allow_list(copy_checkpoint: Copy, tmp_path: Path, monkeypatch: Any) -> None:
    """A class that the file names is refused, and its module never imported."""
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = copy_checkpoint()
    edit(folder / "model_index.json", unet=["payload", "Payload"])
    message = refusal(folder)
    assert "unet is a 'Payload' of 'payload'; only classes of diffusers and transformers" in message
    edit(folder / "model_index.json", unet=None)
    assert "'unet'" in refusal(folder)


def test_ignores_safety_checker_and_feature_extractor(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"never read")
    read = checkpoint.read(folder)
    assert "safety_checker" not in read.components
    assert not any("safety_checker" in path for path in read.files)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_why_and_how(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path / name, tmp_path):
        message = refusal(path)
        assert name in message and "pickle" in message and "runs whatever program" in message
        assert "save_pretrained" in message


def test_a_pickle_in_a_component_is_refused(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(folder)
    assert "pickle" in message and "use_safetensors=False" in message


def test_no_weights_and_no_config(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    (folder / UNET).rename(folder / "aside")
    assert "no weights" in refusal(folder)
    (folder / "aside").rename(folder / UNET)
    (folder / "vae" / "config.json").write_text("{")
    assert "vae/config.json: not valid JSON" in refusal(folder)
    (folder / "vae" / "config.json").unlink()
    assert "vae/config.json: missing" in refusal(folder)


def test_truncated_weights_name_a_tensor(copy_checkpoint: Copy) -> None:
    file = copy_checkpoint() / UNET
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    message = refusal(file.parents[1])
    assert "cut short: tensor '" in message and str(len(data) - 100) in message


def test_mis_sized_tensor_is_named(copy_checkpoint: Copy) -> None:
    file = copy_checkpoint() / UNET
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["conv_in.bias"]["shape"] = [31]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    message = refusal(file.parents[1])
    assert "'conv_in.bias'" in message and "64 bytes" in message and "needs 62" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_found_and_named(copy_checkpoint: Copy, value: float) -> None:
    file = copy_checkpoint() / UNET
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.weight"][3, 2, 1, 0] = value
    save_file(tensors, file)
    assert "'mid_block.resnets.0.conv1.weight' holds NaN or infinity" in refusal(file.parents[1])
    assert checkpoint.read(file.parents[1], check=False).pipeline == "StableDiffusionPipeline"


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_variants_by_file_name(copy_checkpoint: Copy, variant: str) -> None:
    folder = copy_checkpoint()
    named = folder / f"unet/diffusion_pytorch_model.{variant}.safetensors"
    (folder / UNET).rename(named)
    assert {entry.file for entry in checkpoint.read(folder).components["unet"].entries.values()} == {named}
    shutil.copy(named, folder / UNET)  # the plain file wins
    assert {entry.file for entry in checkpoint.read(folder).components["unet"].entries.values()} == {folder / UNET}


def shard(folder: Path) -> dict[str, str]:
    """Split the UNet's weights in two shards with an index, and return the weight map."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    files = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / "unet" / file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards(copy_checkpoint: Copy, tiny_sd: Path) -> None:
    folder = copy_checkpoint()
    shard(folder)
    entries = checkpoint.read(folder).components["unet"].entries
    expected = load_file(tiny_sd / UNET)
    assert sorted(entries) == sorted(expected)
    assert all(np.array_equal(entries[name].load(), value) for name, value in expected.items())


def test_damaged_shards(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    places = shard(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    first = places["conv_in.bias"]
    index.write_text(json.dumps({"weight_map": places | {"ghost": first}}))
    assert "'ghost' is not in" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in places.items() if n != "conv_in.bias"}}))
    assert "'conv_in.bias' is not listed" in refusal(folder)
    index.write_text(
        json.dumps({"weight_map": places | {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}})
    )
    assert "not the name of a .safetensors file beside it" in refusal(folder)
    index.write_text(json.dumps({"weight_map": places}))
    (folder / "unet" / first).unlink()
    assert f"{first}: missing" in refusal(folder)


@pytest.mark.parametrize("library", ["evil_package", "stable_diffusion", None, ["diffusers"]])
def test_components_of_other_libraries_are_refused(copy_checkpoint: Copy, library: Any) -> None:
    folder = copy_checkpoint()
    edit(folder / "model_index.json", unet=[library, "UNet2DConditionModel"])
    assert "only classes of diffusers and transformers" in refusal(folder)


@pytest.mark.parametrize("text", ['{"sample_size": NaN}', "[" * 200_000, '{"a": 1, "a": 2}'], ids=range(3))
def test_configs_that_are_no_strict_json(copy_checkpoint: Copy, text: str) -> None:
    folder = copy_checkpoint()
    (folder / "unet" / "config.json").write_text(text)
    assert "unet/config.json: not valid JSON" in refusal(folder)


def test_infinity_in_a_scheduler_config(copy_checkpoint: Copy) -> None:
    """diffusers writes -Infinity for DPM-Solver's limit; the hub's JSON must not have it."""
    from diffusers import DPMSolverMultistepScheduler

    folder = copy_checkpoint()
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    file = folder / "scheduler" / "scheduler_config.json"
    assert '"lambda_min_clipped": -Infinity' in file.read_text()
    scheduler = checkpoint.read(folder).scheduler
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler" and "lambda_min_clipped" not in scheduler
    json.dumps(scheduler, allow_nan=False)
    for wrong in ({"lambda_min_clipped": np.inf}, {"beta_end": np.nan}, {"trained_betas": [0.1, np.inf]}):
        edit(file, **wrong)
        assert f"{next(iter(wrong))}=" in refusal(folder)
        edit(file, lambda_min_clipped=-5.1, beta_end=0.02, trained_betas=None)
