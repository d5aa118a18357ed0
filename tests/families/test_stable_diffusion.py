"""Stable Diffusion 1.x: each exported graph against diffusers' and transformers' own modules in fp32."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from transformers import CLIPTextModel

from exporter import checkpoint, hub, reference
from exporter.families import Shape
from runtimes.errors import DexportError

Array = NDArray[Any]
GRAPHS = ("text", "denoiser", "decoder", "encoder")
TOLERANCE = 1e-5  # relative L2; another order of additions gives 3e-7 to 1e-6
TIMESTEPS = (999.0, 501.0, 1.0)


def own(folder: Path, graph: str) -> Callable[..., torch.Tensor]:
    """What the graph has to compute, said with the libraries' own classes and loaders."""
    kind, name = {"text": (CLIPTextModel, "text_encoder"), "denoiser": (UNet2DConditionModel, "unet")}.get(
        graph, (AutoencoderKL, "vae")
    )
    model = kind.from_pretrained(folder / name, torch_dtype=torch.float32).eval()
    if graph == "text":
        return lambda tokens: model(tokens).last_hidden_state
    if graph == "denoiser":
        return lambda sample, timestep, states: model(sample, timestep, states).sample
    scale = model.config.scaling_factor
    if graph == "decoder":
        return lambda sample: (model.decode(sample / scale).sample * 0.5 + 0.5).clamp(0, 1)
    return lambda image: model.encode(2 * image - 1).latent_dist.mode() * scale


def inputs_for(graph: str, batch: int, height: int = 64, width: int = 64) -> dict[str, Array]:
    """Seeded inputs of the kinds that the loop gives."""
    random = np.random.default_rng(batch)
    latents = random.standard_normal((batch, 4, height // 4, width // 4)).astype(np.float32)
    if graph == "text":
        return {"tokens": random.integers(0, 500, (batch, 77))}
    if graph == "denoiser":
        timestep = np.array(TIMESTEPS[:batch], np.float32)
        states = random.standard_normal((batch, 77, 32)).astype(np.float32)
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": states}
    if graph == "decoder":
        return {"sample": latents}
    return {"image": random.random((batch, 3, height, width)).astype(np.float32)}


def torch_run(function: Callable[..., torch.Tensor], inputs: dict[str, Array]) -> Array:
    with torch.no_grad():
        result: Array = function(*map(torch.from_numpy, inputs.values())).numpy()
    return result


def relative(got: Array, expected: Array) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float32
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def session(folder: Path, graph: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(folder / graph / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_is_the_models_own_computation(tiny_sd: Path, tiny_hub: Path, graph: str) -> None:
    run, model = session(tiny_hub, graph), own(tiny_sd, graph)
    for batch in (1, 2, 3):
        inputs = inputs_for(graph, batch)
        expected = torch_run(model, inputs)
        assert relative(run.run(None, inputs)[0], expected) < TOLERANCE
        assert np.std(expected) > 1e-3  # a constant would agree with anything


@pytest.mark.parametrize("graph", GRAPHS)
def test_reference_is_the_models_own_computation(tiny_sd: Path, graph: str) -> None:
    module = reference.load(checkpoint.read(tiny_sd), graph)
    for batch in (1, 3):
        inputs = inputs_for(graph, batch)
        assert relative(torch_run(module, inputs), torch_run(own(tiny_sd, graph), inputs)) < 1e-6


@pytest.mark.parametrize("graph", GRAPHS)
def test_openvino_reads_it(tiny_sd: Path, tiny_hub: Path, graph: str) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "2"}
    compiled = openvino.Core().compile_model(tiny_hub / graph / "model.onnx", "CPU", options)
    for batch in (1, 2):
        inputs = inputs_for(graph, batch)
        assert relative(compiled(inputs)[0], torch_run(own(tiny_sd, graph), inputs)) < TOLERANCE


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_stay_whole(tiny_sd: Path, tiny_hub: Path, graph: str) -> None:
    """One Attention for each attention layer of the module, one GroupNormalization for each norm; opset 23 alone."""
    file = tiny_hub / graph / "model.onnx"
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 23)]
    assert not model.functions
    found = Counter(node.op_type for node in model.graph.node)
    name = {"text": "text_encoder", "denoiser": "unet"}.get(graph, "vae")
    component = getattr(reference.load(checkpoint.read(tiny_sd), graph), name)
    layers = Counter(
        type(layer).__name__
        for path, layer in component.named_modules()
        if name != "vae" or path.split(".")[0] in (graph, "post_quant_conv" if graph == "decoder" else "quant_conv")
    )
    assert found["Attention"] == layers["Attention"] + layers["CLIPAttention"] > 0
    assert found["GroupNormalization"] == layers["GroupNorm"]
    assert found["LayerNormalization"] == layers["LayerNorm"]
    assert found["Conv"] == layers["Conv2d"] + layers["LoRACompatibleConv"]
    assert not {"SplitToSequence", "SequenceAt", "Cast", "Identity"} & set(found)


@pytest.fixture(scope="module")
def dynamic_hub(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hubs") / "dynamic"
    hub.export(tiny_sd, folder, dynamic_shape=True, graphs=["denoiser", "decoder", "encoder"])
    return folder


@pytest.mark.parametrize("graph", ["denoiser", "decoder", "encoder"])
def test_dynamic_shape(tiny_sd: Path, dynamic_hub: Path, graph: str) -> None:
    """Sizes smaller and larger than the traced one, not square, and such that the UNet cannot halve them evenly."""
    run, model = session(dynamic_hub, graph), own(tiny_sd, graph)
    for batch, height, width in ((1, 32, 48), (2, 64, 64), (3, 60, 100)):
        inputs = inputs_for(graph, batch, height, width)
        assert relative(run.run(None, inputs)[0], torch_run(model, inputs)) < TOLERANCE
    described = hub.load(dynamic_hub).graphs[graph]
    names = {"image_height", "image_width"} if graph == "encoder" else {"height", "width"}
    assert names | {"batch"} == {n for tensor in described.inputs for n in tensor.shape if isinstance(n, str)}


def test_another_fixed_shape(tiny_sd: Path, tmp_path: Path) -> None:
    model = hub.export(tiny_sd, tmp_path / "hub", shape=(32, 96), graphs=["decoder"])
    assert model.graphs["decoder"].inputs[0].shape == ("batch", 4, 8, 24)
    inputs = inputs_for("decoder", 2, 32, 96)
    got = session(tmp_path / "hub", "decoder").run(None, inputs)[0]
    assert relative(got, torch_run(own(tiny_sd, "decoder"), inputs)) < TOLERANCE


def test_decoder_clamps(tiny_sd: Path, tiny_hub: Path) -> None:
    image = session(tiny_hub, "decoder").run(None, {"sample": 100 * inputs_for("decoder", 1)["sample"]})[0]
    assert image.min() == 0.0 and image.max() == 1.0


def test_v_prediction_in_bf16(tiny_sd_v: Path, tmp_path: Path) -> None:
    """bf16 weights are widened exactly; what the output means is data of the stage, not of the graph."""
    model = hub.export(tiny_sd_v, tmp_path / "hub", graphs=["text", "denoiser"])
    assert model.stages[0].scheduler["prediction_type"] == "v_prediction"
    assert (model.stages[0].text, model.stages[0].decoder, model.stages[0].encoder) == ("text", None, None)
    for graph in ("text", "denoiser"):
        inputs = inputs_for(graph, 2)
        got = session(tmp_path / "hub", graph).run(None, inputs)[0]
        assert relative(got, torch_run(own(tiny_sd_v, graph), inputs)) < TOLERANCE


def test_the_stage(tiny_sd: Path, tiny_hub: Path) -> None:
    model = hub.load(tiny_hub)
    assert (model.family, model.pipeline) == ("stable-diffusion", "StableDiffusionPipeline")
    (stage,) = model.stages
    assert (stage.denoiser, stage.text, stage.decoder, stage.encoder) == ("denoiser", "text", "decoder", "encoder")
    assert (stage.sample, stage.factor, stage.steps) == ((4, 16, 16), 4, 20)
    assert (stage.guidance.kind, stage.guidance.scale) == ("cfg", 7.5)
    written = json.loads((tiny_sd / "scheduler/scheduler_config.json").read_text())
    assert stage.scheduler == {key: value for key, value in written.items() if key != "_diffusers_version"}
    (tokens,) = model.tokenizers
    assert (tokens.file, tokens.input, tokens.length) == ("tokenizer/tokenizer.json", "tokens", 77)


@pytest.mark.parametrize(
    ("component", "option", "value", "words"),
    [
        ("unet", "addition_embed_type", "text_time", "is not Stable Diffusion 1.x or 2.x"),
        ("unet", "in_channels", 9, "for an inpainting model, model_index.json names an inpainting pipeline"),
        ("unet", "down_block_types", ["NoSuchBlock", "DownBlock2D"], "NoSuchBlock"),
        ("unet", "cross_attention_dim", 48, "has the shape"),
        ("vae", "block_out_channels", [16, 32], "config.json of vae"),
    ],
)
def test_configs_that_cannot_be_exported(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, component: str, option: str, value: Any, words: str
) -> None:
    folder = copy_checkpoint()
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(DexportError, match=words):
        hub.export(folder, tmp_path / "hub", graphs=["denoiser" if component == "unet" else "decoder"])
    assert not (tmp_path / "hub").exists()


def test_default_shape_is_the_checkpoints_own(tiny_sd: Path) -> None:
    read = checkpoint.read(tiny_sd)
    assert read.family.default_shape(read) == (64, 64)
    assert read.family.specs(read, Shape(128, 64, False))["denoiser"].inputs[0].shape == ("batch", 4, 32, 16)


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("unet", {"sample_size": "8"}),
        ("unet", {"sample_size": [8, 8, 8]}),
        ("unet", {"sample_size": 8.5}),
        ("unet", {"sample_size": -8}),
        ("vae", {"block_out_channels": []}),
        ("vae", {"block_out_channels": 5}),
        ("vae", {"block_out_channels": [1] * 100}),
        ("vae", {"scaling_factor": "x"}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"shift_factor": "x"}),
        ("vae", {"latent_channels": 4.0}),
        ("text_encoder", {"max_position_embeddings": "77"}),
        ("text_encoder", {"hidden_size": 0}),
    ],
)
def test_configs_that_make_no_sense(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, component: str, changes: dict[str, Any]
) -> None:
    folder = copy_checkpoint()
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DexportError, match=f"^{component}/config.json: {next(iter(changes))}=") as error:
        hub.export(folder, tmp_path / "hub")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hub").exists()
