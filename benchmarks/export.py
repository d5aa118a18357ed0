"""Seconds and peak memory of exporting all graphs of a checkpoint, or of a whole build, in a child process of its own.

    python benchmarks/checkpoints.py /tmp/sd15
    python benchmarks/export.py /tmp/sd15 --max-seconds 90 --max-memory 3
    python benchmarks/export.py /tmp/sd15 --build openvino=bf16 --max-memory 6

The time is that of the whole child, so with the start of Python and the imports; the memory is its ru_maxrss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORT = """
import sys
from pathlib import Path
from exporter import hub
options = {"graphs": sys.argv[3].split(",")} if sys.argv[3] else {}
hub.export(Path(sys.argv[1]), Path(sys.argv[2]), **options)
"""
BUILD = """
import sys
from pathlib import Path
import dexport
dexport.build(Path(sys.argv[1]), Path(sys.argv[2]), targets=[sys.argv[3]])
"""


def measure(child: str, checkpoint: Path, option: str, scratch: Path | None) -> dict[str, float]:
    """Run ``child`` once on a folder that is removed after; return seconds, bytes of memory and bytes written."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output = Path(folder) / "made"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", child, str(checkpoint.resolve()), str(output), option],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(output)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory": used.ru_maxrss * 1024,  # Linux gives kilobytes
        "size": size,
    }


def main() -> None:
    """Measure, print, and exit with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--graphs", default="", help="names with commas between; default: all")
    parser.add_argument("--build", metavar="TARGET", help="build a bundle, with its gate, for this target=precision")
    parser.add_argument("--scratch", type=Path, help="folder to write the hub in; default: the system's")
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--max-memory", type=float, help="in GB (1e9 bytes)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    child, option = (BUILD, options.build) if options.build else (EXPORT, options.graphs)
    result = measure(child, options.checkpoint, option, options.scratch)
    result |= {"load_before": load, "cores": os.cpu_count() or 0}
    if options.json:
        print(json.dumps({**result, "python": platform.python_version(), "machine": platform.machine()}, indent=2))
    else:
        print(
            f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU; load before {load:.1f} on "
            f"{result['cores']} cores), {result['peak_memory'] / 1e9:.2f} GB peak, {result['size'] / 1e9:.2f} GB "
            "written"
        )
    slow = options.max_seconds is not None and result["seconds"] > options.max_seconds
    large = options.max_memory is not None and result["peak_memory"] > options.max_memory * 1e9
    sys.exit(1 if slow or large else 0)


if __name__ == "__main__":
    main()
