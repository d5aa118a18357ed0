"""Narrow weights: rounded as numpy does it, stored once, and run by both runtimes with the rounded weights' result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.weights import FINE, GROUP, RATIOS, narrow, quantize
from exporter.compile import compile_graph, onnxruntime, onnxruntime_weights, openvino
from runtimes.accuracy import compare
from runtimes.backends.openvino import GROUP_SIZE, load
from runtimes.errors import DexportError, silent
from runtimes.manifest import Graph, Tensor
from runtimes.session import Array, backend
from runtimes.target import Target
from tests.exporter.graphs import SAMPLES

RNG = np.random.default_rng(5)
VOCAB, WIDTH, ODD = 70, 64, 40  # ODD: input channels that 4-bit groups do not divide


def weights() -> dict[str, Array]:
    """One of each kind; a channel of zeros, a group of zeros, a row of zeros and an outlier among them."""
    shapes = {
        "table": (VOCAB, WIDTH), "matrix": (WIDTH, WIDTH), "gemm": (WIDTH, WIDTH), "bias": (WIDTH,),
        "conv": (ODD, 6, 3, 3), "last": (ODD, 33), "last_bias": (33,),
    }  # fmt: skip
    made = {name: RNG.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    made["table"][3] = made["conv"][5] = made["matrix"][:32, 7] = made["matrix"][:, 8] = 0
    made["matrix"][40, 2] = -20
    return made


WEIGHTS = weights()


def model(values: dict[str, Array], opset: int = 23) -> ir.Model:
    """Table, MatMul, Gemm with a turned weight and a bias, Conv, and MatMul with a bias added."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["narrower"]),
        helper.make_node("Reshape", ["narrower", "flat"], ["flattened"]),
        helper.make_node("Gemm", ["flattened", "gemm", "bias"], ["wider"], transB=1),
        helper.make_node("Reshape", ["wider", "picture"], ["pixels"]),
        helper.make_node("Conv", ["pixels", "conv"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["convolved", "columns"], ["column"]),
        helper.make_node("MatMul", ["column", "last"], ["product"]),
        helper.make_node("Add", ["product", "last_bias"], ["output"]),
    ]
    shapes = {"flat": [-1, WIDTH], "picture": [-1, 6, 8, 8], "columns": [-1, 64, ODD]}
    arrays = {**values, **{name: np.array(shape, np.int64) for name, shape in shapes.items()}}
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 64, 33])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


GRAPH = Graph("text", "", (Tensor("tokens", "int64", ("batch", 6)),), (Tensor("output", "float32", ("batch", 64, 33)),))
TOKENS = {"tokens": RNG.integers(0, VOCAB, (2, 6))}


def rounded(bits: int) -> dict[str, Array]:
    """The weights as they are meant to be after ``narrow``, made with numpy alone."""
    made = dict(WEIGHTS)
    for name, axis in {"table": 0, "matrix": 1, "gemm": 0, "conv": 0, "last": 1}.items():
        whole = {"matrix": oracle4(WEIGHTS["matrix"]), "gemm": oracle4(WEIGHTS["gemm"].T).T} if bits == 4 else {}
        made[name] = whole[name] if name in whole else oracle8(WEIGHTS[name], axis)
    return made


def oracle8(weight: Array, axis: int) -> Array:
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(others, keepdims=True).astype(np.float32) / np.float32(127)
    return np.rint(weight / np.where(scale > 0, scale, 1)) * scale


def oracle4(weight: Array) -> Array:
    """Of a matrix [in, out]: each group of 32 inputs with the clip ratio that has the least squared error."""
    result = np.empty_like(weight)
    for column in range(weight.shape[1]):
        for start in range(0, len(weight), 32):
            group = weight[start : start + 32, column]
            tries = []
            for ratio in RATIOS:
                scale = np.abs(group).max() * np.float32(ratio / 7)
                tries.append(np.clip(np.rint(group / (scale or 1)), -8, 7) * scale)
            result[start : start + 32, column] = min(tries, key=lambda made: float(np.square(made - group).sum()))
    return result


def save(made: ir.Model, folder: Path) -> Path:
    folder.mkdir(parents=True)
    ir.save(made, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return folder / "model.onnx"


def run(source: Path, runtime: str, graph: Graph, inputs: dict[str, Array], exact: bool = True) -> Array:
    """Compile with the runtime's dialect and run; ``exact``: OpenVINO is not to round activations."""
    folder = source.parent / runtime
    folder.mkdir()
    if runtime == "openvino":
        built = openvino.build(source, graph, folder, Target("openvino", "cpu"), "fp32", 1, silent)
        built = replace(built, properties={**built.properties, **({GROUP_SIZE: "0"} if exact else {})})
    else:
        made = ir.load(source)
        for rewrite in (*onnxruntime.REWRITES, *onnxruntime_weights.REWRITES):
            made, _ = rewrite(made)
        ir.save(made, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
        built = replace(graph, file="onnxruntime/model.onnx")
    return next(iter(backend(runtime).open(source.parent / built.file, built, "cpu", 1, None).run(inputs).values()))


@pytest.mark.parametrize(("shape", "axis"), [((70, 50), 0), ((70, 50), 1), ((8, 5, 3, 3), 0), ((600, 700), 1)])
def test_int8_is_within_half_a_step(shape: tuple[int, ...], axis: int) -> None:
    weight = RNG.standard_normal(shape, np.float32) * RNG.uniform(1e-3, 10, shape[-1]).astype(np.float32)
    numbers, scale = quantize(weight, axis, 8)
    assert numbers.dtype == np.int8 and scale.shape == (shape[axis],)
    others = tuple(index for index in range(len(shape)) if index != axis)
    np.testing.assert_array_equal(np.abs(numbers).max(others), 127)  # each channel uses its whole range
    wide = np.expand_dims(scale, others)
    assert (np.abs(numbers * wide - weight) <= wide * 0.50001).all()


def test_int4_takes_the_least_error_of_the_ratios() -> None:
    weight = WEIGHTS["matrix"]
    numbers, scale = quantize(weight, 1, 4, GROUP)
    assert numbers.shape == weight.shape and scale.shape == (WIDTH // 32, WIDTH)
    wide = numbers.astype(np.float32) * np.repeat(scale, 32, 0)
    np.testing.assert_allclose(wide, oracle4(weight), atol=1e-6)
    turned, turned_scale = quantize(np.ascontiguousarray(weight.T), 0, 4, GROUP)
    np.testing.assert_array_equal(turned.T.astype(np.int8), numbers.astype(np.int8))
    np.testing.assert_array_equal(turned_scale.T, scale)
    plain = np.abs(weight.reshape(2, 32, WIDTH)).max(1) / 7
    unclipped = np.rint(weight / np.repeat(np.where(plain > 0, plain, 1), 32, 0)) * np.repeat(plain, 32, 0)
    assert np.square(wide - weight).sum() < 0.95 * np.square(unclipped - weight).sum()


def test_groups_of_int8_are_within_half_a_step_of_their_own_peak() -> None:
    weight = WEIGHTS["matrix"] * np.logspace(-30, 30, WIDTH, dtype=np.float32)
    numbers, scale = quantize(weight, 1, 8, FINE)
    assert numbers.dtype == np.int8 and scale.dtype == ml_dtypes.bfloat16 and scale.shape == (WIDTH // FINE, WIDTH)
    plain = np.abs(weight.reshape(-1, FINE, WIDTH)).max(1).astype(np.float64) / 127
    used = scale.astype(np.float64)[plain > 0] / plain[plain > 0]
    assert used.min() > 1 - 1e-6 and used.max() < 1 + 2.0**-7  # rounded up to 8 significant bits
    wide = np.repeat(scale.astype(np.float64), FINE, 0)
    assert (np.abs(numbers * wide - weight) <= 0.50001 * wide).all()
    turned, turned_scale = quantize(np.ascontiguousarray(weight.T), 0, 8, FINE)
    np.testing.assert_array_equal(turned.T, numbers)
    np.testing.assert_array_equal(turned_scale.T, scale)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_text_encoder_in_w8_runs_as_its_weights_rounded_in_groups(runtime: str, tmp_path: Path) -> None:
    """Nothing but the weights is rounded, the table's too, and the file holds 8-bit numbers."""
    values = dict(WEIGHTS)
    for name, axis in {"table": 0, "matrix": 1, "gemm": 0}.items():
        numbers, scale = quantize(WEIGHTS[name], axis, 8, FINE)
        values[name] = numbers * np.repeat(scale.astype(np.float32), FINE, 1 - axis)
    values |= {"conv": oracle8(WEIGHTS["conv"], 0), "last": oracle8(WEIGHTS["last"], 1)}  # ODD: no whole groups
    found = {}
    for name, precision, weights in (("rounded", "fp32", values), ("narrow", "w8", WEIGHTS)):
        source, folder = save(model(weights), tmp_path / name), tmp_path / name / "text"
        folder.mkdir()
        built = compile_graph(source, GRAPH, folder, Target(runtime, "cpu"), precision)
        session = backend(runtime).open(folder.parent / built.file, built, "cpu", 1, None)
        found[name] = next(iter(session.run(TOKENS).values()))
    np.testing.assert_allclose(found["narrow"], found["rounded"], atol=2e-6 * float(np.abs(found["rounded"]).max()))
    wide, narrowed = (max((tmp_path / name / "text").iterdir(), key=lambda file: file.stat().st_size).stat().st_size
                      for name in ("rounded", "narrow"))  # fmt: skip
    assert narrowed < 0.5 * wide


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, FINE), (4, GROUP)])
@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_zeros_and_extremes_stay_finite(bits: int, group: int, value: float) -> None:
    weight = np.full((32, 4), value, np.float32)
    numbers, scale = quantize(weight, 1, bits, group)
    assert (scale > 0).all() and np.isfinite(scale.astype(np.float32)).all()
    scale = np.repeat(scale.astype(np.float64), 32 // len(np.atleast_2d(scale)), 0) if group else scale
    np.testing.assert_allclose(numbers.astype(np.float64) * scale, weight, rtol=0.08, atol=1e-38)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runs_as_the_rounded_weights_do(runtime: str, bits: int, tmp_path: Path, monkeypatch: Any) -> None:
    expected = run(save(model(rounded(bits)), tmp_path / "float"), runtime, GRAPH, TOKENS)
    made, modified = narrow(model(WEIGHTS), bits)
    assert modified
    source = save(made, tmp_path / "narrow")
    monkeypatch.setattr(onnxruntime_weights, "INT8_INPUT", 1)  # activations in float
    found = run(source, runtime, GRAPH, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_holds_numbers_alone(bits: int, tmp_path: Path) -> None:
    made, _ = narrow(model(WEIGHTS), bits)
    stored = ir.load(save(made, tmp_path / "narrow")).graph.initializers
    kinds = {
        name.partition("_int")[0]: str(value.dtype) for name, value in stored.items() if value.dtype.name[:3] == "INT"
    }
    assert {name for name, kind in kinds.items() if kind == "INT8"} >= {"table", "conv", "last"}
    assert kinds["matrix"] == kinds["gemm"] == f"INT{bits}"
    assert not set(stored) & {"table", "matrix", "gemm", "conv", "last"} and {"bias", "last_bias"} <= set(stored)
    numbers = next(
        value for name, value in stored.items() if name.startswith("matrix") and value.dtype.name[:3] == "INT"
    )
    assert numbers.const_value.nbytes == WIDTH * WIDTH * bits // 8
    np.testing.assert_array_equal(
        numbers.const_value.numpy(), quantize(WEIGHTS["matrix"], 1, bits, GROUP if bits == 4 else 0)[0]
    )  # unpacked
    operators = Counter(node.op_type for node in made.graph)
    assert operators["DequantizeLinear"] == 4 and operators["Gather"] == 2  # the table is not dequantized
    assert [value.name for value in made.graph.outputs] == ["output"]


def test_onnxruntime_takes_each_in_its_own_form(tmp_path: Path) -> None:
    made, _ = narrow(model(WEIGHTS), 4)
    made = ir.load(save(made, tmp_path / "narrow"))
    for rewrite in onnxruntime_weights.REWRITES:
        made, modified = rewrite(made)
        assert modified
    nodes = [node for node in made.graph if node.op_type == "MatMulNBits"]
    attributes = [{name: value.value for name, value in node.attributes.items()} for node in nodes]
    assert [(one["bits"], one["K"], one["N"], one["block_size"]) for one in attributes] == [
        (4, WIDTH, WIDTH, 32), (4, WIDTH, WIDTH, 32), (8, ODD, 33, 16),
    ]  # fmt: skip
    assert [[str(value.name) for value in node.inputs[5:] if value] for node in nodes] == [[], ["bias"], ["last_bias"]]
    assert not {"Add", "DequantizeLinear", "MatMul", "Gemm"} & {node.op_type for node in made.graph}
    assert onnxruntime_weights.multiply(made) == (made, False)


def test_pack_puts_the_low_half_first() -> None:
    packed = onnxruntime_weights.pack(np.array([[-8, 7, 0, 1, -1]], np.int8), 16, 4)
    assert packed.shape == (1, 1, 8)
    np.testing.assert_array_equal(packed[0, 0], [0xF0, 0x98, 0x87, 0x88, 0x88, 0x88, 0x88, 0x88])
    bytes_ = onnxruntime_weights.pack(np.array([[-128, 127, 0]], np.int8), 16, 8)
    np.testing.assert_array_equal(bytes_[0, 0], [0, 255, *[128] * 14])


@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_keeps_the_numbers(bits: int, tmp_path: Path) -> None:
    made, _ = narrow(model(WEIGHTS), bits)
    source = save(made, tmp_path / "narrow")
    run(source, "openvino", GRAPH, TOKENS)
    read = load().Core().read_model(source.parent / "openvino" / "model.xml")
    constants = [node.output(0) for node in read.get_ops() if node.get_type_name() == "Constant"]
    types = Counter(value.get_element_type().get_type_name() for value in constants if np.prod(value.shape) >= 1024)
    assert types == ({"i8": 5} if bits == 8 else {"i8": 3, "i4": 2})


def test_a_shared_weight_is_stored_once() -> None:
    made = model(WEIGHTS)
    rows, matrix = made.graph.node(0).outputs[0], made.graph.initializers["matrix"]
    second = ir.Node("", "MatMul", [rows, matrix], outputs=[ir.Value(name="second", type=rows.type)])
    made.graph.insert_after(made.graph.node(1), second)
    made.graph.outputs.append(second.outputs[0])
    made, _ = narrow(made, 8)
    assert Counter(node.op_type for node in made.graph)["DequantizeLinear"] == 4
    first = next(node for node in made.graph if node.op_type == "MatMul")
    assert first is not second and first.inputs[1] is second.inputs[1]
    assert len([name for name in made.graph.initializers if name.startswith("matrix")]) == 2
    for rewrite in onnxruntime_weights.REWRITES:
        made, _ = rewrite(made)
    assert len([name for name in made.graph.initializers if name.startswith("matrix")]) == 2


@pytest.mark.parametrize("output", ["Gather", "MatMul"])
def test_small_weights_stay_and_a_table_may_be_the_last(output: str) -> None:
    """A graph of one node: what it narrows keeps the output's name, and a weight of 32 × 31 is left alone."""
    small = np.ones((32, 31), np.float32)
    for weight, narrowed in ((small, False), (WEIGHTS["table"], True)):
        x = helper.make_tensor_value_info(
            "x", TensorProto.INT64 if output == "Gather" else TensorProto.FLOAT, [2, len(weight)]
        )
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        names = ["w", "x"] if output == "Gather" else ["x", "w"]
        graph = helper.make_graph(
            [helper.make_node(output, names, ["y"])], "graph", [x], [y], [numpy_helper.from_array(weight, "w")]
        )
        made = ir.from_proto(
            onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
        )
        assert narrow(made, 8) == (made, narrowed)
        assert ("w" in made.graph.initializers) is not narrowed
        assert [value.name for value in made.graph.outputs] == ["y"]
        assert all(
            isinstance(value.const_value, ir.LazyTensor) is narrowed for value in made.graph.initializers.values()
        )


def test_a_weight_that_something_else_reads_stays() -> None:
    made = model(WEIGHTS)
    matrix = made.graph.initializers["matrix"]
    turned = ir.Node("", "Transpose", [matrix], outputs=[ir.Value(name="turned", type=matrix.type)])
    made.graph.append(turned)
    made.graph.outputs.append(turned.outputs[0])
    made, modified = narrow(made, 8)
    assert modified and "matrix" in made.graph.initializers and "gemm" not in made.graph.initializers


def test_nothing_to_narrow_and_wrong_use() -> None:
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    assert narrow(empty, 8) == (empty, False)
    with pytest.raises(DexportError, match="cannot be stored in 3 bits; choose 8 or 4"):
        narrow(empty, 3)
    with pytest.raises(DexportError, match="has opset 18, and narrow weights need 21"):
        narrow(model(WEIGHTS, 18), 8)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_text_encoder_stays_close(runtime: str, tmp_path: Path) -> None:
    sample = SAMPLES["text"]()
    inputs = sample.inputs(2, 1)
    made, modified = narrow(ir.load(sample.source), 8)
    assert modified
    found = run(save(made, tmp_path / "narrow"), runtime, sample.graph, inputs, exact=False)
    assert 35 < compare(sample.expected(inputs), found).sqnr_db < 90
