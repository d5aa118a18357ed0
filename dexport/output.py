"""Where what ``dexport run`` draws goes: names of the files, whether they can be written, and the writing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtimes.errors import DexportError

if TYPE_CHECKING:
    from runtimes.pipeline import Result

PICTURES, VIDEOS = (".png",), (".gif", ".png", ".mp4")  # by the ending of a file's name
DEFAULTS = {PICTURES: Path("image.png"), VIDEOS: Path("video.gif")}
OTHERS = (
    ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".ppm", ".svg", ".mp4", ".webm",
    ".mov", ".mkv", ".avi",
)  # fmt: skip


def files(output: Path | None, count: int, *, videos: bool) -> list[Path]:
    """Name ``count`` pictures or videos: ``output`` where it is one file, numbered beside it where several.

    Else it is a folder: of pictures, and of the frames of a video, or of a folder for each of several videos.
    """
    endings = VIDEOS if videos else PICTURES
    output = DEFAULTS[endings] if output is None else output
    ending = output.suffix.lower()
    if ending in endings and not output.is_dir():
        if count == 1:
            return [output]
        return [output.with_name(f"{output.stem}-{index:03d}{output.suffix}") for index in range(count)]
    if ending in OTHERS and not output.is_dir():
        what = "videos" if videos else "pictures"
        raise click.BadParameter(f"{output}: {what} are written as {', '.join(endings)}; name such a file, or a folder")
    if videos and count == 1:
        return [output]
    return [output / f"{index:03d}{'' if videos else '.png'}" for index in range(count)]


def check(places: Sequence[Path], fps: float | None) -> None:
    """Raise DexportError, before any work, where one of these could not be written; fps: of videos."""
    for place in places:
        file = place if place.suffix.lower() in VIDEOS else place / "000.png"  # else it is a folder of frames
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        if file.is_dir():
            raise DexportError(f"{file}: there is a folder of this name; choose another output")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise DexportError(f"{file}: cannot be written: {folder} is not a folder that you may write to")
        if fps is not None:
            from runtimes import video

            video.check(place, fps)


def save(result: Result, places: Sequence[Path]) -> None:
    """Write each picture or video with the settings that made it, making folders as needed."""
    from runtimes.image import save_png

    drawn: Sequence[Any] = result.videos or result.images
    for one, made, place in zip(drawn, result.settings, places, strict=True):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if result.videos:
                one.save(place, made)
            else:
                save_png(one, place, made)
        except OSError as error:
            raise DexportError(f"{place}: cannot be written ({error.strerror or error})") from error


def listed(result: Result, places: Sequence[Path]) -> Mapping[str, Any]:
    """What was written, ready for JSON."""
    made = [{"file": place, **settings} for place, settings in zip(places, result.settings, strict=True)]
    return {"videos" if result.videos else "images": made, "warnings": result.warnings}
