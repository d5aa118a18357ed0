"""Weights: exact in fp32, found under today's and yesterday's names, and errors that name them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import checkpoint, passes, reference, trace
from exporter.families import Shape
from exporter.weights import Weight, bind, parameter_shapes, widen
from runtimes.errors import DexportError
from runtimes.safetensors import Entry, read_header

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
    assert np.array_equal(widen(entry), values.float().numpy())


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


def test_the_reference_holds_a_layer_at_a_time(tiny_sd: Path) -> None:
    """Between calls no parameter has values; while one layer runs, only its own have."""
    module = reference.load(checkpoint.read(tiny_sd), "denoiser")
    held: list[int] = []

    def count(*_: object) -> None:
        held.append(sum(value.numel() for value in module.parameters() if not value.is_meta))

    for layer in module.modules():
        if not list(layer.children()):
            layer.register_forward_pre_hook(count)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 32)
    with torch.no_grad():
        first, second = module(*inputs), module(*inputs)
    assert torch.equal(first, second)
    assert all(value.is_meta for value in module.parameters())
    assert 0 < max(held) <= max(sum(p.numel() for p in layer.parameters(recurse=False)) for layer in module.modules())


def test_reference_names_its_graphs(tiny_sd: Path) -> None:
    with pytest.raises(DexportError, match="no graph 'unet'; there are text, denoiser, decoder, encoder"):
        reference.load(checkpoint.read(tiny_sd), "unet")
