"""Read and write .safetensors strictly, with numpy alone: what a device needs, and what no reader should let pass.

The format: 8 bytes with the header's length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes import strict_json
from runtimes.errors import DexportError

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# Of the format's further types, those that weights are quantized to.
NARROW = {
    "F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E8M0": "fp8", "F8_E4M3FNUZ": "fp8", "F8_E5M2FNUZ": "fp8",
    "F6_E2M3": "fp6", "F6_E3M2": "fp6", "F4": "fp4",
}  # fmt: skip
OTHERS = ("U16", "U32", "U64", "C64")  # and those that no weight has
HEADER_LIMIT = 100_000_000  # bytes, as the reference implementation has it
LARGEST = 2**63 - 1  # of a side or an offset, as numpy counts
DIMENSIONS = 32  # numpy takes 64
CHUNK = 1 << 22  # elements looked at together when searching for NaN, so that memory stays flat


class Stored(Protocol):
    """A tensor that is read from its file when it is asked for; ``name`` and ``file`` are for messages."""

    @property
    def file(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...

    def load(self) -> NDArray[Any]:
        """The tensor in memory; BF16 widened to float32."""

    def finite(self) -> bool:
        """Whether no element is NaN or infinite."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its name, format dtype ("F16"), shape, and first byte and length in ``file``."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def raw(self) -> NDArray[Any]:
        """The tensor as it is stored, mapped from the file; BF16 comes as its bits in uint16."""
        if not self.size:
            return np.zeros(self.shape, NUMPY[self.dtype])
        mapped = np.memmap(self.file, NUMPY[self.dtype], "r", self.offset, self.shape or (1,))
        return mapped.reshape(self.shape)

    def load(self) -> NDArray[Any]:
        """The tensor in memory; BF16 widened to float32, which holds each of its values exactly."""
        return decode(self.raw(), self.dtype)

    def finite(self) -> bool:
        """Whether no element is NaN or infinite; reads the tensor in pieces."""
        if self.dtype not in ("F64", "F32", "F16", "BF16"):
            return True
        flat = self.raw().reshape(-1)
        for start in range(0, flat.size, CHUNK):
            piece = flat[start : start + CHUNK]
            # An exponent of all ones is NaN or infinity.
            bad = (piece & 0x7F80) == 0x7F80 if self.dtype == "BF16" else ~np.isfinite(piece)
            if bad.any():
                return False
        return True


def decode(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A copy in memory of what ``raw`` gave, or of a view of it; the bits of BF16 as float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return np.array(raw)


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of ``file`` by name, after checking every length and offset against the file's size.

    Raises DexportError, naming the file and where possible the tensor, if the file is cut short, has gaps, overlaps
    or a name twice, or a tensor whose bytes do not fit its shape.
    """
    total = file.stat().st_size
    header, base = _header(file)
    header.pop("__metadata__", None)
    try:
        entries = {name: _entry(file, name, item, base) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    end = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        count = int(np.prod(entry.shape, dtype=object))
        if entry.size != count * WIDTHS[entry.dtype]:
            raise DexportError(
                f"{file}: tensor {entry.name!r} has {entry.size} bytes where its shape {list(entry.shape)} "
                f"in {entry.dtype} needs {count * WIDTHS[entry.dtype]}; copy or download it again"
            )
        if entry.offset != end:
            raise DexportError(f"{file}: tensor {entry.name!r} leaves a gap or overlaps; save the file anew")
        end = entry.offset + entry.size
        if end > total:
            raise DexportError(
                f"{file}: cut short: tensor {entry.name!r} ends at byte {end}, the file at {total}; "
                "copy or download it again"
            )
    if end != total:
        raise DexportError(f"{file}: {total - end} bytes follow the last tensor; save the file anew")
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """Return the texts that a file carries beside its tensors; DexportError if its header is damaged."""
    metadata = _header(file)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its metadata are no texts by name")
    return metadata


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at a file's head, and where the tensors begin."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first.startswith(b"GGUF"):
            raise gguf(file)
        length = int.from_bytes(first, "little")
        if total < 8 or length > min(total - 8, HEADER_LIMIT):
            raise DexportError(f"{file}: not a whole .safetensors file ({total} bytes); copy or download it again")
        text = stream.read(length)
    try:
        header = strict_json.loads(text)
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(header, dict):
        raise _damaged(file, "it is no JSON object")
    return header, 8 + length


def _damaged(file: Path, why: object) -> DexportError:
    return DexportError(f"{file}: its header is damaged ({why}); copy or download it again")


def gguf(file: Path) -> DexportError:
    """The refusal of a file of llama.cpp's format, under whatever name."""
    return DexportError(
        f"{file}: a GGUF file, whose weights are quantized; save the model in fp16 or bf16, as .safetensors"
    )


def _entry(file: Path, name: str, item: Mapping[str, Any], base: int) -> Entry:
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if item["dtype"] in NARROW or item["dtype"] in OTHERS:
        stored = NARROW.get(item["dtype"], "a type that no weight has")
        raise DexportError(
            f"{file}: tensor {name!r} is stored in {stored} ({item['dtype']}); save the model in fp16 or bf16"
        )
    if item["dtype"] not in WIDTHS:
        raise ValueError(f"tensor {name!r} has the unsupported dtype {item['dtype']!r}")
    if not all(type(n) is int and 0 <= n <= LARGEST for n in (begin, end, *shape)) or end < begin:
        raise ValueError(f"tensor {name!r} has a wrong shape or offset")
    if len(shape) > DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; at most {DIMENSIONS} are read")
    if math.prod(max(n, 1) for n in shape) > LARGEST // 8:  # numpy refuses it, even where another side is 0
        raise ValueError(f"tensor {name!r} has a shape that is too large")
    return Entry(file, name, item["dtype"], shape, base + begin, end - begin)


def check_finite(entries: Iterable[Stored]) -> None:
    """Raise DexportError naming the first tensor that holds NaN or infinity."""
    for entry in entries:
        if not entry.finite():
            raise DexportError(
                f"{entry.file}: tensor {entry.name!r} holds NaN or infinity; the checkpoint is damaged or its "
                "training diverged"
            )


def write(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name, sorted by name, without metadata: equal arrays give equal bytes."""
    names = {np.dtype(kind): name for name, kind in NUMPY.items() if name != "BF16"}
    header, offset = {}, 0
    for name, value in sorted(tensors.items()):
        header[name] = {
            "dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes],
        }  # fmt: skip
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the specification lets the header end in spaces, which aligns the tensors
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, value in sorted(tensors.items()):
            stream.write(np.ascontiguousarray(value).tobytes())
