"""FP8 beside int8 on the emoji model, simulated on ONNX Runtime, by what chooses the ranges.

    python benchmarks/fp8.py [--count 16] [--steps 10]

For each way the pictures' PSNR against fp32's at the same seeds (median and 10th percentile), and the SQNR of the
denoiser's calls on fp32's inputs (least and median), in dB. The prompts that judge were not calibrated with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples" / "emoji"))

import onnx_ir as ir  # the paths above come first

from calibration import quality, recipe
from calibration.calibrate import calibrate
from calibration.numbers import FP8, with_half_scales
from calibration.quality import Judged
from calibration.recipe import Recipe
from exporter import hub as hubs
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.manifest import Model

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji" / "model"
CALIBRATED = 16  # prompts
WAYS = {
    "int8, mse": Recipe(),
    "fp8, mse": Recipe(numbers=FP8),
    "fp8, mse, up to the peak": Recipe(numbers=replace(FP8, widest=1.0)),
    "fp8, min-max": Recipe("min-max", FP8),
    "fp8, percentile": Recipe("percentile", FP8),
    "fp8, entropy": Recipe("entropy", FP8),
    "fp8, mse, scales of fp16": Recipe(numbers=with_half_scales(FP8)),
    "fp8, mse, no bias correction": Recipe(numbers=FP8, correct_bias=False),
}


def measure(model: Model, hub: Path, judged: Judged, quantize: Callable[[ir.Model], ir.Model]) -> str:
    name = model.stages[0].denoiser
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        ir.save(quantize(ir.load(hub / model.graphs[name].file)), file, external_data="model.onnx.data")

        def load(wanted: str) -> OnnxRuntimeSession:
            graph = model.graphs[wanted]
            return OnnxRuntimeSession(file if wanted == name else hub / graph.file, graph, None)

        found = quality.judge(judged, model, hub, load)
    low = np.percentile(found.psnr, 10)
    return f"{found.median:8.1f} {low:6.1f}   {min(found.sqnr):8.1f} {np.median(found.sqnr):6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="prompts that judge")
    parser.add_argument("--steps", type=int, default=10, help="of the calibration and of the pictures")
    words = parser.parse_args()
    from data import prompts

    _, names = prompts(CALIBRATED + words.count)
    with tempfile.TemporaryDirectory() as work:
        hub = Path(work) / "hub"
        model = hubs.export(EMOJI, hub)
        statistics = calibrate(model, hub, names[:CALIBRATED], steps=words.steps)
        judged = quality.draw_float(model, hub, names[CALIBRATED : CALIBRATED + words.count], steps=words.steps)
        print(f"{'':34} pictures p10    calls least median, dB")
        for name, way in WAYS.items():
            line = measure(model, hub, judged, lambda graph, way=way: recipe.apply(graph, statistics, way)[0])
            print(f"{name:34} {line}", flush=True)


if __name__ == "__main__":
    main()
