"""How each command's result looks to a person. The same results as JSON are ``console.print_json``'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from dexport.console import duration, print_table, seconds, shape, size

if TYPE_CHECKING:
    from calibration.coverage import Coverage
    from calibration.observe import Statistics
    from exporter.build import Built
    from runtimes.manifest import Graph
    from runtimes.verify import Check


def bundles(built: Sequence[Built]) -> None:
    """What ``build`` made, and how near it is to the torch model."""
    heads = ("bundle", "target", "precision", "size", "graphs, dB", "image, dB", "a model call")
    rows = []
    for item in built:
        graphs, image = agreement(item.accuracy)
        speed = seconds(item.seconds) if item.seconds is not None else ""
        rows.append((str(item.folder), item.target, item.precision, size(item.size), graphs, image, speed))
    print_table(heads, rows)
    for item in built:
        if "why" in item.accuracy:
            click.echo(f"{item.folder}: gate not run: {item.accuracy['why']}; {item.accuracy['next']}")
        for name, graph in item.accuracy.get("fp16", {"graphs": {}})["graphs"].items():
            for one in graph["islands"]:
                click.echo(
                    f"{item.folder}: {name}: float32 from {one['first']} to {one['last']}: values up to "
                    f"{one['peak']:.3g} are beyond fp16"
                )
        if "decoder" in item.accuracy:
            found = item.accuracy["decoder"]
            click.echo(f"{item.folder}: decoded by {found['class']}, {found['psnr_db']:.1f} dB from the full decoder")
        if "quantization" in item.accuracy:
            click.echo(f"{item.folder}: {quantization(item.accuracy['quantization'])}")


def quantization(found: Mapping[str, Any]) -> str:
    """What was quantized, what was kept and why, in a line."""
    layers = f"{found['quantized']} layers in 8 bits"
    where = f", {found['simulated']}" if "simulated" in found else ""
    kept = f"{len(found['kept'])} blocks kept in floating point" if found["kept"] else "no block kept in floating point"
    if found["not_faster"]:
        kept += f", {len(found['not_faster'])} layers left that 8 bits make no faster"
    return (
        f"{layers}, {kept}; pictures {median(found['psnr_db']):.1f} dB from fp32 "
        f"(median of {len(found['psnr_db'])}, at least {found['budget_psnr_db']:g} asked for{where})"
    )


def agreement(accuracy: Mapping[str, Any]) -> tuple[str, str]:
    """A gate's two figures: the lowest SQNR of any graph, and the PSNR of the image; "not run" where there are none."""
    if "graphs" not in accuracy:
        return "not run", "not run"
    worst = min(found["sqnr_db"] for graph in accuracy["graphs"].values() for found in graph)
    return f"{worst:.1f}", f"{accuracy['image']['psnr_db']:.1f}"


def notes(lines: Sequence[str]) -> None:
    """What a user should know of a checkpoint, on stderr."""
    for line in lines:
        click.echo(f"note: {line}", err=True)


def graphs(title: str, found: Mapping[str, Graph]) -> None:
    """The graphs of a hub or bundle with their tensors."""
    rows = []
    for name, graph in found.items():
        tensors = (("in", graph.inputs), ("out", graph.outputs))
        lines = [f"{side}  {t.name} {shape(t.shape)} {t.dtype}" for side, group in tensors for t in group]
        rows.append((name, graph.file, "\n".join(lines)))
    print_table(("graph", "file", "tensors"), rows, title)


def checks(found: Sequence[Check]) -> None:
    """What ``verify`` measured, against the bands; nothing where there was nothing to measure."""
    rows = [
        (c.graph, c.output, f"{c.agreement.sqnr_db:.1f}", f"≥ {c.least_db:g}", "ok" if c.passed else "MISSED")
        for c in found
    ]
    if rows:
        print_table(("graph", "output", "SQNR, dB", "band, dB", ""), rows)


def times(found: Mapping[str, Any]) -> None:
    """What ``bench`` measured."""
    rows = [
        (name, str(graph["batch"]), seconds(graph["load_seconds"]), seconds(graph["seconds"]))
        for name, graph in found["graphs"].items()
    ]
    images = str(found["images"])
    rows.append(("step", images, "", seconds(found["step_seconds"])))
    what = f"video of {found['frames']} frames" if "frames" in found else "image"
    rows.append((f"{what}, {found['steps']} steps", images, "", seconds(found["image_seconds"])))
    print_table(("part", "batch", "load", "median"), rows, f"{found['target']} {found['precision']}")


def rows(found: Mapping[str, Any]) -> None:
    """A sampler's table: a line for each row, columns that never change left out."""
    from runtimes.samplers.describe import formula, spread

    title = f"{found['sampler']}, {found['steps']} steps, X starts as {found['init_scale']:.6g} x noise"
    if found["calls"] < len(found["rows"]):
        title += f", {found['calls']} calls of the model"
    lines = []
    for row in found["rows"]:
        h0 = formula(row["H0"]) if row["H0"] else ""
        if row["threshold"]:
            h0 += f", scaled to 1 from its quantile {row['threshold']:g} (at most {row['clip']:g})"
        elif row["clip"] is not None:
            h0 += f", within {row['clip']:g}"
        saved = formula(row["S"]) if row["S"] != {"S": 1.0} else ""
        sigma = f"{row['sigma']:.4g}" if row["sigma"] is not None else ""
        scale = f"{row['scale']:.4g}" if row["calls"] else "no call"
        learned = spread(row["deviation"]) if row["deviation"] else ""
        lines.append((f"{row['t']:g}", sigma, scale, h0, formula(row["X"]), learned, saved, "yes" * row["shift"]))
    heads = (
        "t", "sigma", "model gets X times", "H0 becomes", "X becomes", "Z's deviation", "S becomes", "history shifts",
    )  # fmt: skip
    used = [index for index in range(len(heads)) if any(line[index] for line in lines)]
    print_table([heads[index] for index in used], [[line[index] for index in used] for line in lines], title)


def machine(found: Mapping[str, Any]) -> None:
    """What ``doctor`` found: a paragraph for each backend and each further extra."""
    click.echo(f"Python {found['python']}, {found['system']}, {found['cores']} cores")
    for name, backend in found["backends"].items():
        click.echo(f"\n{name}: {backend['version'] or 'not installed'}")
        for device, facts in backend["devices"].items():
            click.echo(f"  {device}: {', '.join(facts['precisions'])} ({facts['description']})")
        if backend["advice"]:
            click.echo(f"  {backend['advice']}")
        if backend["version"] and not backend["devices"]:
            others = ", ".join(f"{name}:{device}" for device in backend["targets"] if device != "local")
            click.echo(f"  bundles for other machines can be built here: {others}")
    for name, extra in found["extras"].items():
        packages = [f"{package} {version or 'not installed'}" for package, version in extra["packages"].items()]
        click.echo(f"\n{name}: {', '.join(packages)}")
        if extra["advice"]:
            click.echo(f"  {extra['advice']}")


def outline(found: Mapping[str, Any], indent: str = "") -> None:
    """What ``inspect`` found: one line a value, nested values indented; sizes and counts made readable."""
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            click.echo(f"{indent}{key}:")
            outline(value, indent + "  ")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            click.echo(f"{indent}{key}:")
            for item in value:
                click.echo(f"{indent}  " + ", ".join(f"{name} {part}" for name, part in item.items()))
        else:
            click.echo(f"{indent}{key}: {_plain(key, value)}")


def _plain(key: str, value: Any) -> str:
    if key in ("size", "source_size") and isinstance(value, int):
        return size(value)
    if key in ("memory", "disk"):
        return f"about {size(value)}"
    if key == "time":
        return f"about {duration(value)}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None or value == {} else str(value)


def covered(statistics: Statistics) -> Coverage:
    """Where the ranges were reached."""
    from calibration.coverage import coverage

    return coverage(statistics)


def coverage(title: str, statistics: Statistics) -> None:
    """How many of the observed values have their greatest magnitude at each timestep, and with each prompt."""
    found = covered(statistics)
    print_table(
        ("timestep", "ranges reached here"),
        [(f"{t:g}", str(count)) for t, count in found.by_timestep.items()],
        f"{title}: {found.values} values observed in {found.calls} calls",
    )
    print_table(("prompt", "ranges reached here"), [(name, str(count)) for name, count in found.by_prompt.items()])
    click.echo(f"The last quarter of the prompts made {found.late:.0%} of the ranges wider by a tenth or more.")
