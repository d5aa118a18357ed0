"""The prompts of a calibration: the user's own, or some that go over what people draw."""

from __future__ import annotations

from pathlib import Path

from runtimes.errors import DexportError

FEWEST = 4  # with fewer, a range is one picture's
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


def read(file: Path) -> list[str]:
    """Read a UTF-8 file with one prompt a line, empty lines left out; DexportError if there are too few."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DexportError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DexportError(f"{file}: not UTF-8; save it as UTF-8, one prompt a line") from error
    return check([line.strip() for line in lines if line.strip()], str(file))


def check(prompts: list[str], where: str) -> list[str]:
    """Return ``prompts`` if they are enough to calibrate with."""
    if any(not prompt.strip() for prompt in prompts):
        raise DexportError(f"{where}: a prompt is empty; leave it out, the unguided half of each step is one")
    if len(set(prompts)) < FEWEST:
        raise DexportError(
            f"{where}: {len(set(prompts))} different prompts are too few to calibrate with; give {FEWEST} or more"
        )
    return prompts
