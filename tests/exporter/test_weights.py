"""Weights: exact in fp32, found under today's and yesterday's names, and errors that name them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from exporter import checkpoint, passes, reference, trace
from exporter.families import Shape
from exporter.weights import Weight, bind, parameter_shapes, tied, widen
from runtimes.errors import DexportError
from runtimes.safetensors import Entry, read_header
from tests.families import small_flow, small_transformers

FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
GRAPHS = {"text_encoder": "text", "unet": "denoiser", "vae": "decoder"}
Copy = Callable[[], Path]


def bound(folder: Path, graph: str) -> dict[str, Entry]:
    read = checkpoint.read(folder)
    spec = read.family.specs(read, Shape(*read.family.default_shape(read), free=False))[graph]
    return bind(read, parameter_shapes(trace.build(spec)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_widening_is_torchs(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-7, 65504.0, 6e-8])]).to(dtype).reshape(5, -1)
    save_file({"w": values}, tmp_path / "w.safetensors")
    entry = read_header(tmp_path / "w.safetensors")["w"]
    assert torch.equal(widen(entry), values.float())


def test_a_weight_can_turn_its_axes(tmp_path: Path) -> None:
    values = torch.randn(3, 4, 5).half()
    save_file({"w": values}, tmp_path / "w.safetensors")
    weight = Weight("w", read_header(tmp_path / "w.safetensors")["w"]).transposed((2, 0, 1)).transposed((1, 0, 2))
    expected = values.float().permute(2, 0, 1).permute(1, 0, 2)
    assert list(weight.shape) == list(expected.shape)
    assert np.array_equal(weight.numpy(), expected.numpy())
    assert weight.tobytes() == expected.contiguous().numpy().tobytes()


@pytest.mark.parametrize("component", FILES)
def test_missing_unexpected_and_mis_shaped_weights_are_named(copy_checkpoint: Copy, component: str) -> None:
    folder = copy_checkpoint()
    file = folder / FILES[component]
    whole = load_file(file)
    name = sorted(whole)[0]
    save_file({key: value for key, value in whole.items() if key != name}, file)
    with pytest.raises(DexportError, match="missing") as caught:
        bound(folder, GRAPHS[component])
    assert name.removeprefix("text_model.") in str(caught.value)
    save_file(whole | {"ghost.weight": torch.zeros(3)}, file)
    with pytest.raises(DexportError, match=r"'ghost.weight' is unexpected"):
        bound(folder, GRAPHS[component])
    save_file(whole | {name: torch.zeros(3, 1, 2)}, file)
    with pytest.raises(DexportError, match=r"has the shape \[3, 1, 2\] where config.json asks for"):
        bound(folder, GRAPHS[component])
    save_file(whole | {name: torch.zeros(whole[name].shape, dtype=torch.int32)}, file)
    with pytest.raises(DexportError, match="is I32; only float weights"):
        bound(folder, GRAPHS[component])


def old_text(name: str) -> str:
    return f"text_model.{name.removeprefix('text_model.')}"


def old_vae(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize(("component", "rename"), [("text_encoder", old_text), ("vae", old_vae)])
def test_old_names(copy_checkpoint: Copy, tiny_sd: Path, component: str, rename: Callable[[str], str]) -> None:
    """Stable Diffusion 1.5 itself has "text_model.", position ids among the weights, and "query" in the VAE."""
    folder = copy_checkpoint()
    file = folder / FILES[component]
    tensors = {rename(name): value for name, value in load_file(file).items()}
    if component == "text_encoder":
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file)
    old, new = bound(folder, GRAPHS[component]), bound(tiny_sd, GRAPHS[component])
    assert sorted(old) == sorted(new)
    assert any(old[name].name != name.partition(".")[2] for name in old)
    assert all(np.array_equal(old[name].load(), new[name].load()) for name in new)


def test_a_weight_under_both_its_names(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    tensors = load_file(folder / FILES["vae"])
    name = "decoder.mid_block.attentions.0.to_q.weight"
    save_file(tensors | {old_vae(name): tensors[name].clone()}, folder / FILES["vae"])
    with pytest.raises(DexportError, match="are the same weight"):
        bound(folder, "decoder")


def test_what_a_class_does_not_use_is_left_out_and_said(copy_checkpoint: Copy) -> None:
    """A whole CLIP under the name of its text half, which transformers loads too."""
    folder = copy_checkpoint()
    file, config = folder / FILES["text_encoder"], folder / "text_encoder" / "config.json"
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text.config.to_dict(), projection_dim=8,
            vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        )
    )  # fmt: skip
    assert not checkpoint.read(folder).notes
    kept = config.read_text()
    whole.half().save_pretrained(folder / "text_encoder")
    config.write_text(kept)
    tensors = load_file(file)
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    (note,) = checkpoint.read(folder).notes
    assert note.startswith("text_encoder: a CLIPTextModel does not use 26 tensors of its file: 'logit_scale'")
    loaded = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16).state_dict()
    found = bound(folder, GRAPHS["text_encoder"])
    assert found and all(
        np.array_equal(entry.load(), loaded[name.partition(".")[2]].numpy()) for name, entry in found.items()
    )
    save_file(load_file(file) | {"text_model.ghost.weight": torch.zeros(3)}, file)
    with pytest.raises(DexportError, match=r"'text_model.ghost.weight' is unexpected"):
        bound(folder, GRAPHS["text_encoder"])


@pytest.mark.parametrize(
    ("write", "component", "whole", "half"),
    [
        (small_flow.flux, "text_encoder_2", "T5ForConditionalGeneration", "T5EncoderModel"),
        (small_transformers.aura_flow, "text_encoder", "UMT5ForConditionalGeneration", "UMT5EncoderModel"),
        (small_transformers.sana, "text_encoder", "Gemma2ForCausalLM", "Gemma2Model"),
    ],
)
def test_whole_models_of_language(tmp_path: Path, write: Any, component: str, whole: str, half: str) -> None:
    """Saved with their decoders and heads; what is read is what transformers loads as the half that is used."""
    folder = tmp_path / "checkpoint"
    write(folder)
    place = folder / component
    kept = (place / "config.json").read_text()
    kind = getattr(transformers, whole)
    config = kind.config_class(**{**json.loads(kept), "num_decoder_layers": 1, "tie_word_embeddings": False})
    torch.manual_seed(0)
    kind(config).save_pretrained(place)
    (place / "config.json").write_text(kept)
    tensors = load_file(place / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(4, 4)}, place / "model.safetensors", {"format": "pt"})
    read = checkpoint.read(folder)
    (note,) = read.notes
    assert (
        note.startswith(f"{component}: a {half} does not use") and "lm_head.weight" in read.components[component].unused
    )
    spec = read.family.specs(read, Shape(*read.family.default_shape(read), free=False))["text"]
    modules = trace.build(spec)
    found = bind(read, parameter_shapes(modules), tied(modules))
    loaded = getattr(transformers, half).from_pretrained(place).state_dict()
    names = [name for name in found if name.startswith(f"{component}.")]
    assert names
    for name in names:
        assert np.array_equal(found[name].load(), loaded[name.removeprefix(f"{component}.")].numpy())


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    """Three initializers, two of them from the same place: both uses read the one that stays."""
    save_file({"a": torch.randn(40, 40), "b": torch.randn(40, 40)}, tmp_path / "w.safetensors")
    entries = read_header(tmp_path / "w.safetensors")
    values = []
    for name, entry in (("one", entries["a"]), ("two", entries["a"]), ("three", entries["b"])):
        weight = Weight(name, entry)
        values.append(ir.Value(name=name, shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight))
    x = ir.Value(name="x", shape=ir.Shape(["batch", 40]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, last = [], x
    for value in values:
        nodes.append(ir.node("MatMul", [last, value]))
        last = nodes[-1].outputs[0]
    graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 23})
    model, modified = passes.share_weights(ir.Model(graph, ir_version=10))
    assert modified and list(model.graph.initializers) == ["one", "three"]
    assert [node.inputs[1].name for node in model.graph] == ["one", "one", "three"]
    assert passes.share_weights(model)[1] is False


def test_the_reference_holds_no_weights(tiny_sd: Path) -> None:
    """A parameter has the values of the file when it is asked for, and none between."""
    module = reference.load(checkpoint.read(tiny_sd), "denoiser")
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 32)
    with torch.no_grad():
        first, second = module(*inputs), module(*inputs)
    assert torch.equal(first, second)
    assert all(value.untyped_storage().nbytes() == 4 for value in module.parameters())  # one number, whatever the shape
    own = UNet2DConditionModel.from_pretrained(tiny_sd / "unet", torch_dtype=torch.float32)
    for name, value in own.named_parameters():
        path, _, last = f"unet.{name}".rpartition(".")
        assert torch.equal(getattr(module.get_submodule(path), last), value), name


def test_reference_names_its_graphs(tiny_sd: Path) -> None:
    with pytest.raises(DexportError, match="no graph 'unet'; there are text, denoiser, decoder, encoder"):
        reference.load(checkpoint.read(tiny_sd), "unet")


QUANTIZED = {
    "fp8": ({"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, r"stored in fp8 \(F8_E4M3\)"),
    "fp8 with scales": (
        {"weight": torch.zeros(4, 4).to(torch.float8_e5m2), "scale_weight": torch.ones(())},
        r"stored in fp8 \(F8_E5M2\)",
    ),
    "nf4": (
        {
            "weight": torch.zeros(8, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        },
        "stored in 4 bits .bitsandbytes",
    ),
    "int8": ({"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": torch.ones(4)}, "stored in int8"),
    "int8 alone": ({"weight": torch.zeros(4, 4, dtype=torch.int8)}, "stored in int8"),
    "comfy": (
        {
            "weight": torch.zeros(4, 2, dtype=torch.uint8), "weight_scale": torch.ones(1),
            "weight_scale_2": torch.ones(()),
        },
        "stored in 8 bits or less",
    ),
    "gptq": ({"qweight": torch.zeros(4, 4, dtype=torch.int32), "qzeros": torch.ones(1)}, "stored in packed integers"),
    "quanto": ({"weight._data": torch.zeros(4, 4, dtype=torch.int8), "weight._scale": torch.ones(4)}, "quanto"),
}  # fmt: skip
LAYER = {"text_encoder": "encoder.layers.0.mlp.fc1", "unet": "mid_block.attentions.0.proj_in", "vae": "quant_conv"}


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_called_by_their_format(copy_checkpoint: Copy, component: str, kind: str) -> None:
    folder = copy_checkpoint()
    tensors, words = QUANTIZED[kind]
    layer = LAYER[component]
    kept = {name: value for name, value in load_file(folder / FILES[component]).items() if name != f"{layer}.weight"}
    save_file(kept | {f"{layer}.{name}": value for name, value in tensors.items()}, folder / FILES[component])
    with pytest.raises(DexportError, match=f"{words}.*; save the model in fp16 or bf16") as caught:
        checkpoint.read(folder)
    assert "\n" not in str(caught.value) and "damaged" not in str(caught.value) and layer in str(caught.value)


def test_a_config_may_say_that_weights_are_quantized(copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint()
    config = folder / "unet" / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    with pytest.raises(DexportError, match=r"unet/config.json: its weights are quantized by 'bitsandbytes'; save the"):
        checkpoint.read(folder)


def test_gguf_is_called_by_its_name(copy_checkpoint: Copy) -> None:
    """As the checkpoint, under another file's name, and as the weights of a component."""
    folder = copy_checkpoint()
    content = b"GGUF\x03\0\0\0" + b"\0" * 64
    for place in (folder / "model.gguf", folder / "model.safetensors", folder / "unet" / "unet-Q4_0.gguf"):
        place.write_bytes(content)
        (folder / FILES["unet"]).unlink(missing_ok=True)
        with pytest.raises(DexportError, match=f"{place.name}: a GGUF file, .*save the model in fp16 or bf16"):
            checkpoint.read(folder if place.parent != folder else place)
