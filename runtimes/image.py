"""Images: the one reader of those that come in, arrays to 8 bits, PNG files that remember how they were made, grids."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from runtimes.errors import DexportError

KEY = "dexport"  # the PNG text chunk that holds the settings as JSON
DEEPEST = 65535  # white of 16 bits
DEEP = ("PNG", "PPM")  # formats whose 16-bit grey Pillow may open in its mode "I", scaled to the whole range
ORIENTATION = 0x0112  # EXIF's tag


def to_images(array: NDArray[Any]) -> list[Image.Image]:
    """Turn float [B, 3, H, W] in [0, 1] into RGB pictures, rounding to the nearest of 256 levels."""
    pixels = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels]


def open_image(file: Path) -> Image.Image:
    """Read a file, of an animated one the first frame; DexportError for what is no image or a damaged one."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise DexportError(f"{file}: the image is too large; make it smaller") from error
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        why = getattr(error, "strerror", None) or "not an image that can be read"
        raise DexportError(f"{file}: {why}") from error


def upright(image: Image.Image, like: Image.Image | None = None) -> Image.Image:
    """An image as people see it: turned, where a camera noted in its metadata that it was held on its side.

    A mask without such a note that has the sides of the image ``like`` before it was turned is turned as that is.
    Raises DexportError for an image without pixels and for one that Pillow cannot decode.
    """
    if not min(image.size):
        raise DexportError(f"an image of {image.width}x{image.height} pixels; give one that has some")
    try:
        turned = like is not None and image.size == like.size != upright(like).size
        if like is not None and turned and ORIENTATION not in image.getexif():
            image = image.copy()
            image.getexif()[ORIENTATION] = like.getexif()[ORIENTATION]
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DexportError("an image that cannot be read: it is cut off or damaged; save it anew") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of any mode of Pillow in a mode of 8 bits a channel, upright.

    White is 65535 in 16 bits, and 1 for floats, which must lie within 0 and 1. Raises DexportError for numbers of which
    it is not known what is white, and as ``upright`` does.
    """
    plain = upright(image)
    if plain.mode == "La":
        return plain.convert("LA")
    if plain.mode[0] not in "IF":
        return plain.convert("RGB") if plain.mode in ("LAB", "HSV") else plain
    values = np.asarray(plain).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    white = 1 if plain.mode == "F" else DEEPEST
    if plain.mode == "I" and image.format not in DEEP:
        raise DexportError("an image of 32-bit whole numbers, whose white is not known; save it with 8 or 16 bits")
    if not 0 <= low <= high <= white:
        raise DexportError(
            f"an image of numbers from {low:g} to {high:g}, whose white is not known; scale floats to 0 to 1, or save "
            "it with 8 or 16 bits"
        )
    # Rounded, so that half of white stays the edge between 127 and 128; Pillow's own conversion clips at 255.
    narrow = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if isinstance(clear := plain.info.get("transparency"), int):
        narrow.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return narrow


def check(what: str, image: Any) -> None:
    """Raise DexportError, with ``what`` it is of, for what is no image that can be taken; before any work."""
    if not isinstance(image, Image.Image):
        raise DexportError(f"{what} must be an image (PIL.Image.open gives one), not {image!r:.80}")
    try:
        eight_bits(image)
    except DexportError as error:
        raise DexportError(f"{what}: {error}") from error


def grey(image: Image.Image) -> Image.Image:
    """A mask in mode "L", upright: how bright it is, whatever its transparency, as in diffusers."""
    plain = eight_bits(image).convert("L")
    plain.info.pop("transparency", None)
    return plain


def to_array(
    image: Image.Image, size: tuple[int, int], resample: Literal["lanczos", "bicubic"] = "lanczos"
) -> NDArray[np.float32]:
    """Turn an image into float32 [1, 3, H, W] in [0, 1] of ``size`` (height, width).

    Transparent parts become white; an image of another size is scaled to fill this one, and cut evenly at its sides:
    cut first with "lanczos", scaled first with "bicubic", as CLIP was trained. Raises DexportError as ``eight_bits``
    does.
    """
    rgba = eight_bits(image).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    fitted = (
        ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.LANCZOS) if resample == "lanczos" else _cut(flat, size)
    )
    return np.asarray(fitted, np.float32).transpose(2, 0, 1)[None] / np.float32(255)


def _cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image that was scaled to be just as large as ``size`` (height, width) or larger on one side."""
    factor = max(size[0] / image.height, size[1] / image.width)
    width, height = max(int(image.width * factor), size[1]), max(int(image.height * factor), size[0])
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + size[1], top + size[0]))


def png_info(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """A PNG's metadata that holds ``settings`` as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(settings, sort_keys=True, ensure_ascii=False))
    return info


def save_png(image: Image.Image, file: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG with ``settings`` as JSON in its metadata; the file appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        image.save(partial, "PNG", pnginfo=png_info(settings))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings that ``save_png`` wrote into a PNG; {} for a picture of other make."""
    with Image.open(file) as image:
        return dict(json.loads(image.info.get(KEY, "{}")))


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = (), heads: Sequence[str] = ()) -> Image.Image:
    """Lay pictures out in rows, with a label before each row and a head above each column."""
    width, height = rows[0][0].size
    left = max((8 * len(label) for label in labels), default=0)
    top = 16 if heads else 0
    gap = max(2, width // 32)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap) + gap, top + len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((left + gap + column * (width + gap), 2), head, "black")
    for index, row in enumerate(rows):
        y = top + gap + index * (height + gap)
        if labels:
            draw.text((4, y + height // 2 - 6), labels[index], "black")
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + gap + column * (width + gap), y))
    return sheet
