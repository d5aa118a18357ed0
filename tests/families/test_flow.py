"""Flow transformers of text: what is refused, what their stages say, and graphs that take every size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import checkpoint, hub, pieces, reference, trace
from exporter.compile import compile_graph
from exporter.families import Shape
from exporter.families.text_encoders import rename_language
from exporter.weights import bind, parameter_shapes, tied, widen
from runtimes.accuracy import compare
from runtimes.errors import DexportError
from runtimes.session import backend, require
from runtimes.target import Target
from tests.families import small_flow

SHAPE = Shape(32, 32, free=False)
TRANSFORMER, VAE, INDEX = "transformer/config.json", "vae/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("name", "file", "changes", "words"),
    [
        ("sd_3", TRANSFORMER, {"in_channels": 9}, "9 channels in and 4 out where the autoencoder's latents have 4"),
        ("sd_3", TRANSFORMER, {"pooled_projection_dim": 8}, "pooled_projection_dim=8 where the text encoders give 24"),
        ("sd_3", TRANSFORMER, {"joint_attention_dim": 40}, "joint_attention_dim=40; the text encoders give 48"),
        ("sd_3", TRANSFORMER, {"joint_attention_dim": 64}, "joint_attention_dim=64 where the text encoders give 48"),
        ("sd_3", TRANSFORMER, {"pos_embed_max_size": 4}, "32x32 pixels: this model knows positions up to 16"),
        ("sd_3", TRANSFORMER, {"patch_size": "2"}, "patch_size='2' must be a whole number"),
        ("sd_3", INDEX, {"tokenizer_3": [None, None]}, "there is a text_encoder_3 and no tokenizer_3"),
        ("sd_3", INDEX, {"text_encoder_3": ["transformers", "BertModel"]}, "is exported with T5EncoderModel"),
        ("sd_3", INDEX, {"tokenizer_3": ["transformers", "BertTokenizer"]}, "is exported with T5Tokenizer"),
        ("sd_3", VAE, {"block_out_channels": [8, 8, 8, 8, 8, 8]}, "needs multiples of 64"),
        ("flux", TRANSFORMER, {"in_channels": 384}, "384 channels in and 384 out where"),
        ("flux", TRANSFORMER, {"patch_size": 2}, "patch_size is not 1"),
        ("flux", TRANSFORMER, {"pooled_projection_dim": 8}, "pooled_projection_dim=8 where the text encoders give 32"),
        ("flux", "scheduler/scheduler_config.json", {"max_image_seq_len": 256}, "must differ"),
        ("qwen_image", TRANSFORMER, {"zero_cond_t": True}, "zero_cond_t is for models that are shown pictures"),
        ("qwen_image", TRANSFORMER, {"in_channels": 64}, "64 channels in and 4 out"),
        ("qwen_image", VAE, {"latents_std": [1, 1, 0, 1]}, "must be above 0"),
        ("qwen_image", VAE, {"temperal_downsample": 3}, "temperal_downsample=3 must be a list"),
        ("z_image", TRANSFORMER, {"siglip_feat_dim": 8}, "siglip_feat_dim"),
        ("z_image", TRANSFORMER, {"all_patch_size": [4]}, "has no patches of 2"),
        ("z_image", TRANSFORMER, {"axes_lens": [600, 32]}, "axes_lens"),
        ("z_image", TRANSFORMER, {"axes_lens": [513, 32, 32]}, "must begin with 514 or more"),
        ("z_image", TRANSFORMER, {"axes_lens": [600, 4, 32]}, "32x32 pixels: this model knows positions up to 16"),
        ("z_image", TRANSFORMER, {"axes_dims": [4, 4, 4]}, "3 even numbers from 2 that make the 16 channels of a head"),
        ("flux", TRANSFORMER, {"axes_dims_rope": [16]}, "3 even numbers from 2 that make the 16 channels of a head"),
        ("qwen_image", TRANSFORMER, {"axes_dims_rope": [4, 4, 4]}, "that make the 16 channels of a head"),
        ("z_image", TRANSFORMER, {"cap_feat_dim": 8}, "cap_feat_dim=8 where the text encoders give 32"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(
    changed: Callable[..., Path], tmp_path: Path, name: str, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = changed(name, file, **changes)
    with pytest.raises(DexportError, match=words) as caught:
        hub.export(folder, tmp_path / "hub", shape=(32, 32))
    assert "\n" not in str(caught.value) and not (tmp_path / "hub").exists()


@pytest.mark.parametrize("shape", [(33, 32), (32, 34)])
def test_sizes_without_whole_tokens(saved: Callable[[str], Path], tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(DexportError, match="needs multiples of"):
        hub.export(saved("flux"), tmp_path / "hub", shape=shape)


def test_defaults_are_the_pipelines(saved: Callable[[str], Path]) -> None:
    found = {}
    for name in small_flow.WRITERS:
        read = checkpoint.read(saved(name))
        (stage,) = read.family.stages(read, SHAPE)
        lengths = [tokens.length for tokens in read.family.token_inputs(read).values()]
        guided = stage.guidance.kind, stage.guidance.scale, stage.guidance.normalize
        found[name] = (read.family.default_shape(read), stage.steps, *guided, stage.sigmas, lengths)
    assert found == {
        "sd_3": ((32, 32), 28, "cfg", 7.0, "none", "scheduler", [77, 77, 256]),
        "flux": ((256, 256), 28, "embedded", 3.5, "none", "even", [77, 512]),
        "flux_schnell": ((256, 256), 4, "none", 1.0, "none", "even", [77, 256]),
        "qwen_image": ((512, 512), 50, "cfg", 4.0, "tokens", "even", [34 + 512]),
        "z_image": ((128, 128), 50, "cfg", 6.0, "none", "even", [512]),
    }


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_a_shared_weight_lies_under_one_of_its_names_or_each(
    changed: Callable[..., Path], names: tuple[str, ...]
) -> None:
    folder = changed("sd_3", "text_encoder_3/config.json")
    file = folder / "text_encoder_3" / "model.safetensors"
    weights = load_file(file)
    table = weights.pop("shared.weight")
    save_file(weights | {f"{name}.weight": table.clone() for name in names}, file)
    read = checkpoint.read(folder)
    modules = trace.build(read.family.specs(read, SHAPE)["text"])
    found = bind(read, parameter_shapes(modules), tied(modules))
    for name in ("shared", "encoder.embed_tokens"):
        np.testing.assert_array_equal(widen(found[f"text_encoder_3.{name}.weight"]), table.numpy())
    if len(names) == 1:
        with pytest.raises(DexportError, match="missing"):
            bind(read, parameter_shapes(modules))


def test_language_models_have_one_name_for_each_weight() -> None:
    """Of Qwen2.5-VL as transformers 4 and 5 save it, and of a language model alone."""
    layer = "layers.0.mlp.up_proj.weight"
    for name in (layer, f"model.{layer}", f"model.language_model.{layer}", f"language_model.model.{layer}"):
        assert rename_language(name) == layer
    for name in ("visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias", "lm_head.weight"):
        assert rename_language(name) is None


@pytest.mark.parametrize("name", ["sd_3", "flux_schnell", "qwen_image", "z_image"])
def test_a_denoiser_of_every_size(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = saved(name)
    model = hub.export(folder, tmp_path / "hub", shape=(32, 32), dynamic_shape=True, graphs=["denoiser"])
    graph = model.graphs["denoiser"]
    session = require("onnxruntime").open(tmp_path / "hub" / graph.file, graph, "cpu", None, None)
    original = reference.load(checkpoint.read(folder), "denoiser")
    for batch, height, width in ((2, 16, 16), (1, 18, 22)):
        sizes, stream = {"batch": batch, "height": height, "width": width}, np.random.default_rng(0)
        inputs = {}
        for tensor in graph.inputs:
            shape = [sizes[side] if isinstance(side, str) else side for side in tensor.shape]
            inputs[tensor.name] = stream.standard_normal(shape).astype(np.float32)
        inputs["timestep"] = np.full(batch, 400, np.float32)
        if (mask := inputs.get("encoder_hidden_states_mask")) is not None:
            mask[:] = np.arange(mask.shape[1]) < stream.integers(20, 90, (batch, 1))
        with torch.no_grad():
            wanted = original(*(torch.from_numpy(inputs[tensor.name]) for tensor in graph.inputs)).numpy()
        assert np.abs(session.run(inputs)["output"] - wanted).max() < 1e-3 < np.std(wanted)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_what_is_made_of_timesteps_is_right_in_bf16(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Timesteps and guidance are divided and multiplied before they are sines; ONNX Runtime computes in fp32."""
    if "bf16" not in backend("openvino").devices()[0].precisions:
        pytest.skip("this CPU has no bf16")
    graph = hub.export(saved(name), tmp_path / "hub", shape=(32, 32), graphs=["denoiser"]).graphs["denoiser"]
    (tmp_path / "denoiser").mkdir()
    file = tmp_path / "hub" / graph.file
    compiled = compile_graph(file, graph, tmp_path / "denoiser", Target.parse("openvino"), "bf16")
    session = require("openvino").open(tmp_path / compiled.file, compiled, "cpu", 2, None)
    rng = np.random.default_rng(0)
    for timestep in (997, 603):
        feeds = {}
        for tensor in graph.inputs:
            shape = [1 if isinstance(size, str) else size for size in tensor.shape]
            feeds[tensor.name] = rng.standard_normal(shape, np.float32)
        feeds["timestep"][:] = timestep
        if "guidance" in feeds:
            feeds["guidance"][:] = 3.5
        if (mask := feeds.get("encoder_hidden_states_mask")) is not None:
            mask[:] = np.arange(mask.shape[1]) < 60
        expected = pieces.run(file, feeds)["output"]
        assert compare(expected, session.run(feeds)["output"]).sqnr_db > 30
