"""Seconds and peak memory of exporting all graphs of a checkpoint, or of a whole build, in a child process of its own.

    python benchmarks/checkpoints.py /tmp/sd15
    python benchmarks/export.py /tmp/sd15 --max-seconds 90 --max-memory 3
    python benchmarks/export.py /tmp/sd15 --build openvino=bf16 --max-memory 6
    python benchmarks/export.py /tmp/sdxl --max-memory 4 --max-rate 10

The time is that of the whole child, so with the start of Python and the imports; the memory is its ru_maxrss. Of an
export the seconds of each phase are printed too: the rate is that of all after tracing, in seconds for each GB of
weights as the checkpoint has them.
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
from typing import Any

BEFORE = ("starting", "tracing")
ROOT = Path(__file__).resolve().parents[1]
EXPORT = """
import json, sys, time
from collections import Counter
from pathlib import Path
from exporter import hub
options = {"graphs": sys.argv[3].split(",")} if sys.argv[3] else {}
seconds, now = Counter(), ["starting", time.perf_counter()]
def progress(what, share):
    seconds[now[0]] += time.perf_counter() - now[1]
    now[:] = [what.rpartition(": ")[2], time.perf_counter()]
hub.export(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress, **options)
print(json.dumps(seconds))
"""
NEEDS = """
import json, sys
from exporter.inspect import inspect
print(json.dumps(inspect(sys.argv[1])["needs"]))
"""
BUILD = """
import sys
from pathlib import Path
import dexport
dexport.build(Path(sys.argv[1]), Path(sys.argv[2]), targets=[sys.argv[3]])
"""


def measure(child: str, checkpoint: Path, option: str, scratch: Path | None) -> dict[str, Any]:
    """Run ``child`` once on a folder that is removed after; return seconds, bytes of memory and bytes written."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output = Path(folder) / "made"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", child, str(checkpoint.resolve()), str(output), option],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{checkpoint}: the child failed; what it said is above")
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(output)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory": used.ru_maxrss * 1024,  # Linux gives kilobytes
        "size": size,
        "phases": json.loads(done.stdout or "{}"),
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
    parser.add_argument("--max-rate", type=float, help="in seconds a GB of weights, of an export after tracing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    child, option = (BUILD, options.build) if options.build else (EXPORT, options.graphs)
    result = measure(child, options.checkpoint, option, options.scratch)
    weights = sum(file.stat().st_size for file in options.checkpoint.rglob("*.safetensors")) / 1e9
    writing = sum(seconds for name, seconds in result["phases"].items() if name not in BEFORE)
    result["rate"] = writing / weights
    result |= {"load_before": load, "cores": os.cpu_count() or 0}
    if options.json:
        print(json.dumps({**result, "python": platform.python_version(), "machine": platform.machine()}, indent=2))
    else:
        print(
            f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU; load before {load:.1f} on "
            f"{result['cores']} cores), {result['peak_memory'] / 1e9:.2f} GB peak, {result['size'] / 1e9:.2f} GB "
            "written"
        )
        if phases := result["phases"]:
            shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05)
            print(f"seconds by phase: {shown}; {result['rate']:.1f} for each GB of weights after tracing")
        told = subprocess.run(
            [sys.executable, "-c", NEEDS, str(options.checkpoint.resolve())], cwd=ROOT, check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        needs = json.loads(told.stdout)["build" if options.build else "export"]
        print(f"as inspect estimates it: {needs['time']} s, {needs['memory'] / 1e9:.2f} GB")
    slow = options.max_seconds is not None and result["seconds"] > options.max_seconds
    large = options.max_memory is not None and result["peak_memory"] > options.max_memory * 1e9
    slow |= options.max_rate is not None and result["rate"] > options.max_rate
    sys.exit(1 if slow or large else 0)


if __name__ == "__main__":
    main()
