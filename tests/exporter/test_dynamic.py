"""A transformer with loud channels in int8: activations rounded token by token against one scale for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calibration import layers, recipe, sensitivity
from calibration.calibrate import instrument
from calibration.observe import Observer, Statistics, watched_graph
from calibration.recipe import Recipe
from exporter import compile as compilers
from exporter import passes, trace
from exporter.families import Spec
from runtimes.accuracy import compare
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.backends.openvino import GROUP_SIZE, HINT, load
from runtimes.manifest import Graph, Tensor
from runtimes.safetensors import read_header, write
from runtimes.session import Array, backend
from runtimes.target import Target
from tests.exporter.graphs import SAMPLES

WIDTH, LOUD = 128, (5, 70)  # channels of the residual stream, and those that are far larger than the others
GRAPH = Graph(
    "denoiser", "denoiser/model.onnx",
    (Tensor("sample", "float32", ("batch", 4, 16, 16)), Tensor("timestep", "float32", ("batch",))),
    (Tensor("output", "float32", ("batch", 4, 16, 16)),),
)  # fmt: skip


def transformer() -> torch.nn.Module:
    """A DiT of two layers; the inputs of its linear layers have some channels 60 times as large as the rest."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(3)
    made = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=WIDTH // 4, in_channels=4, num_layers=2, sample_size=16,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    with torch.no_grad():
        for block in made.transformer_blocks:
            block.norm1.linear.weight.mul_(0.2)  # the scale and shift that the norms get from the timestep
            for first in (0, WIDTH, 3 * WIDTH, 4 * WIDTH):  # shift and scale, before attention and feed-forward
                block.norm1.linear.bias[[first + channel for channel in LOUD]] = 60.0
    return made


def forward(modules: Any, sample: Any, timestep: Any) -> Any:
    labels = torch.zeros_like(timestep, dtype=torch.int64)
    return modules.transformer(sample, timestep, class_labels=labels, return_dict=False)[0]


def calls(count: int, seed: int) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    return [
        {"sample": random.standard_normal((1, 4, 16, 16), np.float32),
         "timestep": np.array([1000 * (index + 0.5) / count], np.float32)}
        for index in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module, Statistics]:
    """The exported graph, torch's own module, and statistics of an observed run."""
    file = tmp_path_factory.mktemp("transformer") / "model.onnx"
    module = transformer().eval().requires_grad_(False)
    weights = file.with_name("weights.safetensors")
    write(weights, {f"transformer.{name}": value.numpy() for name, value in module.state_dict().items()})
    spec = Spec("denoiser", {"transformer": transformer}, forward, GRAPH.inputs, GRAPH.outputs, {})
    model = passes.run(trace.trace(spec, trace.build(spec), read_header(weights)), passes.HUB)
    ir.save(model, file, external_data="model.onnx.data", size_threshold_bytes=64)
    observed, watched = instrument(file)
    content = ir.to_proto(observed).SerializeToString()
    inner = OnnxRuntimeSession(file, watched_graph(GRAPH, list(watched)), None, content=content)
    observer = Observer(inner, GRAPH, list(watched))
    for inputs in calls(8, 0):
        observer.run(inputs)
    return file, module, observer.statistics("", {})


def compiled(made: Any, runtime: str, how: Recipe, folder: Path) -> tuple[Graph, recipe.Done]:
    """The graph quantized and compiled into ``folder``/denoiser."""
    file, _, statistics = made
    quantized, done = recipe.apply(ir.load(file), statistics, how)
    (folder / "denoiser").mkdir(parents=True)
    ir.save(quantized, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
    target = Target(runtime, "cpu")
    assert compilers.dynamic(target)
    return compilers.compile_graph(folder / "model.onnx", GRAPH, folder / "denoiser", target, "int8"), done


def sqnr(made: Any, runtime: str, folder: Path, graph: Graph) -> float:
    """The least of some calls, against torch."""
    session = backend(runtime).open(folder / graph.file, graph, "cpu", 1, None)
    module, found = made[1], []
    for inputs in calls(3, 1):
        expected = forward(SimpleNamespace(transformer=module), *(torch.from_numpy(one) for one in inputs.values()))
        found.append(compare(expected.numpy(), session.run(inputs)["output"]).sqnr_db)
    return min(found)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_transformer_is_far_better_with_activations_rounded_token_by_token(
    made: Any, runtime: str, tmp_path: Path
) -> None:
    found = {}
    for name, how in (("static", Recipe(smooth=False)), ("smoothed", Recipe()), ("dynamic", Recipe(dynamic=True))):
        graph, done = compiled(made, runtime, how, tmp_path / name)
        found[name] = sqnr(made, runtime, tmp_path / name, graph)
        assert len(done.quantized) >= 12 and bool(done.dynamic) is (name == "dynamic")
    assert found["dynamic"] > max(found["static"], found["smoothed"]) + 6 and found["dynamic"] > 25
    if runtime == "openvino":  # what it is told about groups is what rounds the activations
        exact = replace(graph, properties={**graph.properties, GROUP_SIZE: "0"})
        assert sqnr(made, runtime, tmp_path / "dynamic", exact) > found["dynamic"] + 1
    _runs_in_8_bits(runtime, tmp_path / "dynamic" / graph.file, graph, len(done.dynamic))


def _runs_in_8_bits(runtime: str, file: Path, graph: Graph, count: int) -> None:
    if runtime == "onnxruntime":
        nodes = [node for node in ir.load(file).graph if node.op_type == "MatMulNBits"]
        levels = {(node.attributes["bits"].as_int(), node.attributes["accuracy_level"].as_int()) for node in nodes}
        assert len(nodes) == count and levels == {(8, 4)}  # 4: activations in int8
        return
    assert graph.properties[HINT] == "f32" and graph.properties[GROUP_SIZE] == "32"
    core = load().Core()
    model = core.read_model(file)
    model.reshape({"sample": [1, 4, 16, 16], "timestep": [1]})
    properties = {name: value for name, value in graph.properties.items() if name.isupper()}
    ran = core.compile_model(model, "CPU", properties).get_runtime_model()
    notes = [{name: str(note.value) for name, note in node.get_rt_info().items()} for node in ran.get_ops()]
    assert len([1 for one in notes if (one["layerType"], one["runtimePrecision"]) == ("FullyConnected", "i8")]) == count


def test_a_block_that_is_kept_is_not_narrowed_and_the_noise_of_each_is_known(made: Any) -> None:
    file, _, statistics = made
    how = Recipe(dynamic=True)
    every = [(inputs, np.zeros(0)) for inputs in calls(3, 1)]
    shares, static = (
        {name: sum(found.values()) for name, found in sensitivity.noise(file, GRAPH, statistics, one, every).items()}
        for one in (how, Recipe())
    )
    assert set(shares) == set(static) and min(shares.values()) > 0
    assert sum(shares.values()) < 0.25 * sum(static.values())
    kept = "transformer.transformer_blocks.0"
    model, done = recipe.apply(ir.load(file), statistics, replace(how, keep=frozenset({kept})))
    assert done.dynamic and not [name for name in done.dynamic if name.startswith(f"{kept}.")]
    for layer in layers.find(model)[0]:
        if layer.name.startswith(f"{kept}."):
            assert layer.weight.is_initializer() and layer.weight.dtype == ir.DataType.FLOAT


def test_the_rule_tells_a_transformer_from_a_convolutional_network(made: Any) -> None:
    assert recipe.is_dynamic(ir.load(made[0]))
    assert not recipe.is_dynamic(ir.load(SAMPLES["denoiser"]().source))
    assert not compilers.dynamic(Target("tensorrt", "sm89"))
