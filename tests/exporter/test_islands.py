"""A checkpoint whose decoder goes beyond fp16: its build finds where, keeps that in float32, and says so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from calibration import islands, overflow
from calibration.islands import Found
from calibration.precision import cast
from calibration.split import split
from exporter import cache, hub
from exporter.build import build
from exporter.compile import compile_graph, computes_in_fp16
from exporter.quantized import Quantization
from exporter.spread import FLOORS
from runtimes import bundle
from runtimes.accuracy import compare
from runtimes.backends.openvino import HINT
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Model, Tensor
from runtimes.session import Array, backend, require
from runtimes.target import Target
from tests.calibration import small

PROMPTS = ["red apple", "blue apple", "red", "blue"]
JUDGED = ["apple", "green"]
SCALE = 2.0**16  # a power of two: in float32 nothing changes, to the last bit; the weights stay within fp16


@dataclass(frozen=True)
class Hot:
    """What was built for a GPU of a checkpoint with values of millions between two convolutions of its decoder."""

    bundle: Path
    hub: Path
    model: Model
    found: Found


@pytest.fixture(scope="module")
def hot(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Hot:
    folder = tmp_path_factory.mktemp("hot")
    checkpoint = Path(shutil.copytree(tiny_sd, folder / "checkpoint"))
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: value.astype(np.float32) for name, value in load_file(file).items()}
    for name in ("post_quant_conv.weight", "post_quant_conv.bias"):
        weights[name] *= SCALE
    weights["decoder.conv_in.weight"] /= SCALE
    save_file(weights, file)
    asked = Quantization(prompts=[*PROMPTS, *JUDGED])
    build(checkpoint, folder / "bundle", targets="openvino:gpu=fp16", keep_hub=folder / "hub", quantization=asked)
    model = hub.load(folder / "hub")
    return Hot(folder / "bundle", folder / "hub", model, islands.find(model, folder / "hub", PROMPTS))


def decode(model: ir.Model, folder: Path) -> Array:
    """By ONNX's reference evaluator: ONNX Runtime's CPU kernels run fp16 nodes in float32, so nothing overflows."""
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"sample": latents})[0])


def test_the_island_makes_the_decoder_right(hot: Hot, tiny_hub: Path, tmp_path: Path) -> None:
    file = hot.hub / hot.model.graphs["decoder"].file
    expected = decode(ir.load(file), tmp_path)
    np.testing.assert_array_equal(decode(ir.load(tiny_hub / "decoder" / "model.onnx"), tmp_path), expected)
    plain, _ = cast(ir.load(file), "fp16")
    assert compare(expected, decode(plain, tmp_path)).sqnr_db < 20  # NaN counts as -200
    kept, _ = cast(ir.load(file), "fp16", hot.found.nodes("decoder"))
    assert compare(expected, decode(kept, tmp_path)).sqnr_db > FLOORS["fp16"].graph


def test_only_what_is_beyond_is_kept(hot: Hot) -> None:
    report = hot.found.report()["graphs"]
    assert set(report) == {"text", "denoiser", "decoder", "encoder"}
    assert all(not graph["islands"] for name, graph in report.items() if name != "decoder")
    (island,) = report["decoder"]["islands"]
    assert (island["first"], island["last"]) == ("vae.post_quant_conv", "vae.decoder.conv_in")
    assert island["nodes"] == 2 == len(hot.found.nodes("decoder"))
    assert report["decoder"]["peak"] == island["peak"] > 65504


def test_a_quantized_denoiser_s_nodes_are_of_its_own_graph(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are split in two must be named as they are then: with the limit at 0 every node is in an island."""
    monkeypatch.setattr(islands, "islands", partial(overflow.islands, limit=0.0))
    file = hot.hub / hot.model.graphs["denoiser"].file
    plain, parts = ({str(node.name) for node in graph.graph} for graph in (ir.load(file), split(ir.load(file))[0]))
    for quantized, own, other in ((True, parts, plain), (False, plain, parts)):
        found = islands.find(hot.model, hot.hub, PROMPTS[:1], quantized=quantized).nodes("denoiser")
        assert found <= own and found - other


def test_a_build_names_the_island(hot: Hot) -> None:
    told = bundle.load_manifest(hot.bundle).accuracy["fp16"]
    assert told["prompts"] == PROMPTS and told["limit"] == 65504
    (island,) = told["graphs"]["decoder"]["islands"]
    assert (island["first"], island["last"]) == ("vae.post_quant_conv", "vae.decoder.conv_in")
    page = (hot.bundle / "report.html").read_text()
    assert "1 islands in float32" in page and "vae.post_quant_conv" in page


def test_an_engine_is_built_with_its_island(hot: Hot, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    graph, target = hot.model.graphs["decoder"], Target.parse("tensorrt:sm89")
    kept = hot.found.nodes("decoder")
    built = compile_graph(hot.hub / graph.file, graph, tmp_path, target, "fp16", max_batch=1, islands=kept)
    assert (tmp_path / Path(built.file).name).stat().st_size > 10_000


def test_who_computes_in_fp16_and_what_a_cached_graph_depends_on(hot: Hot) -> None:
    yes = ("tensorrt:sm75=fp16", "tensorrt:sm89=int8", "openvino:gpu=fp16", "openvino:npu=fp16", "openvino:gpu=int8")
    no = ("tensorrt:sm89=bf16", "tensorrt:sm89=fp32", "openvino=fp16", "openvino:gpu=bf16", "onnxruntime=int8")
    for words in yes + no:
        target, _, precision = words.partition("=")
        assert computes_in_fp16(Target.parse(target), precision) == (words in yes)
    graph = hot.model.graphs["decoder"]
    keys = {cache.key(hot.hub / graph.file, graph, "x", "fp16", 1, "", kept) for kept in ((), ("a",), ("a", "b"))}
    assert len(keys) == 3 and cache.key(hot.hub / graph.file, graph, "x", "fp16", 1, "", {"b", "a"}) in keys


def test_openvino_keeps_an_island_exact(tmp_path: Path) -> None:
    """The IR for a GPU, run on a CPU under the hint bf16: what is marked for the one is marked for the other."""
    if "bf16" not in backend("openvino").devices()[0].precisions:
        pytest.skip("this CPU has no bf16")
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17 for name in ("v", "w")}
    model = small.graph(
        "g (float[batch,32,8,8] x) => (float[batch,32,8,8] y) {"
        " a = Conv<pads=[1,1,1,1]>(x, v) s = Sigmoid(a) t = Mul(a, s) y = Conv<pads=[1,1,1,1]>(t, w) }",
        weights,
    )
    x = random.standard_normal((1, 32, 8, 8)).astype(np.float32)
    expected = small.run(model, {"x": x})["y"]
    names = frozenset(str(node.name) for node in model.graph)
    ir.save(model, tmp_path / "model.onnx")
    tensors = [(Tensor(name, "float32", ("batch", 32, 8, 8)),) for name in ("x", "y")]
    errors = []
    for folder, kept in (("narrow", frozenset[str]()), ("kept", names)):
        (tmp_path / folder).mkdir()
        graph = Graph("decoder", "decoder/model.onnx", *tensors)
        target = Target.parse("openvino:gpu")
        made = compile_graph(tmp_path / "model.onnx", graph, tmp_path / folder, target, "fp16", islands=kept)
        assert made.properties[HINT] == "f16"
        session = require("openvino").open(
            tmp_path / made.file, replace(made, properties={HINT: "bf16"}), "cpu", 2, None
        )
        errors.append(compare(expected, session.run({"x": x})["y"]).relative)
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("target", ["tensorrt:sm89", "openvino:gpu"])
def test_a_name_of_another_graph_is_refused(target: str, hot: Hot, tmp_path: Path) -> None:
    if target.startswith("tensorrt"):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    graph = hot.model.graphs["decoder"]
    with pytest.raises(DexportError, match="no node 'nobody' to keep in float32"):
        compile_graph(hot.hub / graph.file, graph, tmp_path, Target.parse(target), "fp16", islands={"nobody"})
