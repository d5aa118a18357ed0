"""How long ``import dexport`` and ``dexport --help`` take: the median of ten fresh interpreters each.

    python benchmarks/startup.py

The time of an interpreter that does nothing is shown beside them and included in both. Goals: 100 ms and 300 ms.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from statistics import median

RUNS = 10
COMMANDS = {
    "python, nothing": ["-c", "pass"],
    "import dexport": ["-c", "import dexport"],
    "dexport --help": ["-m", "dexport", "--help"],
}


def seconds(words: list[str]) -> float:
    """The wall time of one interpreter with these arguments."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    """Print a line for each command; one run before the ten fills the disk cache."""
    print(f"Python {platform.python_version()}, {platform.machine()}, median of {RUNS}")
    for name, words in COMMANDS.items():
        seconds(words)
        print(f"{name:<18}{1000 * median(seconds(words) for _ in range(RUNS)):6.0f} ms")


if __name__ == "__main__":
    main()
