"""Files of videos, read back by other readers than their writers: frames, times, colours and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes import video
from runtimes.accuracy import psnr
from runtimes.check import check_model
from runtimes.errors import DexportError
from runtimes.image import read_settings
from runtimes.manifest import Graph, Guidance, Model, Stage, Tensor, from_json, to_json
from runtimes.pipeline import Pipeline
from runtimes.video import Video

SETTINGS = {"prompt": "Äpfel", "seed": 7, "fps": 8.0}


def frames(count: int = 6, side: int = 48) -> list[Image.Image]:
    """A disc of one colour that moves over another's slope."""
    y, x = np.mgrid[:side, :side]
    ground = np.stack([255 * x / side, 200 * y / side, 255 - 255 * x / side], axis=-1)
    made = []
    for index in range(count):
        disc = (x - 10 - 5 * index) ** 2 + (y - 24) ** 2 < 80
        made.append(Image.fromarray(np.where(disc[..., None], (250, 220, 40), ground).astype(np.uint8)))
    return made


def read(file: Path) -> tuple[list[Image.Image], list[int]]:
    """The frames of a GIF or an animated PNG, and how long each is shown in ms."""
    with Image.open(file) as image:
        found, durations = [], []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(image.convert("RGB"))
            durations.append(round(image.info["duration"]))
        assert image.info["loop"] == 0  # without end
    return found, durations


def apart(one: list[Image.Image], other: list[Image.Image]) -> float:
    """PSNR in dB."""
    a, b = (np.stack([np.asarray(frame) for frame in each]) / 255 for each in (one, other))
    return psnr(a, b)


@pytest.mark.parametrize("fps", [8.0, 24.0, 50.0, 0.5])
def test_gif_has_every_frame_for_its_time(tmp_path: Path, fps: float) -> None:
    drawn = frames()
    Video(drawn, fps).save(tmp_path / "a.gif", SETTINGS)
    found, durations = read(tmp_path / "a.gif")
    assert len(found) == len(drawn)
    assert abs(sum(durations) - 1000 * len(drawn) / fps) <= 5  # half of the unit that a GIF counts in
    assert all(abs(duration - 1000 / fps) < 10 for duration in durations)
    assert apart(drawn, found) >= 27  # 256 colours for all frames; what stands still must not flicker:
    corner = [np.asarray(frame)[-8:, -8:] for frame in found]
    assert all((one == corner[0]).all() for one in corner)
    with Image.open(tmp_path / "a.gif") as image:
        assert json.loads(image.info["comment"]) == SETTINGS


def test_animated_png_keeps_every_pixel(tmp_path: Path) -> None:
    drawn = frames()
    Video(drawn, 24.0).save(tmp_path / "a.png", SETTINGS)
    found, durations = read(tmp_path / "a.png")
    assert [frame.tobytes() for frame in found] == [frame.tobytes() for frame in drawn]
    assert sum(durations) == 250
    assert read_settings(tmp_path / "a.png") == SETTINGS


def test_mp4_has_the_frames_in_their_colours(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    drawn = frames()
    Video(drawn, 12.0).save(tmp_path / "a.mp4", SETTINGS)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        found = [frame.to_image() for frame in file.decode(stream)]
        assert float(stream.average_rate) == 12.0
        assert stream.codec_context.name == "h264" and stream.codec_context.colorspace == 1  # BT.709
        assert json.loads(file.metadata["comment"]) == SETTINGS
    assert len(found) == len(drawn)
    assert apart(drawn, found) >= 26  # colours have half the resolution
    for one, other in zip(drawn, found, strict=True):  # where they are flat, they are right
        assert np.abs(np.asarray(one, float)[2:12, 2:12] - np.asarray(other)[2:12, 2:12]).mean() < 4


def test_a_folder_holds_the_frames(tmp_path: Path) -> None:
    drawn = frames(3)
    Video(drawn, 8.0).save(tmp_path / "frames", SETTINGS)
    files = sorted((tmp_path / "frames").iterdir())
    assert files == video.frame_files(tmp_path / "frames", 3)
    assert [Image.open(file).tobytes() for file in files] == [frame.tobytes() for frame in drawn]
    assert read_settings(files[1]) == SETTINGS


def test_what_cannot_be_written_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DexportError, match=r"at most 50 frames a second, not 60; write an \.mp4"):
        video.check(tmp_path / "a.gif", 60.0)
    for fps in (0.0, -1.0, 1e9, float("nan"), "8"):
        with pytest.raises(DexportError, match=r"0\.1 to 240 frames a second"):
            video.check_fps(fps)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(DexportError, match=r"needs av; run: pip install 'dexport\[video\]'"):
        video.check(tmp_path / "a.mp4", 8.0)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(DexportError, match="even height and width, not 47x47"):
        Video(frames(2, 47), 8.0).save(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_are_decoded_one_at_a_time() -> None:
    sample, seen = np.arange(2 * 4 * 3 * 2 * 2, dtype=np.float32).reshape(2, 4, 3, 2, 2), []

    def picture(latents: np.ndarray) -> np.ndarray:
        seen.append(latents.shape)
        return latents[:, :3].repeat(2, axis=-1).repeat(2, axis=-2)

    made = video.decode(picture, sample)
    assert seen == [(2, 4, 2, 2)] * 3
    assert made.shape == (2, 3, 3, 4, 4)
    assert (made[1, 2, 0, ::2, ::2] == sample[1, 0, 2]).all()


SAMPLE = Tensor("sample", "float32", ("batch", 4, 3, 2, 2))
FRAME = Tensor("sample", "float32", ("batch", 4, 2, 2))


class Denoiser:
    """Half of the sample, lighter from frame to frame."""

    max_batch = None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert inputs["sample"].shape[1:] == (4, 3, 2, 2)
        return {"output": 0.5 * inputs["sample"] + np.arange(3, dtype=np.float32)[:, None, None]}


class Decoder:
    max_batch = 1

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert inputs["sample"].shape == (1, 4, 2, 2)
        return {"image": inputs["sample"][:, :3].repeat(2, axis=-1).repeat(2, axis=-2) / 8 + 0.5}


def model(**changes: Any) -> Model:
    timestep, output = Tensor("timestep", "float32", ("batch",)), replace(SAMPLE, name="output")
    graphs = {
        "denoiser": Graph("denoiser", "denoiser/d", (SAMPLE, timestep), (output,)),
        "decoder": Graph("decoder", "decoder/d", (FRAME,), (Tensor("image", "float32", ("batch", 3, 4, 4)),)),
    }
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
    stage = Stage("base", "denoiser", None, "decoder", None, (4, 3, 2, 2), 2, scheduler, Guidance("none", 1.0), 2)
    return Model("test", "test", graphs, (), (replace(stage, **{"fps": 8.0, **changes}),), ())


def pipeline(described: Model) -> Pipeline:
    sessions: dict[str, Any] = {"denoiser": Denoiser(), "decoder": Decoder()}
    return Pipeline(described, Path(), sessions.__getitem__)


def test_pipeline_gives_videos_with_their_settings() -> None:
    result = pipeline(model())(images=2, seed=5, fps=24)
    assert not result.images and [len(one.frames) for one in result.videos] == [3, 3]
    assert [one.fps for one in result.videos] == [24, 24]
    assert [(one["seed"], one["frames"], one["fps"], one["size"]) for one in result.settings] == [
        (5, 3, 24, [4, 4]), (6, 3, 24, [4, 4]),
    ]  # fmt: skip
    alone = pipeline(model())(seed=6).videos[0]
    assert [frame.tobytes() for frame in alone.frames] == [frame.tobytes() for frame in result.videos[1].frames]
    assert alone.frames[0].tobytes() != alone.frames[1].tobytes() and alone.fps == 8.0


def test_requests_that_a_video_cannot_meet_are_refused() -> None:
    for asked, message in (
        ({"fps": 0}, "0.1 to 240 frames a second"),
        ({"fps": "8"}, "0.1 to 240 frames a second"),
        ({"image": Image.new("RGB", (4, 4))}, "videos out of noise alone"),
        ({"size": (8, 8)}, "4x4 pixels"),
    ):
        with pytest.raises(DexportError, match=message):
            pipeline(model())(**asked)


def test_a_model_of_videos_must_make_sense() -> None:
    check_model(model(), "here")
    assert from_json(Model, to_json(model()), "here") == model()
    encoder = Graph("encoder", "encoder/e", (Tensor("image", "float32", ("batch", 3, 4, 4)),), (FRAME,))
    free = replace(SAMPLE, shape=("batch", 4, "height", 2, 2))
    for changed, message in (
        (model(fps=0.0), "fps: a video has"),
        (model(fps=None), r"sample is \(4, 3, 2, 2\); it must be three numbers"),
        (model(sample=(4, 2, 2)), r"sample is \(4, 2, 2\); it must be four numbers"),
        (model(sample=(4, 5, 2, 2)), "the denoiser's"),
        (with_graph(model(encoder="encoder"), "encoder", encoder), "a video starts from noise"),
        (with_inputs(model(), "denoiser", free), "the denoiser's frames is 'height'"),
        (with_inputs(model(), "decoder", SAMPLE), "one frame, "),
    ):
        with pytest.raises(DexportError, match=message):
            check_model(changed, "here")


def with_graph(described: Model, name: str, graph: Graph) -> Model:
    return replace(described, graphs={**described.graphs, name: graph})


def with_inputs(described: Model, name: str, sample: Tensor) -> Model:
    graph = described.graphs[name]
    return with_graph(described, name, replace(graph, inputs=(sample, *graph.inputs[1:])))
