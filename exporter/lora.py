"""LoRA merged into a checkpoint's weights: W + scale · alpha / rank · up · down (https://arxiv.org/abs/2106.09685).

A DoRA gives each row of that sum a length of its own, whatever the scale, as PEFT does: Liu et al. (2024),
https://arxiv.org/abs/2402.09353.

The spellings of the trainers (kohya's sd-scripts, LoCon's convolutions, diffusers of all times, PEFT and others) are
brought to PEFT's by ``exporter.lora_names``. The sums are made when a weight is read (``exporter.stored.Merged``), so
an export, the reference and the gate all see the same merged model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import lora_names
from exporter.stored import FLOATS, Merged
from runtimes import strict_json
from runtimes.errors import DexportError, first_of
from runtimes.manifest import Adapter
from runtimes.safetensors import Stored, check_finite, read_header, read_metadata

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

OTHERS = {
    "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT", "lora_mid": "a LoCon with Tucker decomposition",
}  # fmt: skip
"""What is no plain product of two factors, by a part of its tensors' names."""
SETTINGS = "lora_adapter_metadata"  # the entry in a file's metadata where diffusers keeps PEFT's configuration
LARGEST = 100.0  # a scale beyond is a slip of the keyboard


@dataclass(frozen=True)
class Lora:
    """A file and how strongly it is merged."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """Read "FILE" or "FILE:SCALE", like style.safetensors:0.8; DexportError for a scale that is none."""
        name, colon, end = str(text).rpartition(":")
        if not colon or Path(str(text)).exists():
            return cls(Path(text))
        try:
            scale = float(end)
        except ValueError:
            return cls(Path(text))  # a colon of the file's own name
        if not abs(scale) <= LARGEST:
            raise DexportError(f"{text}: the scale of a LoRA must be a number up to {LARGEST:g}, not {end}")
        return cls(Path(name), scale)


@dataclass(frozen=True)
class Update:
    """The two factors for one weight, alpha / rank, and of a DoRA the lengths of the sum's rows."""

    down: Stored
    up: Stored
    scale: float
    lengths: Stored | None = None


def merge(checkpoint: Checkpoint, loras: Iterable[str | Path]) -> Checkpoint:
    """Return the checkpoint with LoRA files ("FILE" or "FILE:SCALE") merged, one after the other.

    Raises DexportError for a file that is no LoRA, or not of this checkpoint: every tensor must find its weight.
    """
    for index, lora in enumerate(map(Lora.parse, loras), 1):
        checkpoint = _merge(checkpoint, lora, f"lora{index}/{lora.file.name}")
    return checkpoint


def _merge(checkpoint: Checkpoint, lora: Lora, path: str) -> Checkpoint:
    updates = _read(lora.file, checkpoint)
    family, components = checkpoint.family, dict(checkpoint.components)
    for name, part in components.items():
        entries = dict(part.entries)
        stored = {
            lora_names.flat(f"{name}.{known}"): key
            for key in entries
            if (known := family.rename(name, key)) is not None
        }
        for target in [target for target in updates if target.startswith(f"{name}.")]:
            weight = f"{target.partition('.')[2]}.weight"
            key = stored.get(lora_names.flat(f"{name}.{family.rename(name, weight) or weight}"))
            if key is not None:
                entries[key] = _merged(entries[key], updates.pop(target), lora)
        components[name] = replace(part, entries=entries)
    if updates:
        raise DexportError(
            f"{lora.file}: the checkpoint has no weight for {first_of(sorted(updates))}; it is a LoRA for another model"
        )
    return replace(
        checkpoint,
        components=components,
        files={**checkpoint.files, path: lora.file},
        adapters=(*checkpoint.adapters, Adapter(path, lora.scale)),
    )


def _merged(weight: Stored, update: Update, lora: Lora) -> Merged:
    """The weight with its update; DexportError if the factors are not of its shape."""
    down, up = update.down.shape, update.up.shape
    fits = len(down) >= 2 and len(up) >= 2 and down[0] == up[1] and prod(up[2:]) == 1
    if not fits or up[0] != weight.shape[0] or prod(down[1:]) != prod(weight.shape[1:]):
        raise DexportError(
            f"{lora.file}: {update.down.name!r} is {list(down)} and its other factor {list(up)}, where the weight "
            f"{weight.name!r} is {list(weight.shape)}; it is a LoRA for another model"
        )
    if update.lengths is not None:
        _check_lengths(lora.file, update.lengths, up[0])
    return Merged(weight, update.down, update.up, lora.scale * update.scale, update.lengths)


def _check_lengths(file: Path, lengths: Stored, rows: int) -> None:
    """Raise DexportError for lengths of something else than a weight's rows."""
    shape = lengths.shape
    if prod(shape) == rows and (len(shape) == 1 or rows in (shape[0], *shape[1:2] * (len(shape) > 2))):
        return
    raise DexportError(
        f"{file}: {lengths.name!r} is {list(shape)}, where the weight has {rows} rows; of DoRA, only lengths of single "
        "rows are merged, not of columns (LyCORIS without wd_on_output) or of fused layers"
    )


def _read(file: Path, checkpoint: Checkpoint) -> dict[str, Update]:
    """The updates of a file by "<component>.<module>", its tensors checked for NaN."""
    if file.suffix != ".safetensors" or not file.is_file():
        what = "no such file" if not file.exists() else "not a .safetensors file"
        raise DexportError(f"{file}: {what}; a LoRA is one .safetensors file")
    entries = read_header(file)
    for part, kind in OTHERS.items():
        if found := [name for name in entries if part in name]:
            raise DexportError(f"{file}: {found[0]!r} is of {kind}; only LoRA, LoCon and DoRA are merged")
    for entry in entries.values():
        if entry.dtype not in FLOATS:
            raise DexportError(f"{file}: tensor {entry.name!r} is {entry.dtype}; only float weights are merged")
    check_finite(entries.values())
    factors = lora_names.convert(file, entries, checkpoint)
    settings = _settings(file)
    updates = {}
    for target in sorted({name for name, _ in factors.found}):
        down, up = factors.found.get((target, "A")), factors.found.get((target, "B"))
        if down is None or up is None:
            raise DexportError(f"{file}: {target!r} has only one of its two factors; the file is not whole")
        scale = factors.scales.get(down.name)
        if scale is None:
            scale = _scaling(target, max(down.shape[0] if down.shape else 0, 1), settings)
        if not math.isfinite(scale):
            raise DexportError(f"{file}: {target!r} has an alpha that is no usable number")
        lengths = factors.lengths.get(down.name)
        if lengths is not None and up != entries[up.name]:  # a part of it, or its rows in another order
            raise DexportError(f"{file}: {lengths.name!r} is a DoRA's of a fused layer, which is not merged")
        updates[target] = Update(down, up, scale, lengths)
    return updates


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's configuration as diffusers writes it into a file: "unet.lora_alpha" and so on; {} where there is none."""
    text = read_metadata(file).get(SETTINGS)
    try:
        value = strict_json.loads(text) if text else {}
    except ValueError as error:
        raise DexportError(f"{file}: its metadata {SETTINGS} are not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _scaling(target: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank, and 1 where nothing says an alpha; with PEFT's rank-stabilized LoRA, alpha / √rank."""
    component, _, module = target.partition(".")
    alpha = settings.get(f"{component}.lora_alpha", rank)
    for pattern, own in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # as PEFT looks it up
            alpha = own
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)
