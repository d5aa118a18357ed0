"""What 8 bits save, layer by layer: the right pieces are timed, each once, and noise of the clock decides nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, quantize
from calibration.graph import Array
from calibration.mixed import Gain
from calibration.observe import Statistics
from calibration.recipe import Recipe
from exporter import latency
from runtimes.manifest import Graph, Tensor
from runtimes.target import Target
from tests.calibration.small import fake, graph, run
from tests.calibration.test_ranges import observed

RANDOM = np.random.default_rng(7)
TEXT = """g (float[B,6,32] sample) => (float[B,6,32] output) {
    first = MatMul(sample, w0)
    q = MatMul(first, wq)  qb = Add(q, bias)
    k = MatMul(first, wk)
    both = Add(qb, k)
    third = MatMul(both, w3)  fourth = MatMul(third, w4)
    output = MatMul(fourth, w5)
}"""
NAMES = {
    "w0": "net.first", "wq": "net.blocks.0.q", "wk": "net.blocks.0.k", "w3": "net.blocks.1.a", "w4": "net.blocks.2.a",
    "w5": "net.last",
}  # fmt: skip
INPUTS = {"sample": RANDOM.standard_normal((3, 6, 32)).astype(np.float32)}
BESIDE = Graph(
    "denoiser", "denoiser.onnx", (Tensor("sample", "float32", ("batch", 6, 32)),),
    (Tensor("output", "float32", ("batch", 6, 32)),),
)  # fmt: skip


def model() -> ir.Model:
    random = np.random.default_rng(1)
    weights = {name: random.standard_normal((32, 32)).astype(np.float32) for name in NAMES}
    made = graph(TEXT, {**weights, "bias": random.standard_normal(32).astype(np.float32)})
    for name, module in NAMES.items():
        made.graph.initializers[name].name = module
    return made


def values() -> dict[str, Array]:
    """All values of the graph on INPUTS, by name."""
    made = model()
    made.graph.outputs.extend(value for node in list(made.graph)[:-1] for value in node.outputs)
    return {**INPUTS, **run(made, INPUTS)}


@pytest.mark.parametrize("form", ["float", "8 bits"])
def test_layers_that_share_an_input_are_cut_out_together_with_their_biases(form: str) -> None:
    exact, whole = values(), model()
    statistics = Statistics("", {}, (), {name: observed(value) for name, value in exact.items()})
    groups = latency._groups(whole, statistics)
    assert [[layer.name for layer in group] for group in groups] == [
        ["net.blocks.0.q", "net.blocks.0.k"], ["net.blocks.1.a"], ["net.blocks.2.a"],
    ]  # fmt: skip  # the first and the last layer stay in floating point anyway
    scale, weight = 0.3, lambda name: whole.graph.initializers[f"net.blocks.0.{name}"].const_value.numpy()
    matrices = {name: np.array(weight(name)) for name in "qk"}
    x, source = exact["first"], model()
    if form == "8 bits":
        chosen = [layer for layer in layers.find(source)[0] if "blocks.0" in layer.name]
        source, _ = quantize.write(source, chosen, {"first": scale})
        x = fake(x, scale)
        matrices = {name: fake(matrix, quantize.weight_scale(matrix, 1)) for name, matrix in matrices.items()}
    piece = latency._cut(source, groups[0], x.shape)
    assert {node.op_type for node in piece.graph} == {"MatMul", "Add"} | (
        {"QuantizeLinear", "DequantizeLinear"} if form == "8 bits" else set()
    )
    outputs = run(piece, {"sample": exact["first"]})
    bias = exact["qb"] - exact["q"]
    for name, expected in (("output_0", x @ matrices["q"] + bias), ("output_1", x @ matrices["k"])):
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_layer_is_timed_and_what_is_alike_once(target: str, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.onnx"
    ir.save(model(), file, external_data="weights", size_threshold_bytes=1024)  # as in a hub
    statistics = Statistics("", {}, (), {name: observed(value) for name, value in values().items()})
    said: list[str] = []
    found = latency.measure(
        file, BESIDE, statistics, Recipe(), INPUTS, Target.parse(target), "int8", tmp_path,
        lambda what, share: said.append(what),
    )  # fmt: skip
    assert list(found) == ["net.blocks.0.q", "net.blocks.0.k", "net.blocks.1.a", "net.blocks.2.a"]
    assert said == [f"{target}: timing net.blocks.0.q", f"{target}: timing net.blocks.1.a"]  # 2.a is like 1.a
    assert found["net.blocks.2.a"] == found["net.blocks.1.a"] and found["net.blocks.0.q"] == found["net.blocks.0.k"]
    assert all(gain.seconds > 0 and gain.error >= 0 and gain.saved < gain.seconds for gain in found.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denoiser.onnx", "weights"]  # nothing compiled stays


def test_a_gain_is_the_difference_of_what_two_forms_take_whatever_else_the_machine_does() -> None:
    """Delays of the exponential distribution, and from time to time a burst that hits most of the calls for a while.

    The standard error of its quantile p is sqrt(p(1 - p)/n) over the density there, (1 - p) for a mean delay of 1.
    """
    random, count = np.random.default_rng(2), 4000
    calm = np.array([4.0, 1.0]) + random.exponential(0.1, (count, 2))
    gain = latency._gain(calm.tolist())
    share = latency.QUANTILE
    assert gain.seconds == pytest.approx(4 - 0.1 * np.log(1 - share), rel=0.01)
    assert gain.saved == pytest.approx(3, rel=0.01)
    expected = 0.1 * (share * (1 - share) / count) ** 0.5 / (1 - share) * 2**0.5
    assert gain.error == pytest.approx(expected, rel=0.25)
    busy = calm + np.where(np.arange(count) % 100 < 60, 5.0, 0.0)[:, None]
    assert latency._gain(busy.tolist()).saved == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize(
    ("floating", "saved", "error", "slow"),
    [
        (1.0, 0.5, 0.01, False),
        (1.0, 0.0, 0.0, True),
        (1.0, 0.04, 0.001, True),  # surely, but too little
        (1.0, 0.0, 0.1, False),  # who knows
        (1.0, -0.5, 0.1, True),
    ],
)
def test_a_layer_is_slow_only_if_that_is_sure(floating: float, saved: float, error: float, slow: bool) -> None:
    assert Gain(floating, saved, error).slow is slow


@pytest.mark.parametrize(("saved", "error", "faster"), [(0.1, 0.01, True), (0.1, 0.05, False), (0.02, 0.0, False)])
def test_a_whole_model_is_faster_only_if_that_is_sure(saved: float, error: float, faster: bool) -> None:
    assert Gain(1.0, saved, error).faster is faster
