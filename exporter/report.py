"""report.html: what was built and how exact it is, with pictures, in one file that needs nothing else.

It holds no time and no speed, so that the same input gives the same bundle; ``dexport bench`` measures speed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.gate import Proof, Reference
from runtimes import subject
from runtimes.image import to_images
from runtimes.manifest import Model

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 1rem 1rem 0 } img { width: 16rem; image-rendering: pixelated }
"""


def render(
    model: Model, target: str, precision: str, recipe: Mapping[str, Any], proof: Proof, reference: Reference
) -> str:
    """Return the page, with what the bundle drew beside what torch drew, where it was run."""
    accuracy = proof.accuracy
    title = escape(f"{model.pipeline} for {target}, {precision}")
    parts = [f"<h1>{title}</h1>", _facts(model, recipe), f"<h2>The gate: {escape(accuracy['gate'])}</h2>"]
    if "why" in accuracy:
        parts.append(f"<p>{escape(accuracy['why'])}. {escape(accuracy.get('next', ''))}</p>")
    parts.append(_pictures(model, reference, proof.image))
    if "graphs" in accuracy:
        parts.append(_agreement(accuracy))
    if "quantization" in accuracy:
        parts.append(_quantization(accuracy["quantization"]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _facts(model: Model, recipe: Mapping[str, Any]) -> str:
    stage = model.stages[0]
    rows = [
        ("family", model.family),
        ("image", f"{recipe['shape'][0]}x{recipe['shape'][1]} pixels" + (", any size" * recipe["dynamic_shape"])),
        ("sampler", f"{stage.scheduler['_class_name']}, {stage.steps} steps"),
        ("guidance", f"{stage.guidance.kind}, {stage.guidance.scale:g}"),
        *([("classes", str(stage.labels.count))] if stage.labels else []),
        ("weights", f"{sum(file.size for file in model.source) / 1e6:.1f} MB in {len(model.source)} files"),
    ]
    return _table((), rows)


def _pictures(model: Model, reference: Reference, image: NDArray[Any] | None) -> str:
    shown = [("torch, fp32", reference.image)]
    if image is not None:
        difference = np.abs(reference.image - image)
        most = float(difference.max())
        gain = 1 / most if most else 1.0
        shown += [("this bundle", image), (f"difference, times {gain:.3g}", difference * gain)]
    figures = [
        f'<figure><img alt="{escape(what)}" src="data:image/png;base64,{_png(to_images(array)[0])}">'
        f"<figcaption>{escape(what)}</figcaption></figure>"
        for what, array in shown
    ]
    request = reference.request
    of = " ".join(f"{name} “{value}”," for name, value in subject.settings(model, request, 0).items())
    return f"<p>{escape(of)} {request.steps} steps, seed {request.seed}</p>\n" + "\n".join(figures)


def _agreement(accuracy: Mapping[str, Any]) -> str:
    rows = [
        (
            name, call["output"], f"{call['timestep']:g}" if "timestep" in call else "",
            f"{call['sqnr_db']:.1f}", f"{call['relative']:.2e}", f"{call['max_abs']:.2e}",
        )
        for name, calls in accuracy["graphs"].items()
        for call in calls
    ]  # fmt: skip
    band, image = accuracy["band"], accuracy["image"]
    latents = [(str(step + 1), f"{value:.1f}") for step, value in enumerate(accuracy["latents_sqnr_db"])]
    return (
        f"<p>Image: PSNR {image['psnr_db']:.1f} dB (at least {band['image']:g}), SSIM {image['ssim']:.4f}.</p>"
        f"<h2>Each graph alone, on the reference's inputs (SQNR at least {band['graph']:g} dB)</h2>"
        + _table(("graph", "output", "timestep", "SQNR, dB", "relative L2", "max abs"), rows)
        + f"<h2>Latents of a free run (the last at least {band['latents']:g} dB)</h2>"
        + _table(("step", "SQNR, dB"), latents)
    )


def _quantization(found: Mapping[str, Any]) -> str:
    """What is in 8 bits and what is not, why, and what it cost."""
    parts = [f"<h2>Quantization: {found['quantized']} layers in 8 bits</h2>"]
    if "psnr_db" in found:
        rows = [(prompt, f"{value:.1f}") for prompt, value in zip(found["prompts"], found["psnr_db"], strict=True)]
        tries = [(str(one["kept"]), f"{one['psnr_median_db']:.1f}") for one in found["attempts"]]
        kept = [(name, f"{noise:.2e}") for name, noise in found["kept"].items()]
        run = found["calibration"]
        parts += [
            f"<p>Pictures of {found['steps']} steps against fp32's, at the same seeds; the median must be at least "
            f"{found['budget_psnr_db']:g} dB.</p>",
            _table(("prompt, not calibrated with", "PSNR, dB"), rows),
            "<h3>Tries</h3>" + _table(("blocks kept in floating point", "median PSNR, dB"), tries),
            "<h3>Kept in floating point, the noisiest for their work first</h3>"
            + _table(("block", "share of noise in the output, were it quantized"), kept),
            f"<h3>Calibration: {run['calls']} calls</h3>"
            + _table(("timestep", "ranges reached here"), [(t, str(n)) for t, n in run["by_timestep"].items()])
            + _table(("prompt", "ranges reached here"), [(name, str(n)) for name, n in run["by_prompt"].items()]),
        ]
    else:
        parts.append(f"<p>Budget {escape(found['budget'])}.</p>")
    parts.append("<h3>Layers left in floating point</h3>" + _table(("layer", "why"), list(found["left"].items())))
    return "\n".join(parts)


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
