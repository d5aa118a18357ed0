"""A prior and the decoder of what it draws: one checkpoint, whether they were saved together or each in its own folder.

diffusers has a combined pipeline of such two, whose components are the decoder's, and the prior's with "prior_" before
their names. So what is in two folders is read as the combined one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import DexportError

PREFIX = "prior_"
# A decoder's pipeline class to its prior's and to that of both.
COMBINED = {
    "KandinskyV22Pipeline": ("KandinskyV22PriorPipeline", "KandinskyV22CombinedPipeline"),
    "StableCascadeDecoderPipeline": ("StableCascadePriorPipeline", "StableCascadeCombinedPipeline"),
    "WuerstchenDecoderPipeline": ("WuerstchenPriorPipeline", "WuerstchenCombinedPipeline"),
}


@dataclass(frozen=True)
class Place:
    """Where components lie: ``place / "prior_tokenizer/vocab.json"`` is in the prior's folder, where it has its own."""

    folder: Path
    prior: Path | None

    def __truediv__(self, path: str) -> Path:
        if self.prior is not None and path.startswith(PREFIX):
            return self.prior / path.removeprefix(PREFIX)
        return self.folder / path


def join(folder: Path, decoder: Mapping[str, Any], prior_folder: Path, prior: Mapping[str, Any]) -> dict[str, Any]:
    """What model_index.json of both would say; DexportError for two that do not belong together."""
    name, prior_name = str(decoder.get("_class_name")), str(prior.get("_class_name"))
    if name not in COMBINED:
        raise DexportError(f"{folder}: a {name} takes no prior; leave --prior out")
    wanted, both = COMBINED[name]
    if prior_name != wanted:
        raise DexportError(f"{prior_folder}: a {prior_name}; the prior of a {name} is a {wanted}")
    return {**decoder, **{f"{PREFIX}{key}": value for key, value in prior.items()}, "_class_name": both}


def check_whole(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise DexportError for one of two, with the way to give the other."""
    name = str(index.get("_class_name"))
    if name in COMBINED:
        raise DexportError(f"{folder}: a {name} draws what a prior tells it; give the {COMBINED[name][0]} with --prior")
    if name in {prior for prior, _ in COMBINED.values()}:
        raise DexportError(f"{folder}: a {name}, which draws no picture; give it with --prior beside its decoder")
