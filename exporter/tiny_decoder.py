"""A tiny autoencoder's decoder (TAESD) in place of the full one: a fraction of its time, for a little of its exactness.

https://github.com/madebyollin/taesd; diffusers' AutoencoderTiny. There is one for each family's latents, which it takes
as the loop leaves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.families import Shape, Spec, parts
from runtimes.accuracy import psnr, ssim
from runtimes.errors import DexportError
from runtimes.manifest import Stage
from runtimes.safetensors import Entry, Stored

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint
    from exporter.record import Reference

CLASS = "AutoencoderTiny"
COMPONENT = "tiny_decoder"  # of a checkpoint that it was given to with --decoder
GRAPH = "decoder"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
ORIGINAL = re.compile(r"(\d+)\.(.*)")  # taesd_decoder.safetensors, whose first layer, 0, is a tanh without weights


def from_file(file: Path, header: Mapping[str, Entry]) -> tuple[Mapping[str, Any], Mapping[str, Stored]]:
    """The config.json and the tensors of the decoder, in diffusers' names, of one file; it is read off the shapes."""
    found: dict[str, Stored] = {name: entry for name, entry in header.items() if LAYER.fullmatch(name)}
    if not found:
        numbered = {name: ORIGINAL.fullmatch(name) for name in header}
        if not header or not all(numbered.values()) or any(match and match[1] == "0" for match in numbered.values()):
            raise DexportError(f"{file}: not the decoder of an {CLASS} (TAESD), in diffusers' names or its own")
        found = {f"decoder.layers.{int(m[1]) - 1}.{m[2]}": header[name] for name, m in numbered.items() if m}
    return _config(file, found), found


def _config(file: Path, entries: Mapping[str, Stored]) -> dict[str, Any]:
    """A convolution, then for each level some blocks and a convolution."""
    layers = {int(match[1]): match[2] for name in entries if (match := LAYER.fullmatch(name))}
    counts, widths = [0], []
    for index in sorted(layers)[1:]:
        if f"decoder.layers.{index}.weight" not in entries:  # a block, which has convolutions in it
            counts[-1] += 1
            continue
        widths.append(entries[f"decoder.layers.{index}.weight"].shape[1])
        counts.append(0)
    first = entries.get("decoder.layers.0.weight")
    if first is None or len(first.shape) != 4 or not widths:
        raise DexportError(f"{file}: not a whole decoder of an {CLASS}; copy or download it again")
    return {
        "_class_name": CLASS, "latent_channels": first.shape[1], "decoder_block_out_channels": widths,
        "num_decoder_blocks": counts[:-1],
    }  # fmt: skip


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of AutoencoderTiny where they are others than AutoencoderKL's."""
    widths = config.get("decoder_block_out_channels", [64, 64, 64, 64])
    if config.get("upsampling_scaling_factor", 2) != 2:
        raise DexportError(f"{CLASS}: upsampling_scaling_factor={config['upsampling_scaling_factor']!r:.60} must be 2")
    return {"scaling_factor": 1.0, "shift_factor": 0.0, **config, "block_out_channels": widths}


def check(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the decoder alone of what was given; DexportError where its latents are others."""
    part, vae = checkpoint.components[COMPONENT], checkpoint.components.get("vae")
    if vae is None or vae.class_name not in ("AutoencoderKL", CLASS):
        raise DexportError(
            f"{part.path}: an {CLASS} decodes the latents of an AutoencoderKL, which this {checkpoint.pipeline} does "
            "not have; leave --decoder out"
        )
    config = completed(part.config)
    own, theirs = (
        (parts.whole(name, one, "latent_channels", 4), 1 << (len(parts.blocks(name, one, [64])) - 1))
        for name, one in ((COMPONENT, config), ("vae", vae.config))
    )
    if own != theirs:
        raise DexportError(
            f"{part.path}: it decodes latents of {own[0]} channels, each of {own[1]} pixels a side, where those of "
            f"{checkpoint.path} have {theirs[0]}, of {theirs[1]}; leave --decoder out"
        )
    entries = {name: entry for name, entry in part.entries.items() if LAYER.fullmatch(name)}
    part = replace(part, config=config, entries=entries)
    return replace(checkpoint, components={**checkpoint.components, COMPONENT: part})


def spec(checkpoint: Checkpoint, full: Spec) -> Spec:
    """The decoder's graph, with the inputs and outputs of the full one's."""
    config = checkpoint.components[COMPONENT].config
    scale, shift = parts.latent_scale(COMPONENT, config)

    def decode(modules: Any, sample: Any) -> Any:
        image = modules.get_submodule(COMPONENT).decode(sample / scale + shift, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1)

    def build_decoder() -> Any:
        model = build(config)
        del model.encoder
        return model

    return replace(full, builders={COMPONENT: build_decoder}, forward=decode)


def stages(every: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages, of which the last is decoded by it."""
    return (*every[:-1], replace(every[-1], decoder=GRAPH))


def autoencoder(config: Mapping[str, Any], drawn: parts.Canvas) -> dict[str, Spec]:
    """The decoder and the encoder of a checkpoint whose own autoencoder is a tiny one."""
    scale, shift = parts.latent_scale("vae", config)

    def encode(modules: Any, image: Any) -> Any:
        return (modules.vae.encode(image * 2 - 1, return_dict=False)[0] - shift) * scale

    def decode(modules: Any, sample: Any) -> Any:
        return (modules.vae.decode(sample / scale + shift, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    both = {"vae": lambda: build(config)}
    return {
        "decoder": Spec("decoder", both, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", both, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }


def against_full(checkpoint: Checkpoint, recorded: Reference, shape: Shape) -> dict[str, Any]:
    """How near the images of the reference run are to what the full decoder makes of the same latents, in torch."""
    import torch

    from exporter import ensemble, reference

    components = {name: part for name, part in checkpoint.components.items() if name != COMPONENT}
    full = replace(checkpoint, components=components)
    name = str(ensemble.stages(full, shape)[-1].decoder)
    decoder = reference.load(full, name, (shape.height, shape.width))
    calls = recorded.calls[GRAPH]
    images = np.concatenate([call.outputs["image"] for call in calls])
    with torch.inference_mode():
        exact = np.concatenate([decoder(torch.from_numpy(call.inputs["sample"])).numpy() for call in calls])
    return {
        "class": CLASS, "psnr_db": round(psnr(exact, images), 2), "ssim": round(ssim(exact, images), 6),
        "against": checkpoint.components["vae"].class_name,
    }  # fmt: skip


def build(config: Mapping[str, Any]) -> Any:
    """A tiny autoencoder of this config.json."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_config({key: value for key, value in config.items() if key != "block_out_channels"})
