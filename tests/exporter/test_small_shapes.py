"""int8 of shapes that real models do not have and diffusers' own test components do: few channels, heads of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import openvino
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter import build
from exporter.compile import compile_graph
from exporter.ensemble import Origin
from exporter.quantized import Quantization
from runtimes.backends.openvino import HINT, OpenVinoSession
from runtimes.errors import BackendError
from runtimes.manifest import Graph, Tensor
from runtimes.session import backend
from runtimes.target import Target
from tests.families.small import save, tokenizer
from tests.tiny import clip

Array = NDArray[Any]
TOKENS, TAKEN = 96, 8  # of a linear layer's input
PROMPTS = ("red apple", "blue apple", "red", "apple", "green apple", "apple pie", "blue", "pie")
# What follows the layer, by (operator, shape or permutation or axes), and the channels that it makes.
HEADS = ("Transpose", (0, 2, 1, 3))
SHAPES = {
    "heads of one channel": (8, (("Reshape", (0, -1, 8, 1)), HEADS)),
    "the same by an Unsqueeze": (8, (("Unsqueeze", (3,)), HEADS)),
    "without a Transpose": (8, (("Reshape", (0, -1, 8, 1)),)),
    "two axes more": (8, (("Reshape", (0, -1, 8, 1, 1)),)),
    "one head": (8, (("Reshape", (0, -1, 1, 8)), HEADS)),
    "odd sizes": (15, (("Reshape", (0, -1, 3, 5)), HEADS)),
    "one channel": (1, (("Reshape", (0, -1, 1, 1)), HEADS)),
    "an image": (6, (("Reshape", (0, 12, 8, 6)), ("Transpose", (0, 3, 1, 2)))),
}  # fmt: skip


def quantized(channels: int, after: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[onnx.ModelProto, Graph]:
    """x [B, T, K] in 8 bits times a weight in 8 bits with a scale for each channel, and what follows."""
    random = np.random.default_rng(3)
    arrays = {
        "x_scale": np.float32(0.02), "x_zero": np.int8(0), "w_zero": np.zeros(channels, np.int8),
        "w": random.integers(-127, 128, (TAKEN, channels), np.int8),
        "w_scale": random.uniform(0.001, 0.01, channels).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "x_scale", "x_zero"], ["x_held"]),
        helper.make_node("DequantizeLinear", ["x_held", "x_scale", "x_zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["factor"], axis=1),
        helper.make_node("MatMul", ["x", "factor"], ["product"]),
    ]
    value = "product"
    for index, (operator, what) in enumerate(after):
        inputs, options = [value], {"perm": what}
        if operator != "Transpose":
            arrays[f"shape_{index}"] = np.array(what, np.int64)
            inputs, options = [value, f"shape_{index}"], {}
        value = f"value_{index}"
        nodes.append(helper.make_node(operator, inputs, [value], **options))
    nodes.append(helper.make_node("Relu", [value], ["output"]))
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", TOKENS, TAKEN])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "layer", [sample], [output], held), opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )  # fmt: skip
    tensors = Tensor("sample", "float32", ("batch", TOKENS, TAKEN)), Tensor("output", "float32", ("batch",))
    return model, Graph("denoiser", "denoiser/model.onnx", tensors[:1], tensors[1:])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_quantized_layers_of_every_shape_run(name: str, target: str, tmp_path: Path) -> None:
    model, graph = quantized(*SHAPES[name])
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "denoiser").mkdir()
    built = compile_graph(tmp_path / "model.onnx", graph, tmp_path / "denoiser", Target.parse(target), "int8")
    choices: list[dict[str, str]] = [{}, {HINT: "f32"}] if target == "openvino" else [{}]
    for batch in (1, 2):
        x = np.random.default_rng(4).standard_normal((batch, TOKENS, TAKEN)).astype(np.float32)
        (expected,) = ReferenceEvaluator(model).run(None, {"sample": x})
        for chosen in choices:
            described = replace(built, properties={**built.properties, **chosen})
            session = backend(target).open(tmp_path / built.file, described, "cpu", 1, None)
            found = session.run({"sample": x})["output"]
            exact = described.properties.get(HINT, "f32") == "f32"
            np.testing.assert_allclose(found, expected, atol=(1e-5 if exact else 1e-2) * np.abs(expected).max())


@pytest.mark.parametrize("name", SHAPES)
def test_tensorrt_compiles_quantized_layers_of_every_shape(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model, graph = quantized(*SHAPES[name])
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "denoiser").mkdir()
    built = compile_graph(tmp_path / "model.onnx", graph, tmp_path / "denoiser", Target.parse("tensorrt:sm89"), "int8")
    assert (tmp_path / built.file).stat().st_size > 10_000


def test_a_graph_of_ours_that_a_runtime_does_not_take_is_no_wrong_use(tmp_path: Path) -> None:
    """As OpenVINO 2026.4.1 reads it, without what ``compile_graph`` does to it."""
    model, graph = quantized(*SHAPES["heads of one channel"])
    onnx.save(model, tmp_path / "model.onnx")
    openvino.save_model(openvino.Core().read_model(tmp_path / "model.onnx"), tmp_path / "model.xml")
    session = OpenVinoSession(tmp_path / "model.xml", graph, "cpu", 1, None)
    with pytest.raises(
        BackendError, match=r"OpenVINO cannot compile it: .*; this is a bug, please report it"
    ) as caught:
        session.run({"sample": np.zeros((1, TOKENS, TAKEN), np.float32)})
    assert caught.value.exit_code == 70 and "\n" not in str(caught.value)


def components(folder: Path) -> None:
    """The components of diffusers' own tests of latent consistency models."""
    torch.manual_seed(0)
    words = tokenizer(folder, "words", "!")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=2, time_cond_proj_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    save(
        folder, diffusers.LatentConsistencyModelPipeline, unet=unet, vae=vae, scheduler=scheduler, tokenizer=words,
        text_encoder=clip(len(words), hidden_size=32, num_attention_heads=8, num_hidden_layers=3), safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip


def test_int8_of_diffusers_own_test_components(tmp_path: Path) -> None:
    """In 8 heads of one channel, and 8 channels."""
    components(tmp_path / "checkpoint")
    made = build.build(
        Origin(tmp_path / "checkpoint"), tmp_path / "bundles", targets=("openvino", "onnxruntime"), precisions="int8",
        quantization=Quantization(prompts=PROMPTS),
    )  # fmt: skip
    for built in made:
        found = built.accuracy["quantization"]
        assert np.median(found["psnr_db"]) >= 30 and found["quantized"] > 30
        assert built.accuracy["gate"] == "passed"
