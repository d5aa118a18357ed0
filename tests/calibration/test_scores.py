"""Long attention with its queries and keys in 8 bits: which it is, and what it computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration import layers, scores
from tests.calibration.small import Array, fake, graph, run

TOKENS, HEADS, HEAD = 1024, 2, 4
RANDOM = np.random.default_rng(3)
WEIGHTS = {name: RANDOM.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "w")}


def attention(tokens: int = TOKENS, context: int | None = None) -> ir.Model:
    """Self-attention, or cross-attention to ``context`` tokens, as the exporter writes it."""
    sizes = {name: context or tokens if name in "kv" else tokens for name in "qkv"}
    heads = " ".join(
        f"{n} = MatMul({'c' if context and n in 'kv' else 'x'}, w{n}) {n}s = Reshape({n}, split_{n})"
        f" {n}t = Transpose<perm=[0,2,1,3]>({n}s)" for n in "qkv"
    )  # fmt: skip
    other = f", float[1,{context},8] c" if context else ""
    shapes = {f"split_{name}": np.array([0, size, HEADS, HEAD], np.int64) for name, size in sizes.items()}
    return graph(
        f"g (float[1,{tokens},8] x{other}) => (float[1,{tokens},8] y) {{ {heads} o = Attention(qt, kt, vt)"
        " t = Transpose<perm=[0,2,1,3]>(o) n = Reshape(t, join) y = MatMul(n, w) }",
        WEIGHTS | shapes | {"join": np.array([0, tokens, 8], np.int64)},
    )


@pytest.mark.parametrize(("tokens", "context", "names"), [(1024, None, ["wq"]), (512, None, []), (1024, 77, [])])
def test_only_long_attention_is_found(tokens: int, context: int | None, names: list[str]) -> None:
    model = attention(tokens, context)
    assert [one.name for one in scores.find(model, layers.find(model)[0])] == names


def test_queries_and_keys_are_rounded_and_values_are_not() -> None:
    model = attention()
    steps = {"qt": 0.15, "kt": 0.2}  # wide enough: the numbers of a graph end at -128, those of `fake` at -127
    model, modified = scores.write(model, scores.find(model, layers.find(model)[0]), steps)
    assert modified and [node.op_type for node in model.graph].count("QuantizeLinear") == 2
    x = RANDOM.standard_normal((1, TOKENS, 8)).astype(np.float32)

    def heads(name: str) -> Array:
        made: Array = (x @ WEIGHTS[name]).reshape(TOKENS, HEADS, HEAD).transpose(1, 0, 2).astype(np.float64)
        return made

    def attend(query: Array, key: Array) -> Array:
        product = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(HEAD))
        mean = product / product.sum(-1, keepdims=True) @ heads("wv")
        result: Array = mean.transpose(1, 0, 2).reshape(TOKENS, 8) @ WEIGHTS["w"]
        return result

    expected = attend(fake(heads("wq"), steps["qt"]), fake(heads("wk"), steps["kt"]))
    got = run(model, {"x": x})["y"][0]
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    exact = np.linalg.norm(attend(heads("wq"), heads("wk")) - expected) / np.linalg.norm(expected)
    assert error < 1e-3 < 5e-3 < exact  # a number on a rounding's edge falls to either side in float32
