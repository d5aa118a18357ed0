"""The prompts of a calibration: the user's own, or some that go over what people draw.

Of a model with classes the prompts are names or numbers of its classes; of one with neither, names that stand for the
seeds of its pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtimes import example, subject
from runtimes.errors import DexportError
from runtimes.manifest import Model, Stage

FEWEST = 4  # to calibrate with: with fewer, a range is one picture's
JUDGES = 2  # at least, to judge by: a median of one picture is chance
DEFAULT = (
    "a red apple on a wooden table",
    "portrait of an old sailor with a white beard, oil painting",
    "a dog running on the beach at sunset",
    "the skyline of a city at night, rain, neon lights",
    "a bowl of noodle soup with an egg, seen from above",
    "a green mountain valley with a river, morning mist",
    "a blue sports car parked in front of a garage",
    "smiling face with sunglasses",
    "a black and white photograph of an empty train station",
    "a yellow flower in a glass vase, watercolour",
    "an astronaut floating above the earth",
    "a small cottage in the snow, smoke from the chimney",
    "two cats asleep on a striped sofa",
    "a plate with a slice of chocolate cake",
    "an open book, a pencil and a pair of glasses",
    "a hot air balloon in a clear sky",
)
JUDGED = (
    "a bicycle leaning against a brick wall",
    "a tiger in tall grass, close-up",
    "a lighthouse in a storm, dramatic light",
    "a cup of coffee beside a croissant",
)
"""What a quantized model is judged by: prompts that it was not calibrated with."""


def defaults(model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to calibrate ``model`` with, and what to judge it by, where its user names nothing."""
    if model.stages[0].text is not None:
        return DEFAULT, JUDGED
    names = example.subjects(model, len(DEFAULT) + len(JUDGED))
    every = len(names) // len(JUDGED)
    return tuple(name for index, name in enumerate(names, 1) if index % every), names[every - 1 :: every]


def few(model: Model, count: int) -> tuple[str, ...]:
    """``count`` of ours for a short look at ``model``."""
    return DEFAULT[:count] if model.stages[0].text is not None else example.subjects(model, count)


def check_taken(prompts: Sequence[str], stage: Stage) -> None:
    """Raise DexportError for prompts of a model that has no use for them, and for names that are no class of it.

    stage: the model's first.
    """
    if stage.labels is not None:
        subject.numbers(stage.labels, prompts)
    elif stage.text is None:
        raise DexportError("this model takes no prompts: leave --prompts out, it is calibrated on seeds")


def read(file: Path) -> list[str]:
    """Read a UTF-8 file with one prompt a line, empty lines left out; DexportError for a file that is none."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other signs may stand inside a prompt
    except OSError as error:
        raise DexportError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DexportError(f"{file}: not UTF-8; save it as UTF-8, one prompt a line") from error
    return [line.strip() for line in lines if line.strip()]


def split(prompts: Sequence[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those to calibrate with, and those to judge by: the last quarter, 2 to 4; what stands twice counts once.

    Raises DexportError if there are too few, or one is empty.
    """
    every = list(dict.fromkeys(check_whole(prompts, where)))
    if len(every) < FEWEST + JUDGES:
        raise DexportError(
            f"{where}: {len(every)} different prompts are too few: {FEWEST} are needed to calibrate with and {JUDGES} "
            f"others to judge by; give {FEWEST + JUDGES} or more"
        )
    count = min(len(JUDGED), max(JUDGES, len(every) // 4))
    return tuple(every[:-count]), tuple(every[-count:])


def check_whole(prompts: Sequence[str], where: str) -> Sequence[str]:
    """Return ``prompts`` if each is a text that says something."""
    if any(not isinstance(prompt, str) for prompt in prompts):
        raise DexportError(f"{where}: a prompt is no text; give strings")
    if any(not prompt.strip() for prompt in prompts):
        raise DexportError(f"{where}: a prompt is empty; leave it out, the unguided half of each step is one")
    return prompts


def check(prompts: Sequence[str], where: str) -> Sequence[str]:
    """Return ``prompts`` if they are enough to calibrate with."""
    if len(set(check_whole(prompts, where))) < FEWEST:
        raise DexportError(
            f"{where}: {len(set(prompts))} different prompts are too few to calibrate with; give {FEWEST} or more"
        )
    return prompts
