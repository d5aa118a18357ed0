"""Images: every mode that comes in, rounding, metadata, and a file that is whole or absent."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from runtimes import inpaint
from runtimes.errors import DexportError
from runtimes.image import check, grid, open_image, read_settings, save_png, to_array, to_images, upright

STEP = 0.5 / 255 + 1e-6  # of rounding to 8 bits
RAMP = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
COLOUR = (200, 50, 10)


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


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, clear: bytes = b"") -> bytes:
    """A PNG as its specification has it: https://www.w3.org/TR/png-3/, sections 5 and 11."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    row = len(pixels) // height
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    body = [chunk(b"IHDR", head), chunk(b"tRNS", clear) if clear else b"", chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


def deep(folder: Path) -> dict[str, Image.Image]:
    """``RAMP`` as 16 bits or floats, in every way that files and programs have it."""
    big, floats = RAMP.astype(">u2"), (RAMP / 65535).astype(np.float32)
    Image.fromarray(RAMP).save(folder / "little.tif")
    Image.fromarray(big).save(folder / "big.tif")
    Image.fromarray(floats).save(folder / "floats.tif")
    (folder / "grey.png").write_bytes(png(8, 8, 16, 0, big.tobytes()))
    (folder / "colour.png").write_bytes(png(8, 8, 16, 2, np.repeat(big, 3).tobytes()))
    (folder / "grey.pgm").write_bytes(b"P5 8 8 65535\n" + big.tobytes())
    (folder / "grey.pfm").write_bytes(b"Pf\n8 8\n-1.0\n" + floats[::-1].astype("<f4").tobytes())
    found = {file.name: open_image(file) for file in sorted(folder.iterdir())}
    for mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        found[mode] = Image.frombytes(mode, (8, 8), (big if mode.endswith("B") else RAMP).tobytes())
    return found | {"floats": Image.fromarray(floats), "turned": Image.fromarray(floats).copy()}


def test_deep_images_and_masks_have_their_whole_range(tmp_path: Path) -> None:
    """A mask's edge is half of white, where diffusers has it."""
    found, processor = (
        deep(tmp_path),
        diffusers.image_processor.VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        ),
    )
    white = processor.preprocess((RAMP / 65535).astype(np.float32)[None, :, :, None]).numpy() > 0
    for name, image in found.items():
        atol = 1 / 255 + 1e-6 if name == "colour.png" else STEP  # Pillow cuts colours off, and does not round
        np.testing.assert_allclose(to_array(image, (8, 8)), np.broadcast_to(RAMP / 65535, (1, 3, 8, 8)), atol=atol)
        assert np.array_equal(inpaint.painted(image, (8, 8)), white), name
    assert white.sum() == 32 and len(found) == 13


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "1", "L", "LA", "La"]
)
def test_every_mode_is_what_people_see(mode: str) -> None:
    """Where colours survive, they are those; a mask is as bright as in diffusers, which converts it to "L"."""
    half = Image.new("RGB", (8, 8), COLOUR)
    half.paste("white", (0, 0, 8, 4))
    plain = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, mode)
    image = half.convert(plain, palette=Image.Palette.ADAPTIVE)
    if mode == "RGBX":
        image = Image.frombytes("RGBX", (8, 8), half.convert("RGBA").tobytes())
    image = image if image.mode == mode else image.convert(mode)
    expected = half if mode not in ("1", "L", "LA", "La") else half.convert(mode[0]).convert("RGB")
    off = np.abs(to_array(image, (8, 8)) - to_array(expected, (8, 8))).max() * 255
    assert off <= {"HSV": 5, "YCbCr": 3, "LAB": 3}.get(mode, 0) + 1e-3
    assert np.array_equal(inpaint.painted(image, (8, 8)), inpaint.painted(expected.convert("L"), (8, 8)))
    check("image", image)


def test_what_is_transparent_is_white_in_an_image_and_of_no_account_in_a_mask(tmp_path: Path) -> None:
    clear = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("LA", (8, 8), (0, 0)), Image.new("L", (8, 8), 0)]
    clear[-1].info["transparency"] = 0
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([0, 0, 0, 255, 255, 255])
    indexed.info["transparency"] = 0
    values = np.full((8, 8), 4000, ">u2").tobytes()
    (tmp_path / "grey.png").write_bytes(png(8, 8, 16, 0, values, struct.pack(">H", 4000)))
    for image in (*clear, indexed, open_image(tmp_path / "grey.png")):
        assert (to_array(image, (8, 8)) == 1).all()
        with pytest.raises(DexportError, match="the mask is black all over"):
            inpaint.painted(image, (8, 8))


def turned(image: Image.Image) -> Image.Image:
    """As a camera that was held on its side saves it."""
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    rotated.getexif()[274] = 6
    return rotated


def test_a_mask_is_turned_like_its_image(tmp_path: Path) -> None:
    mask = Image.new("L", (8, 16))
    mask.paste(255, (0, 0, 5, 6))
    image = Image.new("RGB", (8, 16), "red")
    turned(mask).save(tmp_path / "mask.png", exif=turned(mask).getexif())
    expected = inpaint.painted(mask, (16, 8))
    for own in (turned(mask), open_image(tmp_path / "mask.png")):
        assert np.array_equal(inpaint.painted(own, (16, 8)), expected)
    raw = mask.transpose(Image.Transpose.ROTATE_90)  # of the camera's pixels, without its note
    for found in (upright(raw, turned(image)), upright(mask, turned(image)), upright(turned(mask), turned(image))):
        assert np.array_equal(inpaint.painted(found, (16, 8)), expected)
    assert upright(raw, image).size == raw.size and not raw.getexif()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.array([[0, 255]], np.float32)), "numbers from 0 to 255, whose white is not known; scale"),
        (Image.fromarray(np.array([[-0.1, 1]], np.float32)), "numbers from -0.1 to 1"),
        (Image.fromarray(np.array([[np.nan, 1]], np.float32)), "numbers from nan to nan"),
        (Image.fromarray(np.array([[0, 65535]], np.int32)), "32-bit whole numbers, whose white is not known; save it"),
        (Image.new("L", (0, 4)), "an image of 0x4 pixels; give one that has some"),
        ("mask.png", "mask must be an image"),
    ],
)
def test_images_of_no_known_meaning_are_refused(image: Any, words: str) -> None:
    with pytest.raises(DexportError, match=words) as caught:
        check("mask", image)
    assert str(caught.value).startswith("mask") and "\n" not in str(caught.value)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    whole = png(64, 64, 8, 0, bytes(np.random.default_rng(1).integers(0, 256, 4096, np.uint8)))
    for name, data in (("cut.png", whole[:900]), ("text.png", b"no image"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DexportError, match=f"{name}: not an image that can be read"):
            open_image(tmp_path / name)
    with Image.open(tmp_path / "cut.png") as late, pytest.raises(DexportError, match="cut off or damaged"):
        to_array(late, (8, 8))
    for path in (tmp_path, tmp_path / "ghost.png"):
        with pytest.raises(DexportError, match=r"directory"):
            open_image(path)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_an_animated_file_the_first_frame_is_taken(tmp_path: Path, ending: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(
        tmp_path / f"two.{ending}",
        save_all=True,
        append_images=[blue],
        **({"lossless": True} if ending == "webp" else {}),
    )
    assert np.array_equal(to_array(open_image(tmp_path / f"two.{ending}"), (8, 8)), to_array(red, (8, 8)))
