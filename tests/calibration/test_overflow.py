"""The end of fp16: peaks are what a run gives, islands are where they are near it, and the rest is really narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from calibration.overflow import Island, PeakObserver, islands, watch_peaks, watched_graph
from calibration.precision import MASKED, cast
from exporter import hub
from runtimes.accuracy import compare
from runtimes.backends import onnxruntime as backend
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor

Array = NDArray[Any]
GRAPH = Graph("decoder", "model.onnx", (Tensor("x", "float32", ("batch", 4)),), (Tensor("y", "float32", ("batch", 4)),))
HEAD = '<ir_version: 10, opset_import: ["": 23]> g (float[batch,4] x) => (float[batch,4] y)'
BRANCH = """<float s = {200000}, float one = {1}, float two = {2}> {
    [low] a = Add(x, one)
    [up] b = Mul(a, s)
    [turn] c = Neg(b)
    [down] d = Div(c, s)
    [side] e = Mul(x, two)
    [end] y = Add(d, e)
}"""
SCALE = 1.7e5  # makes 3e5 of the values behind the convolution
TWICE = """<float s = {200000}, float one = {1}> {
    [up] a = Mul(x, s)
    [down] b = Div(a, s)
    [between] c = Add(b, one)
    [up_2] d = Mul(c, s)
    [down_2] y = Div(d, s)
}"""
X = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)


def parsed(body: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + body)))


def peaks_of(model: ir.Model, folder: Path, *calls: Array, graph: Graph = GRAPH) -> dict[str, float]:
    """Watch a model, run it through the runtime's own session, and look at the peaks."""
    model, names = watch_peaks(model)
    ir.save(model, folder / "watched.onnx")
    inner = backend.open(folder / "watched.onnx", watched_graph(graph, names), "cpu", 1, None)
    observer = PeakObserver(inner, graph, names)
    for call in calls:
        outputs = observer.run({graph.inputs[0].name: call})
        assert list(outputs) == [tensor.name for tensor in graph.outputs]
    return observer.peaks()


def run(model: ir.Model, folder: Path, x: Array) -> Array:
    """Run a model by ONNX's reference evaluator, which computes in the types that the graph says.

    ONNX Runtime's CPU provider runs fp16 nodes in float32 and takes out the casts between them, whatever its level of
    optimization: there nothing overflows.
    """
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    with np.errstate(over="ignore", invalid="ignore"):  # it is numpy underneath
        results = ReferenceEvaluator(str(folder / "model.onnx")).run(None, {str(model.graph.inputs[0].name): x})
    return np.asarray(results[0])


def types(model: ir.Model) -> dict[str, set[str]]:
    """By node's name, the float types that it reads and writes."""
    return {
        str(node.name): {
            value.dtype.name for value in (*node.inputs, *node.outputs)
            if value is not None and value.dtype is not None and value.dtype.is_floating_point()
        }
        for node in model.graph
    }  # fmt: skip


def test_peaks_are_the_greatest_of_all_calls(tmp_path: Path) -> None:
    quiet, loud = X, -3 * X
    found = peaks_of(parsed(BRANCH), tmp_path, loud, quiet)
    both = np.concatenate([quiet, loud])
    expected = {"x": both, "a": both + 1, "b": (both + 1) * 2e5, "c": (both + 1) * 2e5, "d": both + 1, "e": 2 * both}
    expected["y"] = both - 1
    assert found == pytest.approx({name: float(np.abs(value).max()) for name, value in expected.items()}, rel=1e-6)


def test_watching_changes_no_output_and_stores_nothing(tmp_path: Path) -> None:
    model = parsed(BRANCH)
    expected = run(parsed(BRANCH), tmp_path, X)
    model, names = watch_peaks(model)
    np.testing.assert_array_equal(run(model, tmp_path, X), expected)
    assert [value.name for value in model.graph.outputs] == ["y", "peaks"]
    # Whoever reads a value waits for its reduction: else a runtime may leave that to the end, and hold the value.
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in ("a", "b", "c", "d", "e"):
        assert {use.node.op_type for use in made[name].uses()} == {"Reshape", "Shape"}
    assert names == ["x", "a", "b", "c", "d", "e", "y"]


def test_an_island_gives_the_right_value_and_the_rest_is_narrow(tmp_path: Path) -> None:
    expected = run(parsed(BRANCH), tmp_path, X)
    weight = "weight 's' holds 200000, and fp16 ends at 65504"
    with pytest.raises(DexportError, match=weight):
        cast(parsed(BRANCH), "fp16")
    model = parsed(BRANCH)
    keep, (island,) = islands(model, peaks_of(parsed(BRANCH), tmp_path, X))
    assert keep == {"up", "turn", "down"}
    assert island.nodes == ("up", "turn", "down") and island.peak == pytest.approx(200_000 * np.abs(X + 1).max())
    model, _ = cast(model, "fp16", keep)
    found = types(model)
    assert all(found[name] == {"FLOAT"} for name in keep)
    assert all(found[name] == {"FLOAT16"} for name in ("low", "side", "end"))
    assert 1e-5 < compare(expected, run(model, tmp_path, X)).relative < 2e-3


def test_plain_fp16_overflows_where_the_island_was(tmp_path: Path) -> None:
    body = BRANCH.replace("200000", "50000").replace("Add(x, one)", "Mul(x, four)").replace("one = {1}", "four = {4}")
    expected = run(parsed(body), tmp_path, X)
    plain, _ = cast(parsed(body), "fp16")
    assert np.isinf(run(plain, tmp_path, X)).any()
    keep, _ = islands(parsed(body), peaks_of(parsed(body), tmp_path, X))
    model, _ = cast(parsed(body), "fp16", keep)
    assert compare(expected, run(model, tmp_path, X)).relative < 2e-3


def test_nothing_is_kept_where_nothing_is_over(tmp_path: Path) -> None:
    low = BRANCH.replace("200000", "2")
    assert islands(parsed(low), peaks_of(parsed(low), tmp_path, X)) == (frozenset(), [])


def test_margin_and_limit() -> None:
    peaks = {"a": 1.0, "b": 33_000.0, "c": 32_000.0}
    model = parsed(BRANCH.replace("200000", "2"))
    assert islands(model, peaks)[0] == {"up", "turn"}
    assert islands(model, peaks, margin=1.9)[0] == set()
    assert islands(model, peaks, margin=2.1)[0] == {"up", "turn", "down"}
    assert islands(model, peaks, limit=31_000, margin=1)[0] == {"up", "turn", "down"}
    assert islands(model, {"b": float("inf")})[0] == {"up", "turn"}


def test_two_islands_are_two(tmp_path: Path) -> None:
    keep, found = islands(parsed(TWICE), peaks_of(parsed(TWICE), tmp_path, X))
    assert [island.nodes for island in found] == [("up", "down"), ("up_2", "down_2")]
    assert [(island.first, island.last) for island in found] == [("up", "down"), ("up_2", "down_2")]
    assert str(found[0]) == f"up to down: values up to {found[0].peak:.3g}, 2 nodes in float32"
    model, _ = cast(parsed(TWICE), "fp16", keep)
    assert types(model)["between"] == {"FLOAT16"}


def test_readers_of_one_large_input_are_one_island() -> None:
    keep, found = islands(parsed(BRANCH.replace("200000", "2")), {"x": 1e5})
    assert keep == {"low", "side"}
    assert [island.nodes for island in found] == [("low", "side")]


def test_the_squares_of_a_norm_are_kept_where_its_input_is_not(tmp_path: Path) -> None:
    """A root mean square in single nodes, as of T5: the reductions are float32 anyway, the nodes between are not."""
    body = """<float hundreds = {300}, float tiny = {0.000001}, int64[1] last = {-1}> {
        [up] a = Mul(x, hundreds)
        [square] b = Mul(a, a)
        [mean] c = ReduceMean(b, last)
        [sum] d = Add(c, tiny)
        [root] e = Sqrt(d)
        [norm] y = Div(a, e)
    }"""
    x = np.full((3, 4), 0.99, np.float32) * np.sign(X)
    expected = run(parsed(body), tmp_path, x)
    plain, _ = cast(parsed(body), "fp16")
    assert not np.abs(run(plain, tmp_path, x)).any()  # divided by infinity
    keep, (island,) = islands(parsed(body), peaks_of(parsed(body), tmp_path, x))
    assert island.nodes == ("square", "mean", "sum", "root") and set(island.nodes) == keep
    model, _ = cast(parsed(body), "fp16", keep)
    assert compare(expected, run(model, tmp_path, x)).relative < 2e-3
    assert types(model)["up"] == types(model)["norm"] == {"FLOAT16"}


def test_masks_are_no_overflow(tmp_path: Path) -> None:
    body = f"""<float[4] never = {{0, 0, 0, {MASKED!r}}}, float deep = {{-7}}> {{
        [shift] a = Mul(x, deep)
        [mask] b = Add(a, never)
        [soft] y = Softmax(b)
    }}"""
    peaks = peaks_of(parsed(body), tmp_path, X)
    assert peaks["b"] == pytest.approx(7 * np.abs(X[:, :3]).max())
    assert islands(parsed(body), peaks) == (frozenset(), [])


@pytest.mark.parametrize(
    ("made", "least"),
    [
        ("[log] b = Log(a)", 0.0),  # of 0 and of what is negative
        ("[part] b = Reciprocal(a)", 0.0),
        ("[part] b = Div(one, a)", 0.0),
        ("[part] b = Pow(a, minus)", 0.0),
        ("[mask] b = Add(a, never)", float("-inf")),
        ("[first] c = Add(a, never) [second] b = Add(c, never)", MASKED),  # together minus infinity
        ("[mask] b = Add(a, never)", float(np.finfo(np.float32).min)),
    ],
)
def test_what_float32_itself_has_no_number_for_is_no_overflow(tmp_path: Path, made: str, least: float) -> None:
    body = f"""<float zero = {{0}}, float one = {{1}}, float minus = {{-1}}, float[4] never = {{0, 0, 0, 0}}> {{
        [bound] a = Relu(x)
        {made}
        [choice] chosen = Greater(a, zero)
        [select] c2 = Where(chosen, b, a)
        [end] y = Add(c2, one)
    }}"""

    def model() -> ir.Model:
        with_mask = parsed(body)
        never = np.array([0, 0, 0, least], np.float32)
        with_mask.graph.initializers["never"].const_value = ir.tensor(never, name="never")
        return with_mask

    found = peaks_of(model(), tmp_path, X)
    assert found["b"] > 0 and max(found.values()) < 1e3
    assert islands(model(), found) == (frozenset(), [])


def test_what_is_larger_than_fp16_beside_an_infinity_is_an_island(tmp_path: Path) -> None:
    body = """<float zero = {0}, float many = {200000}> {
        [bound] a = Relu(x)
        [up] b = Div(many, a)
        [choice] chosen = Greater(a, zero)
        [select] c = Where(chosen, b, a)
        [down] y = Div(c, many)
    }"""
    found = peaks_of(parsed(body), tmp_path, X)
    assert found["b"] == pytest.approx(2e5 / X[X > 0].min(), rel=1e-6)
    assert islands(parsed(body), found)[0] == {"up", "select", "down"}


def test_what_does_not_belong_together_is_said() -> None:
    with pytest.raises(DexportError, match="the peak of 'z' is of another graph"):
        islands(parsed(TWICE), {"z": 1.0})
    with pytest.raises(DexportError, match="no peak was seen; run it once"):
        PeakObserver(type("Never", (), {"max_batch": None})(), GRAPH, ["x"]).peaks()


@pytest.fixture
def hot_decoder(copy_checkpoint: Callable[[], Path], tmp_path: Path) -> tuple[Path, Graph]:
    """A decoder with one convolution scaled, and the norm after it, which does not see scale."""
    checkpoint = copy_checkpoint()
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("weight", "bias"):
        hot = f"decoder.up_blocks.1.resnets.0.conv1.{name}"
        weights[hot] = weights[hot].astype(np.float32) * SCALE
    save_file(weights, file)
    model = hub.export(checkpoint, tmp_path / "hub", graphs=["decoder"])
    return tmp_path / "hub" / model.graphs["decoder"].file, model.graphs["decoder"]


def test_a_hot_decoder_is_right_with_its_island(hot_decoder: tuple[Path, Graph], tmp_path: Path) -> None:
    file, graph = hot_decoder
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    expected = run(ir.load(file), tmp_path, latents)
    peaks = peaks_of(ir.load(file), tmp_path, latents, graph=graph)
    assert 2.5e5 < max(peaks.values()) < 4e5
    plain, _ = cast(ir.load(file), "fp16")
    assert compare(expected, run(plain, tmp_path, latents)).sqnr_db < 10  # NaN counts as -200
    keep, found = islands(ir.load(file), peaks)
    assert found == [Island(found[0].nodes, "vae.decoder.up_blocks.1.resnets.0.conv1",
                            "vae.decoder.up_blocks.1.resnets.0.norm2", max(peaks.values()))]  # fmt: skip
    model, _ = cast(ir.load(file), "fp16", keep)
    convolutions = {str(node.name): node for node in model.graph if node.op_type == "Conv"}
    wide = [name for name in convolutions if "FLOAT" in types(model)[name]]
    assert len(wide) == 1 and wide[0] in keep and len(convolutions) > 10
    assert compare(expected, run(model, tmp_path, latents)).sqnr_db > 40
