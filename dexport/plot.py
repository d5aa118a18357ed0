"""The picture of a sampler: how much noise is left, and which timestep the model is told, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import DexportError

FORMATS = (".png", ".svg", ".pdf")


def plot(found: Mapping[str, Any], file: Path | str) -> None:
    """Draw what ``dexport.sampler`` returned: sigma, on a logarithmic scale, and t against the calls of the model.

    file: a .png, .svg or .pdf, replaced if it exists. Raises DexportError for another ending or a place that cannot be
    written.
    """
    file = Path(file)
    if file.suffix.lower() not in FORMATS:
        raise DexportError(f"{file}: a plot is written as {', '.join(FORMATS)}; name such a file")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in found["rows"] if row["calls"]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    noise, times = figure.subplots(1, 2)
    steps = [(index, row["sigma"]) for index, row in enumerate(rows) if row["sigma"]]
    noise.plot([index for index, _ in steps], [sigma for _, sigma in steps], "o-", markersize=3)
    noise.set(yscale="log", xlabel="call of the model", ylabel="noise / signal", title="sigma")
    times.plot([row["t"] for row in rows], "o-", markersize=3, color="C1")
    times.set(xlabel="call of the model", ylabel="t", title="timestep")
    for axis in (noise, times):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{found['sampler']}, {found['steps']} steps")
    try:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise DexportError(f"{file}: cannot be written ({error.strerror or error})") from error
