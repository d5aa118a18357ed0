"""What is traced computes what torch computes, where torch.onnx or a runtime would make something else of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from exporter import compile as compilers
from exporter import passes, trace
from exporter.families import Spec
from runtimes.manifest import Graph, Tensor
from runtimes.session import Session, backend
from runtimes.target import Target


def traced(forward: Callable[..., Any], inputs: tuple[Tensor, ...], output: Tensor, folder: Path) -> ir.Model:
    """The hub's graph of a function, saved as ``model.onnx``."""
    spec = Spec("denoiser", {}, forward, inputs, (output,), {})
    model = passes.run(trace.trace(spec, trace.build(spec), {}), passes.HUB)
    ir.save(model, folder / "model.onnx")
    return model


def opened(inputs: tuple[Tensor, ...], output: Tensor, folder: Path, name: str) -> Session:
    """The graph in ``folder``, compiled for a backend."""
    graph, target = Graph("denoiser", "model.onnx", inputs, (output,)), Target.parse(name)
    built = compilers.compile_graph(folder / "model.onnx", graph, folder, target, "fp32")
    return backend(name).open(folder.parent / built.file, built, target.device, None, None)


def attend(modules: Any, sample: Any, mask: Any) -> Any:
    bias = ((1 - mask) * -10000.0)[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(sample, sample, sample, attn_mask=bias)


def test_mask_of_keys_alone_is_spread(tmp_path: Path) -> None:
    """As ONNX Runtime's Attention wants it, though it is the same for all queries."""
    inputs = Tensor("sample", "float32", ("batch", 2, 6, 8)), Tensor("mask", "float32", ("batch", 6))
    output = Tensor("output", "float32", ("batch", 2, 6, 8))
    model = traced(attend, inputs, output, tmp_path)
    assert passes.spread_masks(model)[1] is False  # the hub has been through it
    session = opened(inputs, output, tmp_path, "onnxruntime")
    random = np.random.default_rng(0)
    for batch in (1, 3):
        sample = random.standard_normal((batch, 2, 6, 8)).astype(np.float32)
        mask = np.tile(np.array([1, 1, 0, 1, 0, 0], np.float32), (batch, 1))
        expected = attend(None, torch.from_numpy(sample), torch.from_numpy(mask)).numpy()
        found = session.run({"sample": sample, "mask": mask})["output"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(expected - attend(None, torch.from_numpy(sample), torch.ones(batch, 6)).numpy()).max() > 0.1


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((9, 13), {"mode": "bicubic", "align_corners": True}),
        ((3, 2), {"mode": "bicubic", "align_corners": False}),
        ((3, 10), {"mode": "bilinear"}),
        (None, {"mode": "bilinear", "scale_factor": 0.5}),
    ],
)
def test_a_picture_is_resized_as_torch_does(size: Any, how: dict[str, Any], name: str, tmp_path: Path) -> None:
    """With antialias, by which each runtime means something of its own."""

    def resize(modules: Any, sample: Any) -> Any:
        return torch.nn.functional.interpolate(sample, size, antialias=True, **how)

    sample = torch.randn(3, 2, 6, 8, generator=torch.manual_seed(1))
    expected = resize(None, sample).numpy()
    inputs = (Tensor("sample", "float32", ("batch", 2, 6, 8)),)
    output = Tensor("output", "float32", ("batch", *expected.shape[1:]))
    traced(resize, inputs, output, tmp_path)
    found = opened(inputs, output, tmp_path, name).run({"sample": sample.numpy()})["output"]
    np.testing.assert_allclose(found, expected, atol=2e-6)
