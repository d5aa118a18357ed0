"""A motion adapter joined to the UNet that it was trained for: its modules stand between the layers of the UNet.

Guo et al., "AnimateDiff" (2023), https://arxiv.org/abs/2307.04725. diffusers' UNetMotionModel has both; a checkpoint
may hold that, or a UNet for pictures beside a MotionAdapter, which may also be given to one that draws pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtimes.errors import DexportError

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

ADAPTER, CLASS = "motion_adapter", "MotionAdapter"
UNET, PLAIN = "UNetMotionModel", "UNet2DConditionModel"
# A pipeline's class to that with an adapter.
ANIMATED = {
    "StableDiffusionPipeline": "AnimateDiffPipeline",
    "StableDiffusionXLPipeline": "AnimateDiffSDXLPipeline",
}
TRAINED = {"beta_schedule": "linear"}  # the noise that motion adapters were trained with, whatever the UNet was
# Options of an adapter: their names in UNetMotionModel, and MotionAdapter's default.
OPTIONS = {
    "motion_num_attention_heads": ("motion_num_attention_heads", 8),
    "motion_max_seq_length": ("motion_max_seq_length", 32),
    "use_motion_mid_block": ("use_motion_mid_block", True),
    "motion_layers_per_block": ("layers_per_block", 2),
    "motion_transformer_layers_per_mid_block": ("temporal_transformer_layers_per_mid_block", 1),
    "motion_transformer_layers_per_block": ("temporal_transformer_layers_per_block", 1),
}


def animated(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that an adapter was given to, as the pipeline that draws videos with it; DexportError if none does.

    A schedule of noise that was for pictures becomes the one that adapters were trained with.
    """
    if checkpoint.pipeline in ANIMATED.values():
        if checkpoint.components["unet"].class_name == UNET:
            raise DexportError(f"{checkpoint.path}: it has motion modules already; leave --motion-adapter out")
        return checkpoint
    if checkpoint.pipeline not in ANIMATED:
        raise DexportError(
            f"{checkpoint.path}: a {checkpoint.pipeline} takes no motion adapter; only {' and '.join(ANIMATED)} do"
        )
    scheduler = {**checkpoint.scheduler, **TRAINED}
    return replace(checkpoint, pipeline=ANIMATED[checkpoint.pipeline], scheduler=scheduler)


def join(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapter's tensors in its UNet, whose class is then UNetMotionModel.

    One that is saved so has all in its UNet; an adapter beside it is left aside. Raises DexportError for an adapter
    that is not for this UNet, and where there is none.
    """
    if checkpoint.pipeline not in ANIMATED.values():
        return checkpoint
    unet, adapter = checkpoint.components["unet"], checkpoint.components.get(ADAPTER)
    components = {name: part for name, part in checkpoint.components.items() if name != ADAPTER}
    if unet.class_name == UNET:
        files = {name: file for name, file in checkpoint.files.items() if not name.startswith(f"{ADAPTER}/")}
        return replace(checkpoint, components=components, files=files)
    if adapter is None:
        raise DexportError(f"{checkpoint.path}: it has no motion adapter; give one with --motion-adapter")
    if adapter.config.get("conv_in_channels"):
        raise DexportError(f"{adapter.path}: an adapter that is shown a picture (PIA), which is not supported")
    for ours, theirs in (("block_out_channels", "block_out_channels"), ("layers_per_block", "motion_layers_per_block")):
        blocks = len(unet.config.get("block_out_channels", ()))
        pair = [_spread(part.config.get(name), blocks) for part, name in ((unet, ours), (adapter, theirs))]
        if pair[0] != pair[1]:
            raise DexportError(f"{adapter.path}: its {theirs} is {pair[1]!r:.60}, that of the UNet {pair[0]!r:.60}")
    joined = replace(
        unet, class_name=UNET, config=config(unet.config, adapter.config), entries={**unet.entries, **adapter.entries}
    )
    return replace(checkpoint, components={**components, "unet": joined})


def config(unet: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the UNetMotionModel of a UNet2DConditionModel and a MotionAdapter, as diffusers makes it."""
    made = {**unet, "_class_name": UNET}
    for blocks in ("down_block_types", "up_block_types"):
        place = "DownBlock" if blocks.startswith("down") else "UpBlock"
        made[blocks] = [f"{'CrossAttn' * ('CrossAttn' in str(kind))}{place}Motion" for kind in unet.get(blocks, ())]
    made |= {name: adapter.get(own, default) for own, (name, default) in OPTIONS.items()}
    made["num_attention_heads"] = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    return made


def _spread(value: Any, blocks: int) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value] * blocks
