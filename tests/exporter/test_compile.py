"""Compilers: what they write, what they refuse, and that rewrites keep the function."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from exporter.compile import alternatives, check, compile_graph, openvino, precisions
from exporter.compile.onnxruntime import pack_attention
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.session import backend, require
from runtimes.target import Target
from tests.calibration import small
from tests.exporter.graphs import SAMPLES, relative, sines


def test_precisions_and_their_reasons() -> None:
    assert precisions(Target.parse("onnxruntime")) == ("fp32", "w8", "w4", "int8")
    for name in ("openvino", "tensorrt", "tensorrt:sm89"):
        assert set(precisions(Target.parse(name))) >= {"fp32", "fp16", "bf16", "int8"}
    with pytest.raises(DexportError, match=r"no precision 'bf16': .*no bf16 arithmetic.*; it has fp32, w8, w4, int8$"):
        check(Target.parse("onnxruntime"), "bf16")


def test_the_batch_must_be_positive(tmp_path: Path) -> None:
    sample = SAMPLES["text"]()
    with pytest.raises(DexportError, match="largest batch is 0"):
        compile_graph(sample.source, sample.graph, tmp_path, Target.parse("tensorrt:sm89"), "fp32", max_batch=0)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_same_input_same_bytes_and_no_paths(name: str, tmp_path: Path) -> None:
    """Also from another process, whose counters stand elsewhere."""
    sample = SAMPLES["denoiser"]()
    digests = []
    for index in range(2):
        output = tmp_path / str(index) / "denoiser"
        output.mkdir(parents=True)
        compile_graph(sample.source, sample.graph, output, Target.parse(name), "fp32")
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()})
    assert digests[0] == digests[1]
    written = b"".join(path.read_bytes() for path in output.iterdir())
    assert str(tmp_path).encode() not in written
    assert str(sample.source.parent.parent).encode() not in written
    code = (
        "import sys; from pathlib import Path; from exporter.compile import compile_graph;"
        "from runtimes.manifest import Graph, Tensor; from runtimes.target import Target;"
        "graph = Graph('denoiser', '', (Tensor('timestep', 'float32', ('batch',)),), ());"
        "compile_graph(Path(sys.argv[1]), graph, Path(sys.argv[2]), Target.parse(sys.argv[3]), 'fp32')"
    )
    other = tmp_path / "other"
    other.mkdir()
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(sample.source), str(other), name], check=True, cwd=root)
    assert digests[0] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in other.iterdir()}


FOUR_TIMES = """
import hashlib, sys
from pathlib import Path
from exporter.compile import compile_graph
from runtimes.manifest import Graph
from runtimes.target import Target

for index in range(4):
    output = Path(sys.argv[2]) / str(index)
    output.mkdir()
    compile_graph(Path(sys.argv[1]), Graph("text", "", (), ()), output, Target.parse("openvino"), "fp32")
    print(hashlib.sha256((output / "model.xml").read_bytes()).hexdigest())
"""


class TestOpenVino:
    def test_names_that_meet_openvino_s_counter_change_nothing(self, tmp_path: Path) -> None:
        """A chain of operations named as OpenVINO names its own, over the numbers that its counter passes here."""
        length = 60
        wanted = helper.make_tensor("wanted", TensorProto.INT64, [2], [-1, 8])
        nodes = [
            helper.make_node("Reshape", [f"x{i}", "wanted"], [f"x{i + 1}"], name=f"Reshape_{4 * i + 2}")
            if i % 2
            else helper.make_node("Gelu", [f"x{i}"], [f"x{i + 1}"], name=f"Constant_{4 * i + 2}")
            for i in range(length)
        ]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x0", f"x{length}")]
        graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [wanted])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / "model.onnx")
        words = [sys.executable, "-c", FOUR_TIMES, str(tmp_path / "model.onnx"), str(tmp_path)]
        root = Path(__file__).parents[2]
        said = subprocess.run(words, check=True, cwd=root, capture_output=True, text=True).stdout
        assert len(said.split()) == 4
        assert len(set(said.split())) == 1

    def test_timestep_keeps_its_bits_in_bf16(self, tmp_path: Path) -> None:
        """999 is no bf16 number; if it were rounded, the output would be 4 % off (8 is one, and shows the floor)."""
        if "bf16" not in backend("openvino").devices()[0].precisions:
            pytest.skip("this CPU has no bf16")
        sample, target = SAMPLES["denoiser"](), Target.parse("openvino")
        output = tmp_path / "denoiser"
        output.mkdir()
        graph = compile_graph(sample.source, sample.graph, output, target, "bf16")
        session = require("openvino").open(tmp_path / graph.file, graph, "cpu", 2, None)
        errors = {}
        for timestep in (8, 257, 999):
            inputs = sample.inputs(1, 1) | {"timestep": np.full(1, timestep, np.float32)}
            errors[timestep] = relative(session.run(inputs)["output"], sample.expected(inputs))
        assert max(errors[257], errors[999]) < 1.6 * errors[8]

    @pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
    def test_plain_numbers_and_the_frequencies_of_their_sines_stay_exact(self, precision: str, tmp_path: Path) -> None:
        """An angle of 2,048 in fp16, or times a frequency in fp16, is off by up to a half."""
        if precision != "fp16" and "bf16" not in backend("openvino").devices()[0].precisions:
            pytest.skip("this CPU has no bf16")
        sample, output = sines(), tmp_path / "denoiser"
        output.mkdir()
        graph = compile_graph(sample.source, sample.graph, output, Target.parse("openvino"), precision)
        session = require("openvino").open(tmp_path / graph.file, graph, "cpu", 2, None)
        inputs = sample.inputs(3, 1)
        assert relative(session.run(inputs)["output"], sample.expected(inputs)) < 1e-3

    def test_convolutions_over_frames_are_right_in_bf16(self, tmp_path: Path) -> None:
        """Of three channels with frames padded, as Qwen-Image's encoder has it, OpenVINO's bf16 gives anything."""
        if "bf16" not in backend("openvino").devices()[0].precisions:
            pytest.skip("this CPU has no bf16")
        rng = np.random.default_rng(0)
        weight, image = (
            rng.standard_normal((8, 3, 3, 3, 3), np.float32),
            rng.standard_normal((1, 3, 1, 16, 16), np.float32),
        )
        ends = (
            Tensor("image", "float32", ("batch", 3, 1, 16, 16)),
            Tensor("sample", "float32", ("batch", 8, 1, 16, 16)),
        )
        infos = [helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape) for tensor in ends]
        node = helper.make_node(
            "Conv", ["image", "weight"], ["sample"], pads=[2, 1, 1, 0, 1, 1], kernel_shape=[3, 3, 3]
        )
        made = helper.make_graph(
            [node], "frames", infos[:1], infos[1:], [onnx.numpy_helper.from_array(weight, "weight")]
        )
        onnx.save(
            helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx"
        )
        output = tmp_path / "encoder"
        output.mkdir()
        graph = Graph("encoder", "encoder/model.onnx", ends[:1], ends[1:])
        graph = compile_graph(tmp_path / "m.onnx", graph, output, Target.parse("openvino"), "bf16")
        session = require("openvino").open(tmp_path / graph.file, graph, "cpu", 2, None)
        padded = torch.nn.functional.pad(torch.from_numpy(image), (1, 1, 1, 1, 2, 0))
        expected = torch.nn.functional.conv3d(padded, torch.from_numpy(weight)).numpy()
        assert relative(session.run({"image": image})["sample"], expected) < 0.01

    def test_weights_are_halved(self, tmp_path: Path) -> None:
        sample = SAMPLES["denoiser"]()
        sizes = {}
        for precision in ("fp32", "fp16"):
            output = tmp_path / precision
            output.mkdir()
            graph = compile_graph(sample.source, sample.graph, output, Target.parse("openvino"), precision)
            sizes[precision] = (output / "model.bin").stat().st_size
            assert graph.file == f"{precision}/model.xml"
            assert graph.properties == {"INFERENCE_PRECISION_HINT": "f32", "weights": precision}
        assert sizes["fp16"] < 0.51 * sizes["fp32"]


def attention(tokens: int, context: int, heads: int, head: int, **options: Any) -> onnx.ModelProto:
    """Attention as torch's exporter writes it: over four axes, between Reshapes and Transposes."""
    width, nodes, weights = heads * head, [], []
    for name, length in (("q", tokens), ("k", context), ("v", context)):
        weights.append(helper.make_tensor(f"{name}_shape", TensorProto.INT64, [4], [0, length, heads, head]))
        nodes += [
            helper.make_node("Reshape", [name, f"{name}_shape"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=options.get("perm", [0, 2, 1, 3])),
        ]
    inputs = ["q_heads", "k_heads", "v_heads"] + (["mask"] if options.get("mask") else [])
    settings = {name: options[name] for name in ("scale", "is_causal", "softcap") if name in options}
    weights.append(helper.make_tensor("packed", TensorProto.INT64, [3], [0, tokens, width]))
    nodes += [
        helper.make_node("Attention", inputs, ["y_heads"], **settings),
        helper.make_node("Transpose", ["y_heads"], ["y_split"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y_split", "packed"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", length, width])
        for name, length in (("q", tokens), ("k", context), ("v", context), ("y", tokens))
    ]
    if options.get("mask"):
        values.insert(3, helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, tokens, context]))
    graph = helper.make_graph(nodes, "attention", values[:-1], values[-1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return inferred


class TestPackAttention:
    @pytest.mark.parametrize(
        ("tokens", "context", "heads", "options", "expected"),
        [
            (64, 64, 4, {}, "Attention"),
            (64, 7, 4, {"scale": 0.3}, "Attention"),
            (64, 64, 4, {"mask": True}, "Attention"),
            (64, 64, 4, {"is_causal": 1}, "Attention"),
            (1024, 1024, 2, {}, "MultiHeadAttention"),
            (1024, 1024, 2, {"scale": 0.3}, "MultiHeadAttention"),
            (1024, 1024, 2, {"is_causal": 1}, "Attention"),
            (1024, 1024, 2, {"mask": True}, "Attention"),
            (1024, 1024, 1, {}, "Attention"),
        ],
    )
    def test_computes_the_same(self, tokens: int, context: int, heads: int, options: Any, expected: str) -> None:
        import onnxruntime

        head, rng = 8, np.random.default_rng(0)
        model, modified = pack_attention(ir.from_proto(attention(tokens, context, heads, head, **options)))
        assert modified
        assert [node.op_type for node in model.graph] == [expected]
        inputs = {
            name: rng.standard_normal((2, length, heads * head), np.float32)
            for name, length in (("q", tokens), ("k", context), ("v", context))
        }
        q, k, v = (torch.from_numpy(x).unflatten(2, (heads, head)).transpose(1, 2) for x in inputs.values())
        if options.get("mask"):
            inputs["mask"] = rng.standard_normal((1, 1, tokens, context), np.float32)
        truth = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, torch.from_numpy(inputs["mask"]) if options.get("mask") else None,
            is_causal=bool(options.get("is_causal")), scale=options.get("scale"),
        )  # fmt: skip
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, inputs)
        assert relative(found, truth.transpose(1, 2).flatten(2).numpy()) < 1e-6

    def test_leaves_other_forms_alone(self) -> None:
        model, modified = pack_attention(ir.from_proto(attention(16, 16, 16, 8, perm=[0, 1, 2, 3])))
        assert not modified
        assert "Transpose" in [node.op_type for node in model.graph]

    def test_takes_all_of_a_unet_s(self, tmp_path: Path) -> None:
        model, _ = pack_attention(ir.load(SAMPLES["denoiser"]().source))
        attentions = [node for node in model.graph if node.op_type == "Attention"]
        assert len(attentions) == 8
        assert all("q_num_heads" in node.attributes for node in attentions)


class TestTensorRt:
    """TensorRT-RTX builds engines for a named GPU generation on any machine."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_builds_for_a_gpu_that_is_not_here(self, precision: str, tmp_path: Path) -> None:
        """CLIP's attention has a mask, for which there is no fused kernel; the UNet's has none."""
        import tensorrt_rtx

        names = ("denoiser", "text") if precision == "fp16" else ("text",)
        for name in names:
            sample, output = SAMPLES[name](), tmp_path / name
            output.mkdir()
            graph = compile_graph(sample.source, sample.graph, output, Target.parse("tensorrt:sm89"), precision)
            assert graph.file == f"{name}/model.engine"
            assert [path.name for path in output.iterdir()] == ["model.engine"]
            assert (output / "model.engine").stat().st_size > 1_000_000
            assert graph.properties == {
                "runtime": "tensorrt_rtx", "version": tensorrt_rtx.__version__, "compute_capability": "sm89",
                "max_batch": "2",
            }  # fmt: skip

    def test_builds_for_a_batch_of_one(self, tmp_path: Path) -> None:
        sample = SAMPLES["text"]()
        graph = compile_graph(sample.source, sample.graph, tmp_path, Target.parse("tensorrt:sm89"), "fp32", max_batch=1)
        assert graph.properties["max_batch"] == "1"

    def test_refusals_are_one_line(self, tmp_path: Path) -> None:
        sample, target = SAMPLES["text"](), Target.parse("tensorrt:sm89")
        free = replace(sample.graph, inputs=(Tensor("tokens", "int64", ("batch", "length")),))
        with pytest.raises(DexportError, match=r"length of 'tokens' is free.*export with --shape"):
            compile_graph(sample.source, free, tmp_path, target, "fp32")
        broken = tmp_path / "model.onnx"
        model = attention(4, 4, 1, 8)
        model.graph.node[0].op_type = "NoSuchOperator"
        broken.write_bytes(model.SerializeToString())
        output = tmp_path / "denoiser"
        output.mkdir()
        with pytest.raises(DexportError, match="TensorRT cannot read this graph: NoSuchOperator") as caught:
            compile_graph(broken, sample.graph, output, target, "fp32")
        assert "\n" not in str(caught.value)

    def test_this_machine_s_gpu(self, tmp_path: Path) -> None:
        if backend("tensorrt").missing() is None:
            pytest.skip("there is a GPU")
        sample = SAMPLES["text"]()
        with pytest.raises(DexportError, match=r"this machine's GPU: .*; or name the GPU's generation: tensorrt:sm89"):
            compile_graph(sample.source, sample.graph, tmp_path, Target.parse("tensorrt"), "fp32")


class TestCache:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """A copy of a graph that may be changed, a cache and an output folder."""
        source = Path(shutil.copytree(SAMPLES["text"]().source.parent, tmp_path / "hub")) / "model.onnx"
        output = tmp_path / "text"
        output.mkdir()
        return source, tmp_path / "cache", output

    def compile(self, paths: tuple[Path, Path, Path], precision: str = "fp32", **options: Any) -> dict[str, bytes]:
        source, cache, output = paths
        for path in output.iterdir():
            path.unlink()
        graph = replace(SAMPLES["text"]().graph, **options.pop("graph", {}))
        built = compile_graph(source, graph, output, Target.parse("openvino"), precision, cache=cache, **options)
        assert built.file == "text/model.xml"
        return {path.name: path.read_bytes() for path in output.iterdir()}

    def entries(self, paths: tuple[Path, Path, Path]) -> list[Path]:
        return sorted(paths[1].iterdir())

    def test_a_second_time_comes_from_the_cache(self, paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.compile(paths)
        assert len(self.entries(paths)) == 1
        with monkeypatch.context() as patch:
            patch.setattr("exporter.compile.openvino.build", lambda *_: pytest.fail("built again"))
            assert self.compile(paths) == first

    def test_everything_that_matters_is_in_the_key(self, paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compile(paths)
        self.compile(paths, precision="bf16")
        self.compile(paths, max_batch=3)
        self.compile(paths, graph={"inputs": (Tensor("tokens", "int64", (1, 16)),)})
        weights = paths[0].with_name("model.onnx.data")
        changed = bytearray(weights.read_bytes())
        changed[100] ^= 1
        weights.write_bytes(changed)
        self.compile(paths)
        monkeypatch.setattr("exporter.compile.openvino.version", lambda: "another")
        self.compile(paths)
        monkeypatch.setattr("exporter.cache._code", lambda: "changed")
        self.compile(paths)
        assert len(self.entries(paths)) == 7

    @pytest.mark.parametrize("damage", ["flip", "missing", "extra", "entry", "graph", "folder"])
    def test_a_damaged_entry_is_built_again(self, paths: Any, damage: str) -> None:
        first = self.compile(paths)
        (entry,) = self.entries(paths)
        if damage == "flip":
            data = bytearray((entry / "model.bin").read_bytes())
            data[-1] ^= 1
            (entry / "model.bin").write_bytes(data)
        elif damage == "missing":
            (entry / "model.bin").unlink()
        elif damage == "extra":
            (entry / "more").write_bytes(b"")
        elif damage == "graph":  # that says other things of files that are right
            text = (entry / "entry.json").read_text()
            (entry / "entry.json").write_text(text.replace('"model.xml"', '"nope.xml"', 1))
        elif damage == "folder":
            (entry / "entry.json").unlink()
            (entry / "entry.json").mkdir()
        else:
            (entry / "entry.json").write_text("{}")
        assert self.compile(paths) == first
        assert [path.name for path in self.entries(paths)] == [entry.name]
        assert {path.name for path in entry.iterdir()} == {"entry.json", "model.bin", "model.xml"}

    def test_what_killed_writers_left_is_swept_after_a_day(self, paths: Any) -> None:
        for name, age in ((".partial.old", 25), (".partial.new", 1)):
            (paths[1] / name).mkdir(parents=True)
            (paths[1] / name / "model.bin").write_bytes(b"half")
            os.utime(paths[1] / name, (time.time() - age * 3600,) * 2)
        self.compile(paths)
        left = {path.name for path in self.entries(paths)}
        assert ".partial.new" in left and ".partial.old" not in left and len(left) == 2

    def test_weights_elsewhere_are_refused(self, paths: Any) -> None:
        weights = paths[0].with_name("model.onnx.data")
        weights.rename(weights.with_name("other"))
        weights.symlink_to("other")
        with pytest.raises(DexportError, match="which is no file beside it"):
            self.compile(paths)


def test_large_weights_are_stored_in_fp16_and_the_rest_is_left() -> None:
    random = np.random.default_rng(0)
    weights = {
        "w": random.standard_normal((64, 32)).astype(np.float32), "b": np.ones(32, np.float32),
        "beyond": np.full((64, 32), 1e6, np.float32), "scale": np.full(2048, 0.1, np.float32),
        "zero": np.zeros(2048, np.int8),
    }  # fmt: skip
    text = (
        "g (float[B,64] x, float[B,2048] z) => (float[B,32] y, float[B,2048] t) { p = MatMul(x, w) q = Add(p, b)"
        " r = MatMul(x, beyond) y = Add(q, r) n = QuantizeLinear<axis=1>(z, scale, zero)"
        " t = DequantizeLinear<axis=1>(n, scale, zero) }"
    )
    model, modified = openvino.store_in_fp16(small.graph(text, weights))
    kinds = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert modified and kinds["w_fp16"] == ir.DataType.FLOAT16 and "w" not in kinds
    assert all(kinds[name] == ir.DataType.FLOAT for name in ("b", "beyond", "scale"))
    given = {
        "x": random.standard_normal((3, 64)).astype(np.float32),
        "z": random.standard_normal((3, 2048), np.float32),
    }
    whole, half = (small.run(one, given) for one in (small.graph(text, weights), model))
    assert 0 < np.abs(half["y"] - whole["y"]).max() / np.abs(whole["y"]).max() < 1e-3
    np.testing.assert_array_equal(half["t"], whole["t"])


def test_what_is_beside_8_bits_may_compute_in_f32_too() -> None:
    graph = Graph("denoiser", "denoiser/model.xml", (), (), {"INFERENCE_PRECISION_HINT": "bf16", "weights": "fp16"})
    (other,) = alternatives(graph, Target.parse("openvino"), "int8")
    assert other == replace(graph, properties={**graph.properties, "INFERENCE_PRECISION_HINT": "f32"})
    assert alternatives(other, Target.parse("openvino"), "int8") == ()
    for target, precision in (("openvino", "bf16"), ("openvino:gpu", "int8"), ("onnxruntime", "int8")):
        assert alternatives(graph, Target.parse(target), precision) == ()
