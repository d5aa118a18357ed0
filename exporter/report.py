"""report.html: what was built and how exact it is, with pictures, in one file that needs nothing else.

It holds no time and no speed, so that the same input gives the same bundle; ``dexport bench`` measures speed. Only
where seconds decided what is quantized, as they differ anyway, are they shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.gate import Proof
from exporter.record import Reference
from runtimes import cascade, subject, video
from runtimes.image import to_images
from runtimes.manifest import Model

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 1rem 1rem 0 } img { width: 16rem; image-rendering: pixelated }
figure.frames img { width: 100% }
"""
COLOURS = ("#36c", "#c33")  # of a chart's lines


def render(
    model: Model, target: str, precision: str, recipe: Mapping[str, Any], proof: Proof, reference: Reference
) -> str:
    """Return the page, with what the bundle drew beside what torch drew, where it was run."""
    accuracy = proof.accuracy
    title = escape(f"{model.pipeline} for {target}, {precision}")
    parts = [f"<h1>{title}</h1>", _facts(model, recipe), f"<h2>The gate: {escape(accuracy['gate'])}</h2>"]
    if "why" in accuracy:
        parts.append(f"<p>{escape(accuracy['why'])}. {escape(accuracy.get('next', ''))}</p>")
    parts += [f"<p>{escape(note)}.</p>" for note in model.notes]
    parts.append(_pictures(model, reference, proof.image))
    if "graphs" in accuracy:
        parts.append(_agreement(accuracy))
    if "decoder" in accuracy:
        parts.append(_decoder(accuracy["decoder"]))
    if "fp16" in accuracy:
        parts.append(_fp16(accuracy["fp16"]))
    if "quantization" in accuracy:
        parts.append(quantization(accuracy["quantization"]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _facts(model: Model, recipe: Mapping[str, Any]) -> str:
    stage, every = cascade.main(model.stages)[0], cascade.ways(model.stages)
    rows = [
        ("family", model.family),
        ("image", f"{recipe['shape'][0]}x{recipe['shape'][1]} pixels" + (", any size" * recipe["dynamic_shape"])),
        *([("frames", f"{stage.sample[1]}, {stage.fps:g} a second")] if stage.fps else []),
        ("sampler", f"{stage.scheduler['_class_name']}, {stage.steps} steps"),
        ("guidance", f"{stage.guidance.kind}, {stage.guidance.scale:g}"),
        *([("classes", str(stage.labels.count))] if stage.labels else []),
        *((one.name, f"from {one.span[0]:g} to {one.span[1]:g} of the way") for way in every for one in way[1:]),
        *((way[0].name, _way(way)) for way in every if len(every) > 1),
        ("weights", f"{sum(file.size for file in model.source) / 1e6:.1f} MB in {len(model.source)} files"),
    ]
    return _table((), rows)


def _way(way: cascade.Way) -> str:
    """What a stage that starts from noise of its own does, where there are several."""
    first, gives = way[0], way[-1].gives
    told = f"{first.scheduler['_class_name']}, {first.steps} steps, guidance {first.guidance.scale:g}"
    return f"{told}; draws {'the picture' if gives is None else f'{gives} for those after it'}"


def _pictures(model: Model, reference: Reference, image: NDArray[Any] | None) -> str:
    shown = [(f"{reference.oracle}, fp32", reference.image)]
    if image is not None:
        difference = np.abs(reference.image - image)
        most = float(difference.max())
        gain = 1 / most if most else 1.0
        shown += [("this bundle", image), (f"difference, times {gain:.3g}", difference * gain)]
    figures = [
        f'<figure{" class=frames" * (model.stages[-1].fps is not None)}><img alt="{escape(what)}" '
        f'src="data:image/png;base64,{_png(_picture(array))}">'
        f"<figcaption>{escape(what)}</figcaption></figure>"
        for what, array in shown
    ]
    request = reference.request
    of = subject.settings(model, request, 0)
    if "class_name" in of:
        of = {f"class {of['class']}": of["class_name"]}
    said = " ".join(f"{name} “{value}”," for name, value in of.items())
    return f"<p>{escape(said)} {cascade.described(request.steps)} steps, seed {request.seed}</p>\n" + "\n".join(figures)


def _picture(array: NDArray[Any]) -> Image.Image:
    """The first picture of [B, 3, H, W], or all frames of the first video of [B, F, 3, H, W]."""
    return to_images(array)[0] if array.ndim == 4 else video.sheet(to_images(array[0]))


def _agreement(accuracy: Mapping[str, Any]) -> str:
    band, image = accuracy["band"], accuracy["image"]
    rows = [
        (
            name, call["output"], f"{call['timestep']:g}" if "timestep" in call else "",
            f"{call['sqnr_db']:.1f}", f"{call['least_db']:.1f}",
            f"{call['relative']:.2e}", f"{call['max_abs']:.2e}",
        )
        for name, calls in accuracy["graphs"].items()
        for call in calls
    ]  # fmt: skip
    latents = [
        (case, str(step), f"{value:.1f}")
        for case, values in accuracy["latents_sqnr_db"].items()
        for step, value in enumerate(values, 1)
    ]
    return (
        f"<p>The reference: {escape(accuracy['reference'])}, in fp32.</p>"
        f"<p>Image: PSNR {image['psnr_db']:.1f} dB (at least {band['image']:g}), SSIM {image['ssim']:.4f}.</p>"
        "<h2>Each graph alone, on the reference's inputs</h2>"
        + _table(("graph", "output", "timestep", "SQNR, dB", "at least", "relative L2", "max abs"), rows)
        + f"<h2>Latents of free runs (at least {band['latents']:g} dB)</h2>"
        + _table(("run", "step", "SQNR, dB"), latents)
    )


def _decoder(found: Mapping[str, Any]) -> str:
    """How near a decoder that was given is to the full one."""
    return (
        f"<h2>Decoded by {escape(found['class'])}</h2><p>Against the full decoder ({escape(found['against'])}) on the "
        f"same latents, both in torch: PSNR {found['psnr_db']:.1f} dB, SSIM {found['ssim']:.4f}.</p>"
    )


def _fp16(found: Mapping[str, Any]) -> str:
    """How near each graph comes to the end of fp16, and what was kept in float32 for it."""
    peaks = [(name, f"{graph['peak']:.3g}", str(len(graph["islands"]))) for name, graph in found["graphs"].items()]
    rows = [
        (name, one["first"], one["last"], str(one["nodes"]), f"{one['peak']:.3g}")
        for name, graph in found["graphs"].items()
        for one in graph["islands"]
    ]
    return (
        f"<h2>fp16: {len(rows)} islands in float32</h2>"
        f"<p>fp16 ends at {found['limit']:g}. Nodes stay float32 whose values come within a factor of "
        f"{found['margin']:g} of it, in {len(found['prompts'])} pictures of "
        f"{cascade.described(found['steps'])} steps in fp32.</p>"
        + _table(("graph", "greatest value", "islands"), peaks)
        + (_table(("graph", "from", "to", "nodes", "greatest value"), rows) if rows else "")
    )


def quantization(found: Mapping[str, Any]) -> str:
    """What is in 8 bits and what is not, why, and what it cost: the manifest's ``quantization`` as HTML."""
    parts = [f"<h2>Quantization: {found['quantized']} layers in 8 bits</h2>"]
    if found["dynamic"]:
        parts.append(f"<p>In {found['dynamic']} of them the runtime rounds activations itself, token by token.</p>")
    if found["scores"]:
        parts.append(f"<p>So are the queries and keys of {found['scores']} long attentions.</p>")
    run = found["calibration"]
    parts += [
        f"<p>Pictures of {found['steps']} steps against fp32's, at the same seeds; the median must be at least "
        f"{found['budget_psnr_db']:g} dB{', ' + found['simulated'] if 'simulated' in found else ''}.</p>",
        _table(
            ("prompt, not calibrated with", "PSNR, dB"),
            [(prompt, f"{value:.1f}") for prompt, value in zip(found["prompts"], found["psnr_db"], strict=True)],
        ),
        _steps(found), _plan(found),
        f"<h3>Calibration: {run['calls']} calls</h3>",
        _table(("timestep", "ranges reached here"), [(t, str(n)) for t, n in run["by_timestep"].items()]),
        _table(("prompt", "ranges reached here"), [(name, str(n)) for name, n in run["by_prompt"].items()]),
    ]  # fmt: skip
    parts.append("<h3>Layers left in floating point</h3>" + _table(("layer", "why"), list(found["left"].items())))
    return "\n".join(parts)


def _steps(found: Mapping[str, Any]) -> str:
    """The first picture's SQNR, call by call and step by step."""
    calls, latents = found["sqnr_db"], found["latents_sqnr_db"]
    rows = [
        (str(at + 1), f"{t:g}", f"{db:.1f}") for at, (t, db) in enumerate(zip(found["timesteps"], calls, strict=True))
    ]
    twice = len(calls) == 2 * len(latents)
    return (
        "<h3>The first picture, step by step</h3>"
        + ("<p>Each step has two calls: without the prompt, then with it.</p>" if twice else "")
        + _chart({"the output of each call, on fp32's inputs": calls, "latents after each step of a free run": latents})
        + _table(("call", "timestep", "SQNR of its output, dB"), rows)
        + _table(("step", "SQNR of the latents, dB"), [(str(at + 1), f"{db:.1f}") for at, db in enumerate(latents)])
    )


def _plan(found: Mapping[str, Any]) -> str:
    """The tries, and every block with its precision, its figures and the reason why."""
    tries = [
        (
            str(one["kept"]),
            str(one["not_faster"]),
            f"{one['psnr_median_db']:.1f}",
            _milliseconds(one.get("saved_seconds")),
            _milliseconds(one.get("doubt_seconds")),
        )
        for one in found["attempts"]
    ]
    tried = (
        "blocks kept in floating point", "layers kept that are no faster", "median PSNR, dB",
        "saves beside the good try that keeps the fewest, ms a call", "give or take",
    )  # fmt: skip
    blocks = [
        (
            one["name"], one["precision"], f"{one['noise']:.2e}" if "noise" in one else "",
            ", ".join(f"{db:.1f} at {t}" for t, db in one.get("sqnr_db", {}).items()),
            _milliseconds(one.get("saved_seconds")), one.get("why", ""),
        )
        for one in found["blocks"]
    ]  # fmt: skip
    heads = (
        "block or layer", "precision", "noise in the output, were it alone in 8 bits", "as SQNR, dB at timestep",
        "8 bits save, ms a call", "why it is kept",
    )  # fmt: skip
    shown = len(heads) if any("noise" in one for one in found["blocks"]) else 2
    return (
        "<h3>Tries</h3>"
        + _table(tried, tries)
        + "<h3>Blocks</h3>" + _table(heads[:shown], [row[:shown] for row in blocks])
    )  # fmt: skip


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"


def _chart(lines: Mapping[str, Sequence[float]], width: int = 640, height: int = 200) -> str:
    """Lines over the run, from its first call to its last, as an SVG with the least and the greatest value marked."""
    values = [value for line in lines.values() for value in line]
    low, high = min(values), max(values)
    space, parts = 24, []  # around the lines, for the numbers
    for index, (name, line) in enumerate(lines.items()):
        points = [
            (
                space * 2 + (width - 3 * space) * (at / max(1, len(line) - 1)),
                space + (height - 2 * space) * (high - value) / ((high - low) or 1.0),
            )
            for at, value in enumerate(line)
        ]
        path, colour = " ".join(f"{x:.1f},{y:.1f}" for x, y in points), COLOURS[index]
        legend = f'x="{width - space}" y="{height - 4 - 14 * index}" fill="{colour}" text-anchor="end"'
        parts += [
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>',
            f"<text {legend}>{escape(name)}</text>",
        ]
    marks = [(space, high), (height - space, low)]
    parts += [f'<text x="0" y="{y + 4}">{value:.1f} dB</text>' for y, value in marks]
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" font-size="12">{"".join(parts)}</svg>'


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join(
        "<tr>" + "".join(f"<td{_number(text)}>{escape(text)}</td>" for text in row) + "</tr>\n" for row in rows
    )
    return f"<table>{head}{body}</table>"


def _number(text: str) -> str:
    return ' class="number"' if text.replace(".", "").replace("e", "").replace("-", "").isdigit() else ""


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
