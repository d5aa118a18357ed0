"""A graph in pieces gives what ONNX Runtime gives for the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter import pieces


@pytest.mark.parametrize("largest", [1, 100_000, pieces.LARGEST])
@pytest.mark.parametrize("graph", ["text", "denoiser", "decoder"])
def test_as_the_whole(tiny_hub: Path, graph: str, largest: int) -> None:
    file = tiny_hub / graph / "model.onnx"
    whole = onnxruntime.InferenceSession(str(file))
    random = np.random.default_rng(0)
    inputs = {
        value.name: random.integers(0, 90, (2, 77))
        if "int" in value.type
        else random.standard_normal([side if isinstance(side, int) else 2 for side in value.shape], np.float32)
        for value in whole.get_inputs()
    }
    found = pieces.run(file, inputs, largest)
    assert list(found) == [value.name for value in whole.get_outputs()]
    for name, expected in zip(found, whole.run(None, inputs), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
