"""The emoji data set: 1,636 Noto emoji at 32x32 on white, each with the names that draw it.

The two files beside this one are all that training and judging need; they were made from the npm package
``emoji-datasource-google`` (pictures: Noto Emoji, Apache-2.0; names: emoji-data, MIT) by

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python examples/emoji/data.py package
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SHEET, NAMES = HERE / "emoji.png", HERE / "emoji.json"
SIZE, COLUMNS = 32, 41


def load() -> tuple[np.ndarray, list[list[str]]]:
    """Return the pictures, uint8 [N, 32, 32, 3], and for each its names; the first name is unique."""
    names = json.loads(NAMES.read_text())
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    rows = sheet.shape[0] // SIZE
    tiles = sheet.reshape(rows, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return tiles[: len(names)].copy(), names


def prompts(count: int, seed: int = 0) -> tuple[list[int], list[str]]:
    """Choose ``count`` different emoji: their indices and the first name of each."""
    _, names = load()
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    return [int(i) for i in chosen], [names[i][0] for i in chosen]


def make(package: Path) -> None:
    """Write the sheet and the names from an unpacked ``emoji-datasource-google``."""
    entries = [
        entry
        for entry in json.loads((package / "emoji.json").read_text())
        if entry["category"] not in ("Flags", "Component") and entry["has_img_google"]
    ]
    entries.sort(key=lambda entry: entry["sort_order"])
    count = Counter(entry["name"] for entry in entries)
    names = []
    for entry in entries:
        words = [name.replace("_", " ").replace("-", " ").lower() for name in entry["short_names"]]
        full = [entry["name"].lower()] if count[entry["name"]] == 1 else []
        names.append(list(dict.fromkeys(full + words)))
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(entries) // COLUMNS) * SIZE), "white")
    for index, entry in enumerate(entries):
        picture = Image.open(package / "img/google/64" / entry["image"]).convert("RGBA")
        # Blend before shrinking: averaging colours under zero alpha would leave dark edges.
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        small = white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        sheet.paste(small, (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
    sheet.save(SHEET, optimize=True)
    NAMES.write_text("[\n" + ",\n".join(json.dumps(n, ensure_ascii=False) for n in names) + "\n]\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
