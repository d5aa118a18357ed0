"""AnimateDiff: the videos of its bundles are what diffusers' own pipeline draws from the same noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dexport.cli import main
from exporter.inspect import inspect
from runtimes.accuracy import psnr
from runtimes.bench import bench
from runtimes.errors import DexportError
from runtimes.request import Request
from runtimes.verify import RUN, verify
from tests.families.harness import Array, Built, build_all, build_engines, draw, same_noise
from tests.families.small_video import animatediff, animatediff_xl

FRAMES, STEPS, GUIDANCE = 4, 3, 6.0
PROMPTS = ("red apple", "a")
DIFFERENCE = 1e-3  # of a latent, and of a pixel in [0, 1]
PICTURES = 45.0  # dB


@dataclass(frozen=True)
class Made:
    """The bundles, and what diffusers draws: last latents [B, C, F, h, w] and videos [B, F, 3, side, side]."""

    side: int
    built: Built
    latents: Array
    videos: Array


@pytest.fixture(scope="module", params=[(animatediff, 16), (animatediff_xl, 32)], ids=["sd", "sdxl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    make, side = request.param
    folder, kept = tmp_path_factory.mktemp("video"), []
    pipe = make(folder / "checkpoint")
    pipe.set_progress_bar_config(disable=True)

    def keep(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(values["latents"].numpy())
        return values

    with same_noise():
        frames = pipe(
            prompt=list(PROMPTS), num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            output_type="np", callback_on_step_end=keep,
        ).frames  # fmt: skip
    built = build_all(folder / "checkpoint", folder, motion_adapter=folder / "adapter", frames=FRAMES)
    return Made(side, built, kept[-1], np.asarray(frames).transpose(0, 1, 4, 2, 3))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_bundle_draws_what_diffusers_draws(made: Made, name: str) -> None:
    latents, videos = draw(made.built.pipeline(name), Request(PROMPTS, steps=STEPS, guidance=GUIDANCE))
    assert videos.shape == made.videos.shape == (2, FRAMES, 3, made.side, made.side)
    assert np.abs(latents - made.latents).max() <= DIFFERENCE
    assert np.abs(videos - made.videos).max() <= DIFFERENCE
    assert psnr(made.videos, videos) >= PICTURES
    assert np.std(videos[0] - videos[1]) > 0.01 and np.std(videos[:, 0] - videos[:, 1]) > 0.01


def test_bundle_proves_itself(made: Made) -> None:
    folder = made.built.bundles["onnxruntime"]
    checks, found, times = verify(folder), inspect(folder), bench(folder, repeats=1)
    assert all(check.passed for check in checks)
    assert {check.graph for check in checks} - {RUN} == set(found["graphs"]) == {"text", "denoiser", "decoder"}
    assert (found["image"], found["frames"]) == (f"{made.side}x{made.side} pixels", "4, 8 a second")
    assert set(times["graphs"]) == set(found["graphs"]) and times["frames"] == FRAMES
    report = (folder / "report.html").read_text()
    assert report.count("<figure class=frames>") == 3 and "4, 8 a second" in report


def run(capsys: pytest.CaptureFixture[str], bundle: Path, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``dexport run``."""
    with pytest.raises(SystemExit) as stop:
        main(["run", str(bundle), "--prompt", "red apple", "--steps", "2", *map(str, words)])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("made", [(animatediff, 16)], indirect=True, ids=["sd"])
def test_run_writes_videos(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = made.built.bundles["onnxruntime"]
    code, out, _ = run(capsys, bundle, "-n", 2, "--seed", 3, "--fps", 10, "-o", tmp_path / "a.gif", "--json")
    videos = json.loads(out)["videos"]
    assert code == 0 and [Path(one["file"]).name for one in videos] == ["a-000.gif", "a-001.gif"]
    assert [(one["seed"], one["frames"], one["fps"], one["size"]) for one in videos] == [
        (3, FRAMES, 10.0, [16, 16]), (4, FRAMES, 10.0, [16, 16]),
    ]  # fmt: skip
    drawn = made.built.pipeline("onnxruntime")("red apple", steps=2, seed=4, fps=10.0).videos[0]
    with Image.open(tmp_path / "a-001.gif") as image:
        assert image.n_frames == FRAMES
        shown = []
        for index in range(FRAMES):
            image.seek(index)
            assert image.info["duration"] == 100
            shown.append(np.asarray(image.convert("RGB")) / 255)
        assert psnr(np.stack([np.asarray(frame) for frame in drawn.frames]) / 255, np.stack(shown)) > 20
    assert run(capsys, bundle, "-o", tmp_path / "frames")[:2] == (0, f"{tmp_path / 'frames'}\n")
    assert len(list((tmp_path / "frames").iterdir())) == FRAMES


@pytest.mark.parametrize("made", [(animatediff, 16)], indirect=True, ids=["sd"])
def test_what_a_video_cannot_be_asked_for(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, picture = made.built.bundles["onnxruntime"], Image.new("RGB", (16, 16))
    code, _, error = run(capsys, bundle, "-o", tmp_path / "a.jpg")
    assert code == 2 and "videos are written as .gif, .png, .mp4" in error
    code, _, error = run(capsys, bundle, "--fps", 60, "-o", tmp_path / "a.gif")
    assert code == 2 and "at most 50 frames a second" in error
    with pytest.raises(DexportError, match="draws videos out of noise alone"):
        made.built.pipeline("onnxruntime")("red apple", image=picture)
    with pytest.raises(DexportError, match="16x16 pixels; build one with --dynamic-shape"):
        made.built.pipeline("onnxruntime")("red apple", size=(32, 32))


def test_engines_are_built(made: Made, tmp_path: Path) -> None:
    build_engines(made.built, tmp_path)
