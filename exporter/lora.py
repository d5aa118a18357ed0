"""LoRA merged into a checkpoint's weights: W + scale · alpha / rank · up · down (https://arxiv.org/abs/2106.09685).

diffusers' own converters bring the spellings of the trainers (kohya's sd-scripts, LoCon's convolutions, diffusers of
all times, PEFT) to PEFT's. The sums are made when a weight is read (``exporter.stored.Merged``), so an export, the
reference and the gate all see the same merged model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from exporter.stored import FLOATS, Merged
from runtimes import strict_json
from runtimes.errors import DexportError, first_of
from runtimes.manifest import Adapter
from runtimes.safetensors import Stored, check_finite, read_header, read_metadata

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

OTHERS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT",
    "lora_mid": "a LoCon with Tucker decomposition",
}  # fmt: skip
"""What is no plain product of two factors, by a part of its tensors' names."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # as diffusers prefixes names
SETTINGS = "lora_adapter_metadata"  # the entry in a file's metadata where diffusers keeps PEFT's configuration
FACTOR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
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
    """The two factors for one weight, and alpha / rank."""

    down: Stored
    up: Stored
    scale: float


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
        # A name with its dots as underscores is how kohya writes it, which no converter brings back with certainty.
        stored = {_flat(f"{name}.{known}"): key for key in entries if (known := family.rename(name, key)) is not None}
        for target in [target for target in updates if target.startswith(f"{name}.")]:
            weight = f"{target.partition('.')[2]}.weight"
            key = stored.get(_flat(f"{name}.{family.rename(name, weight) or weight}"))
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


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _merged(weight: Stored, update: Update, lora: Lora) -> Merged:
    """The weight with its update; DexportError if the factors are not of its shape."""
    down, up = update.down.shape, update.up.shape
    fits = len(down) >= 2 and len(up) >= 2 and down[0] == up[1] and prod(up[2:]) == 1
    if not fits or up[0] != weight.shape[0] or prod(down[1:]) != prod(weight.shape[1:]):
        raise DexportError(
            f"{lora.file}: {update.down.name!r} is {list(down)} and its other factor {list(up)}, where the weight "
            f"{weight.name!r} is {list(weight.shape)}; it is a LoRA for another model"
        )
    return Merged(weight, update.down, update.up, lora.scale * update.scale)


def _read(file: Path, checkpoint: Checkpoint) -> dict[str, Update]:
    """The updates of a file by "<component>.<module>", its tensors checked for NaN."""
    if file.suffix != ".safetensors" or not file.is_file():
        what = "no such file" if not file.exists() else "not a .safetensors file"
        raise DexportError(f"{file}: {what}; a LoRA is one .safetensors file")
    entries = read_header(file)
    for part, kind in OTHERS.items():
        if found := [name for name in entries if part in name]:
            raise DexportError(f"{file}: {found[0]!r} is of {kind}; only plain LoRA and LoCon are merged")
    for entry in entries.values():
        if entry.dtype not in FLOATS:
            raise DexportError(f"{file}: tensor {entry.name!r} is {entry.dtype}; only float weights are merged")
    check_finite(entries.values())
    factors, alphas = _convert(file, checkpoint)
    settings = _settings(file)
    updates = {}
    for target in sorted({name for name, _ in factors}):
        pair = factors.get((target, "A")), factors.get((target, "B"))
        if pair[0] is None or pair[1] is None:
            raise DexportError(f"{file}: {target!r} has only one of its two factors; the file is not whole")
        rank = max(pair[0].shape[0] if pair[0].shape else 0, 1)
        updates[target] = Update(pair[0], pair[1], _scaling(target, rank, alphas, settings))
        if not math.isfinite(updates[target].scale):
            raise DexportError(f"{file}: {target!r} has an alpha that is no usable number")
    return updates


def _convert(file: Path, checkpoint: Checkpoint) -> tuple[dict[tuple[str, str], Stored], dict[str, float]]:
    """Factors by (target, "A" or "B"), and alphas by target, under the names of PEFT."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from exporter.handles import handle, stored
    from exporter.trace import quiet

    tensors = {name: handle(entry) for name, entry in read_header(file).items()}
    unet = checkpoint.components.get("unet")
    config = SimpleNamespace(**{"layers_per_block": 2, **(unet.config if unet else {})})
    try:
        with quiet():
            state, found = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)
            named = _to_peft(state)
            named_alphas = _to_peft(found or {})
    except Exception as error:  # diffusers' converters fail in their own ways over names that they do not expect
        raise DexportError(f"{file}: not a LoRA that can be read ({type(error).__name__}: {error})") from error
    factors: dict[tuple[str, str], Stored] = {}
    alphas = {re.sub(r"(\.lora_A\.weight)?\.alpha$", "", name): float(alpha) for name, alpha in named_alphas.items()}
    strange = []
    for name, value in named.items():
        if match := FACTOR.fullmatch(name):
            factors[match[1], match[2]] = stored(value)
        elif name.endswith(".alpha"):  # beside PEFT's names
            alphas[name.removesuffix(".alpha")] = value.item()
        else:
            strange.append(name)
    if strange or not factors:
        what = f"{first_of(sorted(strange))} belongs to no LoRA" if strange else "it holds no LoRA"
        raise DexportError(
            f"{file}: {what}; only plain LoRA and LoCon, in kohya's, diffusers' or PEFT's names, is merged"
        )
    return factors, alphas


def _to_peft(state: Mapping[str, Any]) -> dict[str, Any]:
    """Bring diffusers' names of any time to PEFT's; one without a component is of the UNet."""
    from diffusers.utils import state_dict_utils as names

    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        name = name.removeprefix("base_model.model.")
        component, _, rest = name.partition(".")
        if component not in COMPONENTS:
            component, rest = "unet", name
        parts.setdefault(component, {})[rest] = value
    made: dict[str, Any] = {}
    for component, part in parts.items():
        text = names.DIFFUSERS_OLD_TO_PEFT | names.DIFFUSERS_TO_PEFT
        mapping = text if component.startswith("text_encoder") else names.UNET_TO_DIFFUSERS
        made |= {f"{component}.{key}": value for key, value in names.convert_state_dict(part, mapping).items()}
    return made


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's configuration as diffusers writes it into a file: "unet.lora_alpha" and so on; {} where there is none."""
    text = read_metadata(file).get(SETTINGS)
    try:
        value = strict_json.loads(text) if text else {}
    except ValueError as error:
        raise DexportError(f"{file}: its metadata {SETTINGS} are not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _scaling(target: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """alpha / rank, and 1 where nothing says an alpha; with PEFT's rank-stabilized LoRA, alpha / √rank."""
    component, _, module = target.partition(".")
    if target in alphas:
        return alphas[target] / rank
    alpha = settings.get(f"{component}.lora_alpha", rank)
    for pattern, own in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # as PEFT looks it up
            alpha = own
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)
