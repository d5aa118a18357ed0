"""Pictures: rounding, metadata, and a file that is whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.image import grid, read_settings, save_png, to_images


def test_rounds_to_the_nearest_level_and_clips() -> None:
    values = np.array([-1, 0, 0.5 / 255 - 1e-6, 0.5 / 255 + 1e-6, 1, 2, 0.5, 0.25], np.float32)
    (image,) = to_images(np.broadcast_to(values, (1, 3, 1, 8)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 128, 64]
    assert image.mode == "RGB"


def test_channels_stay_in_order() -> None:
    array = np.zeros((1, 3, 2, 2))
    array[0, 0, 0, 1] = 1  # red, first row, second column
    (image,) = to_images(array)
    assert image.getpixel((1, 0)) == (255, 0, 0)
    assert image.getpixel((0, 1)) == (0, 0, 0)


def test_settings_come_back_from_the_png(tmp_path: Path) -> None:
    settings = {"prompt": "ein Käfer 🐞\nzwei", "seed": 7, "guidance": 4.5}
    save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert read_settings(tmp_path / "b.png") == {}


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"prompt": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_grid_shows_each_picture_once() -> None:
    colours = ["red", "lime", "blue", "black"]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in colours]
    sheet = np.asarray(grid([pictures[:2], pictures[2:]], labels=["one", "two"], heads=["a", "b"]))
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]:
        assert (sheet == colour).all(-1).sum() == 32 * 32
