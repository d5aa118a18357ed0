"""The demo that README promises, on a small model: it draws a row for each backend here, and prints its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_draws_and_prints(tiny_sd: Path, tmp_path: Path) -> None:
    words = [sys.executable, "examples/demo.py", "--model", str(tiny_sd), "-o", str(tmp_path / "demo")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("onnxruntime-fp32", "openvino-fp32", "openvino-bf16", "tensorrt-sm89-fp16"):
        assert (tmp_path / "demo" / name / "dexport.json").is_file()
    assert done.stdout.count(" dB") >= 3
    assert "emoji.png" in done.stdout
    with Image.open(tmp_path / "demo" / "emoji.png") as sheet:
        assert sheet.width > 8 * 3 * 64 and sheet.height > 3 * 3 * 64  # eight prompts, three backends, zoomed 64 pixels
