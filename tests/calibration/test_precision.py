"""Precision written as casts: close to fp32, high where it must be, and refused where it cannot hold the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from calibration.precision import cast
from runtimes.errors import DexportError
from tests.exporter.graphs import SAMPLES, relative, sines

BANDS = {"fp16": 5e-3, "bf16": 3e-2}


@pytest.mark.parametrize("precision", list(BANDS))
@pytest.mark.parametrize("name", list(SAMPLES))
def test_close_to_torch(name: str, precision: str, tmp_path: Path) -> None:
    """Run by ONNX's own reference evaluator, which computes in the types that the graph says."""
    sample = SAMPLES[name]()
    model, modified = cast(ir.load(sample.source), precision)
    assert modified
    file = tmp_path / "model.onnx"
    ir.save(model, file, external_data="model.onnx.data")
    onnx.checker.check_model(file, full_check=True)
    inputs = sample.inputs(2, 3)
    with np.errstate(divide="ignore", invalid="ignore"):  # T5 takes the logarithm of a distance of 0, and leaves it out
        (found,) = ReferenceEvaluator(str(file)).run(None, inputs)
    assert found.dtype == np.float32
    error = relative(found, sample.expected(inputs))
    assert 1e-5 < error < BANDS[precision], "an error below that of fp32 would mean that nothing was narrowed"


@pytest.mark.parametrize("precision", list(BANDS))
def test_sines_of_plain_numbers_are_those_of_float32(precision: str, tmp_path: Path) -> None:
    sample = sines()
    model, _ = cast(ir.load(sample.source), precision)
    ir.save(model, tmp_path / "model.onnx")
    inputs = sample.inputs(3, 3)
    (found,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, inputs)
    assert relative(found, sample.expected(inputs)) < 1e-3


@pytest.mark.parametrize("precision", list(BANDS))
def test_what_stays_high_and_what_does_not(precision: str, tmp_path: Path) -> None:
    sample = SAMPLES["denoiser"]()
    narrow = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    model, _ = cast(ir.load(sample.source), precision)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    model = ir.load(tmp_path / "model.onnx")
    kinds: dict[str, set[ir.DataType | None]] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.dtype is not None and value.dtype.is_floating_point():
                kinds.setdefault(node.op_type, set()).add(value.dtype)
    for name in ("GroupNormalization", "LayerNormalization", "Sin", "Cos"):
        assert kinds[name] == {ir.DataType.FLOAT}
    for name in ("Conv", "Attention", "MatMul"):
        assert kinds[name] == {narrow}
    assert all(node.attributes["softmax_precision"].value == 1 for node in model.graph if node.op_type == "Attention")
    assert all(value.dtype == ir.DataType.FLOAT for value in (*model.graph.inputs, *model.graph.outputs))
    assert [value.name for value in model.graph.outputs] == ["output"]
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert size < 0.6 * sample.source.with_name("model.onnx.data").stat().st_size


def test_fp32_changes_nothing() -> None:
    model = ir.load(SAMPLES["text"]().source)
    before = [node.op_type for node in model.graph]
    assert cast(model, "fp32") == (model, False)
    assert [node.op_type for node in model.graph] == before
    with pytest.raises(DexportError, match="no precision 'int8'"):
        cast(model, "int8")


@pytest.mark.parametrize("precision", list(BANDS))
def test_what_is_kept_computes_in_float32(precision: str, tmp_path: Path) -> None:
    sample = SAMPLES["decoder"]()
    model = ir.load(sample.source)
    first = {
        kind: next(str(node.name) for node in model.graph if node.op_type == kind) for kind in ("Conv", "Attention")
    }
    cast(model, precision, frozenset(first.values()))
    file = tmp_path / "model.onnx"
    ir.save(model, file, external_data="model.onnx.data")
    onnx.checker.check_model(file, full_check=True)
    model = ir.load(file)
    for kind, name in first.items():
        for node in (node for node in model.graph if node.op_type == kind):
            floats = {value.dtype for value in node.inputs if value is not None}
            assert (floats == {ir.DataType.FLOAT}) == (node.name == name)
            assert ("softmax_precision" in node.attributes) == (kind == "Attention" and node.name != name)
    inputs = sample.inputs(1, 3)
    (found,) = ReferenceEvaluator(str(file)).run(None, inputs)
    assert 1e-5 < relative(found, sample.expected(inputs)) < BANDS[precision]


def test_kept_weights_may_be_out_of_range_and_kept_nodes_must_exist() -> None:
    model = linear(np.array([[1, 2], [3, 70_000]]))
    next(iter(model.graph)).name = "large"
    with pytest.raises(DexportError, match="no node 'small' to keep in float32"):
        cast(model, "fp16", {"small"})
    cast(model, "fp16", {"large"})
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT]
    assert [node.op_type for node in model.graph] == ["MatMul"]  # no cast around what is float32 on both sides


def linear(weight: np.ndarray, normalize: bool = False) -> ir.Model:
    """x [batch,2] times a weight, then perhaps a softmax."""
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["z" if normalize else "y"])]
    if normalize:
        nodes.append(helper.make_node("Softmax", ["z"], ["y"], axis=-1))
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def test_weights_out_of_range_are_named() -> None:
    large = np.array([[1, 2], [3, 70_000]])
    with pytest.raises(DexportError, match=r"weight 'weight' holds 70000, and fp16 ends at 65504; use bf16 or fp32"):
        cast(linear(large), "fp16")
    cast(linear(large), "bf16")  # which has the range of fp32


def test_weights_are_rounded_to_nearest_and_masks_stay_finite() -> None:
    lowest = np.finfo(np.float32).min
    weight = np.array([[1 + 2**-11 + 2**-20, lowest], [0.1, 2.0]], np.float32)
    model, _ = cast(linear(weight), "fp16")
    (tensor,) = (value.const_value for value in model.graph.initializers.values())
    assert tensor is not None
    expected = np.array([[1 + 2**-10, np.finfo(np.float16).min], [0.1, 2.0]], np.float16)
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_softmax_stays_in_float32() -> None:
    model, _ = cast(linear(np.eye(2), normalize=True), "bf16")
    types = {node.op_type: node.inputs[0].dtype for node in model.graph if node.inputs[0] is not None}
    assert types["MatMul"] == ir.DataType.BFLOAT16
    assert types["Softmax"] == ir.DataType.FLOAT
    assert model.graph.outputs[0].producer().op_type == "Softmax"  # type: ignore[union-attr]  # no cast behind it


def test_branches_are_refused() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "body", [], [helper.make_tensor_value_info("b", 1, ["batch", 2])]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], name="choice", then_branch=body, else_branch=body)], "graph",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, ["batch", 2])],
        [helper.make_tensor_value_info("y", 1, ["batch", 2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(DexportError, match="If 'choice' has a branch"):
        cast(ir.from_proto(model), "fp16")
