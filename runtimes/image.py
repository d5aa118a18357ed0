"""Pictures: arrays to 8 bits, PNG files that remember how they were made, and grids of them."""

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


def to_images(array: NDArray[Any]) -> list[Image.Image]:
    """Turn float [B, 3, H, W] in [0, 1] into RGB pictures, rounding to the nearest of 256 levels."""
    pixels = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels]


def to_array(
    image: Image.Image, size: tuple[int, int], resample: Literal["lanczos", "bicubic"] = "lanczos"
) -> NDArray[np.float32]:
    """Turn a picture into float32 [1, 3, H, W] in [0, 1] of ``size`` (height, width).

    Transparent parts become white; a picture of another size is scaled to fill this one, and cut evenly at its sides:
    cut first with "lanczos", scaled first with "bicubic", as CLIP was trained. One that a camera turned by a note in
    its metadata is turned. Raises DexportError for one of no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert would cut off all but the darkest 256th
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DexportError(f"a picture of mode {image.mode}, whose white is not known; save it as an 8-bit picture")
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    fitted = (
        ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.LANCZOS) if resample == "lanczos" else _cut(flat, size)
    )
    return np.asarray(fitted, np.float32).transpose(2, 0, 1)[None] / np.float32(255)


def _cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture that was scaled to be just as large as ``size`` (height, width) or larger on one side."""
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
