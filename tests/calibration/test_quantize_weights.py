"""How weights are rounded, and what a quantized graph holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration import layers, quantize
from runtimes.errors import DexportError
from tests.calibration.small import Array, fake, graph, run

RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 3, 3)])
def test_weights_are_within_half_a_step_and_use_all_of_them(shape: tuple[int, ...], axis: int) -> None:
    weight = normal(*shape) * np.exp(normal(*shape))
    scale = quantize.weight_scale(weight, axis)
    numbers = quantize.round_weight(weight, scale, axis)
    assert numbers.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (shape[axis],)
    steps = np.moveaxis(weight, axis, -1).astype(np.float64) / scale
    assert np.abs(np.moveaxis(numbers, axis, -1) - steps).max() <= 0.5 + 1e-5
    others = tuple(index for index in range(weight.ndim) if index != axis)
    np.testing.assert_array_equal(np.abs(numbers.astype(int)).max(others), 127)  # each channel's own range


def test_a_weight_of_one_sign_is_symmetric_too() -> None:
    for weight in (np.array([[1.0, 3.0]], np.float32), np.array([[-1.0, -3.0]], np.float32)):
        np.testing.assert_allclose(quantize.weight_scale(weight, 0), [3 / 127], rtol=1e-6)


@pytest.mark.parametrize("least", [0.0, 1e-44, 1e-38, 1e-31])
def test_silent_channels_have_a_scale_that_can_be_divided_by(least: float) -> None:
    weight = normal(3, 4)
    weight[1] = least
    scale = quantize.weight_scale(weight, 0)
    assert (scale > 0).all() and np.isfinite(1 / scale).all()
    held = quantize.round_weight(weight, scale, 0) * scale[:, None]
    assert np.abs(held[1] - weight[1]).max() <= max(least / 127, 1e-30)
    if not least:
        assert (held[1] == 0).all() and scale[1] == scale.max()  # a bias is held in steps of it
    np.testing.assert_array_equal(quantize.weight_scale(np.zeros((3, 4), np.float32), 0), 1)


def test_a_weight_read_along_both_axes_is_rounded_along_both() -> None:
    w = normal(6, 6) * np.exp(normal(6, 1))
    text = "g (float[B,6] x) => (float[B,6] y) { h = MatMul(x, w) k = Gemm<transB=1>(x, w) y = Sub(h, k) }"
    model, x = graph(text, {"w": w}), normal(9, 6)
    quantize.write(model, layers.find(model)[0], {"x": 0.03})
    x_held = fake(x.astype(np.float64), 0.03)
    columns, rows = (fake(w, np.abs(w).max(axis, keepdims=True) / 127.0) for axis in (0, 1))
    np.testing.assert_allclose(run(model, {"x": x})["y"], x_held @ columns - x_held @ rows.T, atol=1e-5)


def test_two_layers_with_one_input_and_one_weight_have_one_pair_each() -> None:
    text = (
        "g (float[B,4,6,6] x) => (float[B,4,6,6] y) { h = Conv(x, w, b) k = Conv(x, w) z = Conv(h, w)"
        " y = Sum(h, k, z) }"
    )
    weights, x = {"w": normal(4, 4, 1, 1), "b": normal(4)}, normal(2, 4, 6, 6)
    model = graph(text, weights)
    quantize.write(model, layers.find(model)[0], {"x": 0.03, "h": 0.06})
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("DequantizeLinear") == 3
    assert {"w_quantized", "b"} < set(model.graph.initializers) and "w" not in model.graph.initializers
    w = fake(weights["w"], np.abs(weights["w"]).max(1, keepdims=True) / 127.0)[:, :, 0, 0].astype(np.float64)
    products = [np.einsum("bchw,oc->bohw", fake(x.astype(np.float64), 0.03), w)] * 2
    products[0] = products[0] + weights["b"].reshape(4, 1, 1)
    products.append(np.einsum("bchw,oc->bohw", fake(products[0], 0.06), w))
    # A value of h between two steps may be rounded to either by float32.
    found = run(model, {"x": x})["y"]
    close = np.isclose(found, sum(products), atol=1e-5 * np.abs(found).max())
    assert close.mean() > 0.99 and np.abs(found - sum(products)).max() < 0.06 * np.abs(w).max() * 1.01


def test_a_file_holds_8_bit_weights_that_onnx_accepts(tmp_path: Path) -> None:
    """Weights are rounded as the file is written, from a file whose pages are let go of."""
    weights = {"w": normal(64, 128)}
    text = "g (float[B,64] x) => (float[B,128] y) { y = MatMul(x, w) }"
    ir.save(graph(text, weights), tmp_path / "float.onnx", external_data="float.data")
    model = ir.load(tmp_path / "float.onnx")
    quantize.write(model, layers.find(model)[0], {"x": 0.03})
    expected = run(model, {"x": (x := normal(3, 64))})["y"]
    ir.save(model, tmp_path / "int8.onnx", external_data="int8.data")
    onnx.checker.check_model(tmp_path / "int8.onnx", full_check=True)
    assert (tmp_path / "int8.data").stat().st_size < 0.35 * (tmp_path / "float.data").stat().st_size
    np.testing.assert_array_equal(
        run(ir.external_data.load_to_model(ir.load(tmp_path / "int8.onnx")), {"x": x})["y"], expected
    )


def test_the_scale_of_an_output_is_noted_and_asked_for() -> None:
    text = "g (float[B,4,6,6] x) => (float[B,5,6,6] y) { y = Conv(x, w) }"
    for scales in ({"x": 0.03, "y": 0.1 + 0.2}, {"x": 0.03}):
        model = graph(text, {"w": normal(5, 4, 1, 1)})
        quantize.write(model, layers.find(model)[0], scales)
        (node,) = (node for node in model.graph if node.op_type == "Conv")
        if "y" in scales:
            assert quantize.output_scale(node) == scales["y"]
        else:
            with pytest.raises(DexportError, match=r"'Conv_0' .* not noted; quantize it anew"):
                quantize.output_scale(node)
