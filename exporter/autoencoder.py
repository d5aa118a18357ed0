"""An autoencoder that is given beside a checkpoint (``--vae``), in place of its own or of one that it lacks.

A folder of diffusers has its configuration with it. One .safetensors file, as the community shares autoencoders, has
not: it is that of the checkpoint's own, or of the single files of the same pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import single_file
from exporter.families import parts
from runtimes.errors import DexportError
from runtimes.safetensors import Entry, Stored

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "vae"
CLASS = "AutoencoderKL"
OURS = re.compile(
    r"(encoder|decoder)\.(conv_in|mid_block|down_blocks|up_blocks|conv_norm_out|conv_out)\b|(post_)?quant_conv\."
)
THEIRS = re.compile(r"(encoder|decoder)\.(down|up|mid)\.")  # in the names of the training code
CHANNELS = ("latent_channels", "z_dim")  # of the latents, by the class
LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")  # the image is halved between two of them


def find_config(own: Path, pipeline: str) -> Path | None:
    """The config.json that a file without one goes by: the checkpoint's ``own``, else that of our single files."""
    if own.is_file():
        return own
    for index in sorted(single_file.CONFIGS.glob("*/model_index.json")):
        other = index.parent / NAME / "config.json"
        if re.search(rf'"_class_name":\s*"{pipeline}"', index.read_text(encoding="utf-8")) and other.is_file():
            return other
    return None


def from_file(
    file: Path, header: Mapping[str, Entry], config: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Mapping[str, Stored]]:
    """The config.json and the tensors, in diffusers' names, of an autoencoder in one file; or of a whole checkpoint."""
    if config is None or config.get("_class_name", CLASS) != CLASS:
        raise DexportError(
            f"{file}: an autoencoder in one file has no configuration, and none is known for this checkpoint; give "
            "diffusers' folder with its config.json"
        )
    inner = single_file.AUTOENCODER
    if any(name.startswith(inner) for name in header):
        header = {name: entry for name, entry in header.items() if name.startswith(inner)}
    elif any(THEIRS.match(name) for name in header):
        header = {f"{inner}{name}": replace(entry, name=f"{inner}{name}") for name, entry in header.items()}
    elif any(OURS.match(name) for name in header):
        return {**config, "_class_name": CLASS}, header
    else:
        raise DexportError(f"{file}: not an autoencoder in diffusers' names or in those of its training code")
    return {**config, "_class_name": CLASS}, single_file.convert(file, header, {NAME: config})[NAME]


def check(checkpoint: Checkpoint, own: Mapping[str, Any] | None) -> None:
    """Raise DexportError unless the given autoencoder has the latents of ``own``'s, and the weights of its config.

    own: the config.json of the checkpoint's own one, if it has one.
    """
    given = checkpoint.components[NAME]
    if own is not None:
        found, wanted = (_latents(config) for config in (given.config, own))
        if found != wanted:
            raise DexportError(
                f"{given.path}: its latents have {found[0]} channels, each of {found[1]} pixels a side, where those of "
                f"this checkpoint have {wanted[0]}, of {wanted[1]}; give an autoencoder for the same latents"
            )
    if given.class_name == CLASS:
        import torch

        from exporter.trace import quiet
        from exporter.weights import bind, parameter_shapes

        with quiet(), torch.device("meta"):
            shapes = parameter_shapes(parts.build_vae(given.config))
        bind(checkpoint, {f"{NAME}.{name}": shape for name, shape in shapes.items()})


def _latents(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Channels, and pixels a side of each."""
    channels = next((config[name] for name in CHANNELS if config.get(name) is not None), 4)
    levels = next((config[name] for name in LEVELS if isinstance(config.get(name), Sequence)), [64])
    return channels, 1 << (len(levels) - 1)
