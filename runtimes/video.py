"""Videos: the frames of a sample, and the files that show them: GIF, animated PNG, MP4, or a folder of pictures."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtimes.errors import DexportError
from runtimes.image import grid, png_info, save_png
from runtimes.manifest import Stage

if TYPE_CHECKING:
    from runtimes.request import Request

SUFFIXES = (".gif", ".png", ".mp4")
SLOWEST, FASTEST = 0.1, 240.0  # frames a second that can be asked for
FASTEST_GIF = 50.0  # viewers take a shorter delay than 20 ms for a mistake, and show the frame for 100
GIF_UNIT, PNG_UNIT = 10, 1  # milliseconds that a frame's time is counted in
COLOURS = 256  # of a GIF
PALETTE_PIXELS = 2**18  # of all frames, from which a GIF's colours are chosen
DITHER = 10.0  # of 256 levels: enough that slopes have no bands, too little to put dots into an even colour
COLUMNS = 8  # of a sheet of frames


@dataclass(frozen=True)
class Video:
    """Frames of one size, and how many of them are shown in a second."""

    frames: list[Image.Image]
    fps: float

    def save(self, file: Path | str, settings: Mapping[str, Any] | None = None) -> None:
        """Write by the name's ending: .gif and .png play without end, .mp4 is H.264; else a folder of numbered .png.

        ``settings`` go into the file's metadata as JSON. A file appears whole or not at all. Raises DexportError for
        what ``check`` refuses.
        """
        file, made = Path(file), dict(settings or {})
        check(file, self.fps)
        if file.suffix.lower() not in SUFFIXES:
            file.mkdir(parents=True, exist_ok=True)
            for picture, frame in zip(self.frames, frame_files(file, len(self.frames)), strict=True):
                save_png(picture, frame, made)
            return
        write = {".gif": _write_gif, ".png": _write_png, ".mp4": _write_mp4}[file.suffix.lower()]
        partial = file.with_name(f".{secrets.token_hex(4)}.{file.name}")
        try:
            write(self, partial, made)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def decode(picture: Callable[[NDArray[Any]], NDArray[Any]], sample: NDArray[Any]) -> NDArray[Any]:
    """Turn samples [B, C, F, h, w] into videos [B, F, 3, H, W] with ``picture``, [B, C, h, w] to [B, 3, H, W].

    One frame of each at a time, so that a video needs no more memory than a picture does.
    """
    frames = [picture(np.ascontiguousarray(sample[:, :, index])) for index in range(sample.shape[2])]
    return np.stack(frames, axis=1)


def sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """All frames side by side, in rows of ``COLUMNS``."""
    return grid([frames[start : start + COLUMNS] for start in range(0, len(frames), COLUMNS)])


def frame_files(folder: Path, count: int) -> list[Path]:
    """The pictures that a video of so many frames is in a folder."""
    return [folder / f"{index:03d}.png" for index in range(count)]


def check(file: Path, fps: float) -> None:
    """Raise DexportError, before any work, for a video that could not be written like this."""
    check_fps(fps)
    if file.suffix.lower() == ".gif" and fps > FASTEST_GIF:
        raise DexportError(f"{file}: a GIF shows at most {FASTEST_GIF:g} frames a second, not {fps:g}; write an .mp4")
    if file.suffix.lower() == ".mp4" and find_spec("av") is None:
        raise DexportError(f"{file}: an .mp4 needs av; run: pip install 'dexport[video]', or write a .gif")


def check_fps(fps: Any) -> None:
    """Raise DexportError for what is no number of frames a second."""
    if not isinstance(fps, Real) or not SLOWEST <= float(fps) <= FASTEST:
        raise DexportError(f"a video has {SLOWEST:g} to {FASTEST:g} frames a second, not {fps!r:.80}")


def check_request(stage: Stage, request: Request) -> None:
    """Raise DexportError for what only a video, or only a picture, can be asked for; stage: the model's last one."""
    if request.fps is not None:
        if stage.fps is None:
            raise DexportError("this model draws pictures, which have no frames a second: leave fps out")
        check_fps(request.fps)
    if stage.fps is not None and request.image is not None:
        raise DexportError("this model draws videos out of noise alone: leave the picture out")


def times(count: int, fps: float, unit: int) -> list[int]:
    """How long each frame is shown, in ms: multiples of ``unit`` that together are as near to count / fps as can be."""
    ends = [unit * round(1000 * index / fps / unit) for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _write_gif(video: Video, file: Path, settings: Mapping[str, Any]) -> None:
    """One palette for all frames, and a pattern that stands still: else whatever does not move would flicker."""
    colours = _palette(video.frames)
    first, *rest = [_dithered(frame).quantize(palette=colours, dither=Image.Dither.NONE) for frame in video.frames]
    first.save(
        file, "GIF", save_all=True, append_images=rest, loop=0, duration=times(len(rest) + 1, video.fps, GIF_UNIT),
        comment=_json(settings).encode(),
    )  # fmt: skip


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """The colours that are nearest to those of all frames."""
    pixels = np.concatenate([np.asarray(frame.convert("RGB")).reshape(-1, 3) for frame in frames])
    some = pixels[:: max(1, len(pixels) // PALETTE_PIXELS)]
    return Image.fromarray(some[None]).quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=1)


def _dithered(frame: Image.Image) -> Image.Image:
    """The frame with an ordered pattern of light and dark over it (Bayer 1973), so that few colours mix to many."""
    pattern = np.zeros((1, 1))
    for _ in range(3):  # 8 x 8
        pattern = np.block([[4 * pattern, 4 * pattern + 2], [4 * pattern + 3, 4 * pattern + 1]])
    levels = (pattern + 0.5) / pattern.size - 0.5
    pixels = np.asarray(frame.convert("RGB"), np.float32)
    height, width, _ = pixels.shape
    tiled = np.tile(levels, (-(-height // len(levels)), -(-width // len(levels))))[:height, :width, None]
    return Image.fromarray(np.rint(np.clip(pixels + DITHER * tiled, 0, 255)).astype(np.uint8))


def _write_png(video: Video, file: Path, settings: Mapping[str, Any]) -> None:
    first, *rest = video.frames
    first.save(
        file, "PNG", save_all=True, append_images=rest, loop=0, duration=times(len(rest) + 1, video.fps, PNG_UNIT),
        pnginfo=png_info(settings),
    )  # fmt: skip


def _write_mp4(video: Video, file: Path, settings: Mapping[str, Any]) -> None:
    """H.264 in the colours of BT.709, said so in the file; 4:2:0 is what every player takes."""
    import av

    width, height = video.frames[0].size
    if width % 2 or height % 2:
        raise DexportError(f"an .mp4 has an even height and width, not {height}x{width}; write a .gif")
    colours = "colorprim=bt709:transfer=bt709:colormatrix=bt709:log-level=error"
    with av.open(str(file), "w", format="mp4") as out:
        out.metadata["comment"] = _json(settings)
        stream = out.add_stream(
            "libx264", Fraction(video.fps).limit_denominator(1001), options={"crf": "16", "x264-params": colours}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in video.frames:
            frame = av.VideoFrame.from_image(picture)
            out.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        out.mux(stream.encode(None))


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
