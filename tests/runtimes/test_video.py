"""Files of videos, read back by other readers than their writers: frames, times, colours and settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes import video
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.image import read_settings
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
    if "av" not in sys.modules:
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
