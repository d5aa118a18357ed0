"""A mask that is the same for all queries: spread over them in the hub, as ONNX Runtime's Attention wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporter import passes, trace
from exporter.families import Spec
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.manifest import Graph, Tensor

INPUTS = (Tensor("sample", "float32", ("batch", 2, 6, 8)), Tensor("mask", "float32", ("batch", 6)))
OUTPUTS = (Tensor("output", "float32", ("batch", 2, 6, 8)),)


def attend(modules: Any, sample: Any, mask: Any) -> Any:
    bias = ((1 - mask) * -10000.0)[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(sample, sample, sample, attn_mask=bias)


def test_mask_of_keys_alone_is_spread(tmp_path: Path) -> None:
    spec = Spec("denoiser", {}, attend, INPUTS, OUTPUTS, {})
    model = passes.run(trace.trace(spec, trace.build(spec), {}), passes.HUB)
    assert passes.spread_masks(model)[1] is False  # the hub has been through it
    ir.save(model, tmp_path / "model.onnx")
    session = OnnxRuntimeSession(tmp_path / "model.onnx", Graph("denoiser", "denoiser/m", INPUTS, OUTPUTS), None)
    random = np.random.default_rng(0)
    for batch in (1, 3):
        sample = random.standard_normal((batch, 2, 6, 8)).astype(np.float32)
        mask = np.tile(np.array([1, 1, 0, 1, 0, 0], np.float32), (batch, 1))
        expected = attend(None, torch.from_numpy(sample), torch.from_numpy(mask)).numpy()
        found = session.run({"sample": sample, "mask": mask})["output"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(expected - attend(None, torch.from_numpy(sample), torch.ones(batch, 6)).numpy()).max() > 0.1
