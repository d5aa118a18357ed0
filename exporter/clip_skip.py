"""Clip skip: the text encoder's states of an earlier layer, which many fine-tuned models were trained with.

The states of layer L, normed by the encoder's last norm, are those of an encoder that ends after layer L. So the layers
beyond are left out of the checkpoint, and neither the graph nor its family knows.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from runtimes.errors import DexportError

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

ENCODER = "CLIPTextModel"  # one with a projection gives its last layer's pooled state too, which must stay
LAYER = re.compile(r"(text_model\.)?encoder\.layers\.(\d+)\..*")


def skip(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """Return the checkpoint with the layers after the ``count``-th from the end left out of its text encoder.

    1 is the encoder as it is, 2 the states of the last layer but one, as the community counts. Raises DexportError for
    a checkpoint without one CLIP text encoder, or with fewer layers.
    """
    if count == 1:
        return checkpoint
    encoders = {name: part for name, part in checkpoint.components.items() if name.startswith("text_encoder")}
    if [part.class_name for part in encoders.values()] != [ENCODER]:
        raise DexportError(f"clip skip is for a pipeline with one {ENCODER}; leave it out for a {checkpoint.pipeline}")
    ((name, part),) = encoders.items()
    layers = part.config.get("num_hidden_layers", 12)  # CLIPTextConfig's default
    if type(layers) is not int or not 1 <= count <= layers:
        raise DexportError(f"clip skip must be 1 to {layers}, the layers of the text encoder, not {count}")
    left = layers - (count - 1)
    entries = {
        key: entry
        for key, entry in part.entries.items()
        if not ((layer := LAYER.fullmatch(key)) and int(layer[2]) >= left)
    }
    shorter = replace(part, config={**part.config, "num_hidden_layers": left}, entries=entries)
    return replace(checkpoint, components={**checkpoint.components, name: shorter})
