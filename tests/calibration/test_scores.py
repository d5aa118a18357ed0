"""Long attention with its queries and keys in 8 bits: which it is, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, scores, sensitivity
from calibration.observe import Call, Statistics
from calibration.recipe import Recipe, apply
from runtimes.accuracy import compare
from runtimes.manifest import Graph, Tensor
from tests.calibration.small import Array, fake, graph, run
from tests.calibration.test_quantize import statistics

TOKENS, HEADS, HEAD = 1024, 2, 4
RANDOM = np.random.default_rng(3)
WEIGHTS = {name: RANDOM.standard_normal((8, 8)).astype(np.float32) for name in ("first", "wq", "wk", "wv", "w", "last")}


def attention(tokens: int = TOKENS, context: int | None = None) -> ir.Model:
    """A block between two layers, with self-attention, or cross-attention to ``context`` tokens."""
    sizes = {name: context or tokens if name in "kv" else tokens for name in "qkv"}
    heads = " ".join(
        f"{n} = MatMul({'c' if context and n in 'kv' else 'h'}, w{n}) {n}s = Reshape({n}, split_{n})"
        f" {n}t = Transpose<perm=[0,2,1,3]>({n}s)" for n in "qkv"
    )  # fmt: skip
    other = f", float[1,{context},8] c" if context else ""
    shapes = {f"split_{name}": np.array([0, size, HEADS, HEAD], np.int64) for name, size in sizes.items()}
    return graph(
        f"g (float[1,{tokens},8] x{other}, float[1] timestep) => (float[1,{tokens},8] output) {{ h = MatMul(x, first)"
        f" {heads} o = Attention(qt, kt, vt) t = Transpose<perm=[0,2,1,3]>(o) n = Reshape(t, join)"
        " p = MatMul(n, w) output = MatMul(p, last) }",
        WEIGHTS | shapes | {"join": np.array([0, tokens, 8], np.int64)},
    )


def inputs() -> dict[str, Array]:
    x = RANDOM.standard_normal((1, TOKENS, 8)).astype(np.float32) / 3
    return {"x": x, "timestep": np.array([7], np.float32)}


def seen(given: dict[str, Array]) -> Statistics:
    """What a calibration on ``given`` would have seen of the values that a recipe needs."""
    probe, axes = attention(), dict.fromkeys(("h", "n", "p"), 2) | dict.fromkeys(("qt", "kt"), scores.CHANNEL)
    probe.graph.outputs.extend(v for node in probe.graph for v in node.outputs if v.name in axes)
    outputs, values = run(probe, given), {}
    for name, axis in axes.items():
        values |= statistics(name, outputs[name], axis)
    return Statistics("", {}, (Call("", 7.0),), values)


@pytest.mark.parametrize(("tokens", "context", "names"), [(1024, None, ["wq"]), (512, None, []), (1024, 77, [])])
def test_only_long_attention_is_found(tokens: int, context: int | None, names: list[str]) -> None:
    model = attention(tokens, context)
    assert [one.name for one in scores.find(model, layers.find(model)[0])] == names


def test_queries_and_keys_are_rounded_and_values_are_not() -> None:
    model = attention()
    steps = {"qt": 0.15, "kt": 0.2}  # wide enough: the numbers of a graph end at -128, those of `fake` at -127
    model, modified = scores.write(model, scores.find(model, layers.find(model)[0]), steps)
    assert modified and [node.op_type for node in model.graph].count("QuantizeLinear") == 2
    given = inputs()
    before = given["x"][0] @ WEIGHTS["first"]

    def heads(name: str) -> Array:
        made: Array = (before @ WEIGHTS[name]).reshape(TOKENS, HEADS, HEAD).transpose(1, 0, 2).astype(np.float64)
        return made

    def attend(query: Array, key: Array) -> Array:
        product = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(HEAD))
        mean = product / product.sum(-1, keepdims=True) @ heads("wv")
        result: Array = mean.transpose(1, 0, 2).reshape(TOKENS, 8) @ WEIGHTS["w"] @ WEIGHTS["last"]
        return result

    expected = attend(fake(heads("wq"), steps["qt"]), fake(heads("wk"), steps["kt"]))
    error = compare(expected, run(model, given)["output"][0]).relative
    exact = compare(expected, attend(heads("wq"), heads("wk"))).relative
    assert error < 1e-3 < 5e-3 < exact  # a number on a rounding's edge falls to either side in float32


def test_a_recipe_quantizes_them_and_keeps_them_with_their_block() -> None:
    given = inputs()
    exact, found = run(attention(), given)["output"], seen(given)
    sqnr = []
    for how in (Recipe(), Recipe(scores=True), Recipe(scores=True, keep=frozenset({"wq"}))):
        model, done = apply(attention(), found, how)
        assert done.scores == (("wq",) if how.scores and not how.keep else ())
        sqnr.append(compare(exact, run(model, given)["output"]).sqnr_db)
    assert 15 < sqnr[1] < sqnr[0] < 60 and sqnr[1] < sqnr[2]


def test_their_noise_is_that_of_the_block(tmp_path: Path) -> None:
    given = inputs()
    found = seen(given)
    ir.save(attention(), tmp_path / "model.onnx")
    tensors = [Tensor("x", "float32", (1, TOKENS, 8)), Tensor("timestep", "float32", (1,))]
    described = Graph("denoiser", "model.onnx", tuple(tensors), (Tensor("output", "float32", (1, TOKENS, 8)),))
    with_, without = (
        sensitivity.noise(tmp_path / "model.onnx", described, found, Recipe(scores=on), [(given, given["x"])])
        for on in (True, False)
    )
    assert set(with_) == set(without) and with_["wq"][7.0] > 1.2 * without["wq"][7.0]
    assert all(with_[name] == without[name] for name in with_ if name != "wq")
