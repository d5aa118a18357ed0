"""What steers a checkpoint's UNet by a picture, read beside it: ControlNet, T2I-Adapter and IP-Adapter.

Each becomes components of the checkpoint, under the name that requests will call its picture by; what becomes of them
in the graphs is ``exporter.steering``'s. An IP-Adapter is in two places: what makes tokens of a picture is a component
of its own, and its keys and values for each attention are weights of the UNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter import ip_adapter
from exporter.checkpoint import Checkpoint, Component, classes_of, component, read_json, read_weights
from exporter.ip_adapter import IMAGE_ENCODER
from runtimes.check import NEGATIVE
from runtimes.errors import DexportError
from runtimes.safetensors import Entry, check_finite, read_header

NETWORKS = ("ControlNetModel", "T2IAdapter")  # the classes that a folder may be of
ENCODER = "CLIPVisionModelWithProjection"
FAMILIES = ("stable-diffusion", "stable-diffusion-xl")  # whose denoiser such a network was made for
OWN = ("controlnet", "adapter")  # the components of a pipeline that are one, or several: controlnet, controlnet_1, ...
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Named:
    """A folder or a file, and the name that its picture has in requests."""

    name: str
    path: Path

    @classmethod
    def parse(cls, text: str | Path) -> Named:
        """Read "PATH" or "NAME=PATH"; without a name it is the path's last part, in small letters, digits and _."""
        name, equals, path = str(text).partition("=")
        if not equals or Path(str(text)).exists():
            path, name = str(text), re.sub(r"[^a-z0-9]+", "_", Path(str(text)).stem.lower()).strip("_")
        if not NAME.fullmatch(name) or name.startswith(NEGATIVE):
            raise DexportError(
                f"{text}: {name!r} is no name for its picture; give one of small letters, digits and _, like "
                f"canny={path}"
            )
        return cls(name, Path(path))


def add(
    checkpoint: Checkpoint,
    controls: Sequence[Path | str] = (),
    ip_adapters: Sequence[Path | str] = (),
    image_encoder: Path | str | None = None,
    *,
    variant: str | None = None,
    check: bool = True,
) -> Checkpoint:
    """Return the checkpoint with the networks that are its own, and those asked for, as components.

    controls, ip_adapters: each "PATH" or "NAME=PATH". Raises DexportError for what is missing, of another class or made
    for another kind of model; with ``check``, for weights that are not finite too.
    """
    networks, adapters = [*_own(checkpoint), *map(Named.parse, controls)], [*map(Named.parse, ip_adapters)]
    if not adapters and image_encoder is not None:
        raise DexportError("an image encoder is for an IP-Adapter; give one with --ip-adapter, or leave it out")
    if not networks and not adapters:
        return checkpoint
    if checkpoint.family.NAME not in FAMILIES:
        raise DexportError(f"a {checkpoint.pipeline} takes no ControlNet or adapter; only {' and '.join(FAMILIES)} do")
    _check_names([*networks, *adapters], {*checkpoint.components, *checkpoint.tokenizers, "scheduler", IMAGE_ENCODER})
    components, files = dict(checkpoint.components), dict(checkpoint.files)
    for named in networks:
        components[named.name] = _read_folder(named, NETWORKS, files, variant)
    if adapters:
        if image_encoder is None:
            raise DexportError(
                f"{adapters[0].path}: an IP-Adapter needs the image encoder that it was trained with; give its folder "
                "with --image-encoder"
            )
        components[IMAGE_ENCODER] = _read_folder(Named(IMAGE_ENCODER, Path(image_encoder)), (ENCODER,), files, variant)
    for index, named in enumerate(adapters):
        unet = components["unet"]
        projection, keys = ip_adapter.split(named.path, _read_file(named.path), unet.entries, index)
        components["unet"] = replace(unet, entries={**unet.entries, **keys})
        components[named.name] = Component(named.name, ip_adapter.CLASS, named.path, {}, projection)
        files[f"{named.name}/{named.path.name}"] = named.path
    if check:
        for name in components.keys() - checkpoint.components.keys():
            check_finite(components[name].entries.values())
        check_finite(entry for name, entry in components["unet"].entries.items() if ".processor." in name)
    return replace(
        checkpoint, components=components, files=files, hints=tuple(named.name for named in (*networks, *adapters))
    )


def _own(checkpoint: Checkpoint) -> list[Named]:
    """The networks that are components of a pipeline's own folder."""
    found: list[Named] = []
    for name in OWN:
        if not checkpoint.path.is_dir() or checkpoint.index.get(name) in (None, [None, None]):
            continue
        count = 0
        while not count or (checkpoint.path / f"{name}_{count}").is_dir():
            own = f"{name}_{count}" if count else name
            found.append(Named(own, checkpoint.path / own))
            count += 1
    return found


def _check_names(every: Sequence[Named], taken: set[str]) -> None:
    for named in every:
        if named.name in taken:
            raise DexportError(
                f"{named.path}: the name {named.name!r} is taken; give another, like {named.name}_2={named.path}"
            )
        taken.add(named.name)


def _read_folder(named: Named, classes: Sequence[str], files: dict[str, Path], variant: str | None = None) -> Component:
    """The component in a folder of diffusers or transformers; adds the files that it is of to ``files``."""
    folder, used = named.path, {}
    if not folder.is_dir():
        raise DexportError(f"{folder}: no such folder; {' or '.join(classes)} is read from a folder of diffusers")
    used["config.json"] = folder / "config.json"
    config = read_json(used["config.json"])
    named_classes = classes_of(config)
    found = [name for name in classes if name in named_classes]
    if not found:
        said = next(iter(named_classes), None)
        raise DexportError(f"{folder}: config.json says {said!r:.60}; it must be {' or '.join(classes)}")
    entries = read_weights(folder, named.name, used, variant)
    files |= {f"{named.name}/{path.name}": path for path in used.values()}
    return component(named.name, found[0], folder, config, entries)


def _read_file(file: Path) -> Mapping[str, Entry]:
    if file.suffix != ".safetensors" or not file.is_file():
        what = "no such file" if not file.exists() else "not a .safetensors file"
        raise DexportError(f"{file}: {what}; an IP-Adapter is one .safetensors file")
    return read_header(file)
