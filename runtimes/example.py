"""Requests that suit a model whatever it takes: for the proof of a bundle, its timing and its calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from runtimes import hints, subject
from runtimes.manifest import Model
from runtimes.request import Request

PROMPT = "a red apple"
PATCHES = 8  # of colour along each side of a picture that is shown: what is smaller is the model's to invent


def subjects(model: Model, count: int) -> tuple[str, ...]:
    """Names for ``count`` different pictures: classes spread over all, or else the pictures' numbers.

    The model must be one without prompts: which to take is for whoever knows what they are for.
    """
    labels = model.stages[0].labels
    if labels is None:
        return tuple(f"picture {index + 1}" for index in range(count))
    return tuple(str(round(place)) for place in np.linspace(0, labels.count - 1, count))


def one(model: Model) -> str:
    """The subject that one picture is enough of; of classes the last, which a table with too few does not have."""
    return PROMPT if model.stages[0].text is not None else subjects(model, 2)[-1]


def request(model: Model, names: str | Sequence[str], **settings: Any) -> Request:
    """A request for a subject or several: prompts, classes, or names that only count where there is neither.

    A model that is shown a picture, or steered by some, gets those of smooth colours; the same for the same seed. One
    that paints into a picture gets such a one, and a mask of its middle.
    """
    stage, every = model.stages[0], [names] if isinstance(names, str) else list(names)
    if stage.text is not None:
        settings["prompts"] = every
    elif stage.labels is not None:
        settings["labels"] = every
    else:
        settings["images"] = len(every) * settings.get("images", 1)
    if subject.shown(model):
        settings["image"] = _colours(settings.get("seed", 0), model.stages[-1].sample[-2:])
    last = model.stages[-1]  # whose samples are pictures, or latents of such
    height, width = (side * last.factor for side in last.sample[-2:])
    settings["hints"] = {
        hint.name: _colours(settings.get("seed", 0) + i, (height, width))
        for i, hint in enumerate(hints.taken(model), 1)
    }
    if subject.paints(model):
        settings["image"] = _colours(settings.get("seed", 0), (height, width))
        settings["mask"] = _middle(height, width)
    return Request(**settings)


def from_image(model: Model, names: str | Sequence[str], *, masked: bool = False, **settings: Any) -> Request:
    """A request that starts from an image of smooth colours; ``masked``: that inpaints its middle."""
    last = model.stages[-1]
    height, width = (side * last.factor for side in last.sample[-2:])
    settings["image"] = _colours(settings.get("seed", 0), (height, width))
    return request(model, names, **settings, **({"mask": _middle(height, width)} if masked else {}))


def _middle(height: int, width: int) -> Image.Image:
    """A mask that is white in its middle, whose edges are no multiples of the pixels of a latent."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4 + 1, height // 4 + 1, width - width // 4 - 1, height - height // 4 - 1))
    return mask


def _colours(seed: int, size: tuple[int, ...]) -> Image.Image:
    random = np.random.Generator(np.random.Philox(seed))
    pixels = random.integers(0, 256, (PATCHES, PATCHES, 3), np.uint8)
    return Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
