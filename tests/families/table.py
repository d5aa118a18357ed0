"""Write docs/families.md: every pipeline class of the installed diffusers, what its bundles do, or why there are none.

    python -m tests.families.table

What a class's bundles do is read from the small checkpoints that the families' tests build and compare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from exporter import checkpoint, ensemble
from exporter.families import PIPELINES, SAME, Shape
from exporter.families.refused import REASONS, YET, reason
from runtimes import cascade
from tests.families import small, small_cascades, small_flow, small_ldm, small_transformers, small_video

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
Make = Callable[[Path], Any]
WRITERS: tuple[Make, ...] = (
    small.write_ddpm, small.write_pndm, small.write_grey, small.write_consistency,
    small.write_ldm, small.write_superresolution,
    small.write_dit, small.sd_2, small.inpainting, small.latent_consistency, small.sdxl, small.refiner,
    small.sdxl_inpainting, small_flow.sd_3, small_flow.flux, small_flow.qwen_image, small_flow.z_image,
    small_transformers.pixart_alpha, small_transformers.pixart_sigma, small_transformers.sana,
    small_transformers.sana_sprint, small_transformers.aura_flow, small_transformers.lumina2,
    small_cascades.kandinsky, small_cascades.unclip, small_cascades.stable_cascade, small_cascades.wuerstchen,
    small_ldm.ldm_text, small_video.saved, small_video.saved_xl,
)  # fmt: skip
# Checkpoints of these hold those of another and what steers it.
STEERED = {
    f"StableDiffusion{xl}{what}Pipeline": f"StableDiffusion{xl}Pipeline"
    for xl in ("", "XL")
    for what in ("Adapter", "ControlNet")
}
HEAD = """# Families

What the pipeline classes of diffusers {version} are to dexport. Of each that is exported a test builds a small
checkpoint, of diffusers' own classes with random weights, for ONNX Runtime and OpenVINO, compares what the bundles draw
with diffusers' own pipeline on the same noise, and compiles every graph for TensorRT in fp16. An engine has not been
run yet.

This page is written by `python -m tests.families.table`; a test holds it to the code and to the installed diffusers.

## Exported

"Image to image" is `--image`, "masks" is `--mask`, for models that never saw one; hints are pictures that steer
([more](checkpoints.md#pictures-that-steer)).

| pipeline class | tasks | family |
|---|---|---|
"""
WHY = """
## Not exported

A class that is not here is not of this version of diffusers.

| why | pipeline classes |
|---|---|
"""


def classes() -> list[str]:
    """The pipeline classes of the installed diffusers."""
    return sorted(name for name in dir(diffusers) if name.endswith("Pipeline"))


def tasks(make: Make, folder: Path) -> tuple[str, str]:
    """The pipeline class of a checkpoint, and what its bundles do."""
    make(folder / "checkpoint")
    read = checkpoint.read(folder / "checkpoint", check=False)
    shape = Shape(*read.family.default_shape(read), free=False)
    specs, stages = ensemble.specs(read, shape), ensemble.stages(read, shape)
    main = cascade.main(stages)[0]
    asked = {tensor.name for stage in stages for tensor in specs[stage.denoiser].inputs}
    source = "text" if stages[0].text else "class" if stages[0].labels else "noise"
    if stages[-1].fps is not None:
        return read.pipeline, f"{source} to video"
    if "image" in asked:
        return read.pipeline, "larger pictures of small ones"
    if "mask" in asked:
        return read.pipeline, f"{source} into a mask, by a model that was trained to"
    if main.strength is not None:
        return read.pipeline, "image to image by text, masks"
    return read.pipeline, f"{source} to image" + (", image to image, masks" if main.encoder else "")


def exported() -> dict[str, str]:
    """What the bundles of each exported class do."""
    found = {}
    for make in WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            name, does = tasks(make, Path(folder))
        found[name] = does
    return found | {name: f"{found[plain]}, steered by hints" for name, plain in STEERED.items()}


def page() -> str:
    """The page's text."""
    does, rows = exported(), []
    for name in classes():
        if name in PIPELINES:
            rows.append(f"| `{name}` | {does[name]} | `{PIPELINES[name]}` |")
        elif name in SAME:
            rows.append(f"| `{name}` | taken as `{SAME[name]}`, whose parts it has | `{PIPELINES[SAME[name]]}` |")
    left = [name for name in classes() if name not in PIPELINES and name not in SAME]
    every = (*(one.why for one in REASONS), YET.why)
    why = {which: [name for name in left if reason(name).why == which] for which in every}
    lines = [f"| {which} | {', '.join(f'`{name}`' for name in names)} |" for which, names in why.items() if names]
    return HEAD.format(version=diffusers.__version__) + "\n".join(rows) + "\n" + WHY + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
