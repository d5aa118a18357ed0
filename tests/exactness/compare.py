"""A changed checkpoint as diffusers' own pipeline reads it, and as we do: the first image of both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from exporter import ensemble, hub, oracle_run, record
from exporter.families import SAME, Shape
from exporter.trace import quiet
from runtimes import cascade, example
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Model
from runtimes.pipeline import Pipeline
from tests.exactness.mutations import Mutation
from tests.families import small, small_cascades, small_flow, small_ldm, small_transformers, small_video

STEPS = 3
SAME_DB = 50.0  # PSNR of two images that are the same: diffusers' own rounding in fp32 costs no more


@dataclass(frozen=True)
class Subject:
    """A small checkpoint: its pipeline class, how to make it, the size of its images where its own is too large."""

    pipeline: str
    make: Callable[[Path], Any]
    shape: tuple[int, int] | None = None


SUBJECTS: tuple[Subject, ...] = (
    Subject("DDPMPipeline", small.write_ddpm),
    Subject("PNDMPipeline", small.write_pndm),
    Subject("DDIMPipeline", small.write_grey),
    Subject("ConsistencyModelPipeline", small.write_consistency),
    Subject("LDMPipeline", small.write_ldm),
    Subject("LDMSuperResolutionPipeline", small.write_superresolution),
    Subject("LDMTextToImagePipeline", small_ldm.ldm_text),
    Subject("DiTPipeline", small.write_dit),
    Subject("StableDiffusionPipeline", small_cascades.stable_diffusion),
    Subject("StableDiffusionInpaintPipeline", small.inpainting),
    Subject("LatentConsistencyModelPipeline", small.latent_consistency),
    Subject("StableDiffusionXLPipeline", small.sdxl),
    Subject("StableDiffusionXLImg2ImgPipeline", small.refiner),
    Subject("StableDiffusionXLInpaintPipeline", small.sdxl_inpainting),
    Subject("StableDiffusion3Pipeline", small_flow.sd_3),
    Subject("FluxPipeline", small_flow.flux, (32, 48)),
    Subject("QwenImagePipeline", small_flow.qwen_image, (32, 48)),
    Subject("ZImagePipeline", small_flow.z_image, (32, 48)),
    Subject("PixArtAlphaPipeline", small_transformers.pixart_alpha, (16, 24)),
    Subject("PixArtSigmaPipeline", small_transformers.pixart_sigma),
    Subject("SanaPipeline", small_transformers.sana, (32, 64)),
    Subject("SanaSprintPipeline", small_transformers.sana_sprint, (32, 32)),
    Subject("AuraFlowPipeline", small_transformers.aura_flow, (16, 24)),
    Subject("Lumina2Pipeline", small_transformers.lumina2, (32, 48)),
    Subject("KandinskyV22CombinedPipeline", small_cascades.kandinsky),
    Subject("UnCLIPPipeline", small_cascades.unclip),
    Subject("StableCascadeCombinedPipeline", small_cascades.stable_cascade),
    Subject("WuerstchenCombinedPipeline", small_cascades.wuerstchen),
    Subject("AnimateDiffPipeline", small_video.saved),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a change: "same", "refused", "both refuse", or "DIFFERENT"; and how, in a line."""

    what: str
    how: str = ""


def compare(subject: Subject, checkpoint: Path, mutation: Mutation | None) -> Outcome:
    """Change a copy of a checkpoint, and compare what diffusers and we make of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(checkpoint, Path(scratch) / "checkpoint"))
        if mutation is not None:
            mutation.apply(folder)
        try:
            pipeline, request, explicit = _ours(subject, folder, Path(scratch) / "tokenizers")
            steps = [step.sample for step in pipeline.generate(request)]
            mine = pipeline.decode(steps[-1], request)
        except DexportError as error:
            return Outcome("refused", str(error).replace(str(folder), "CHECKPOINT"))
        try:
            theirs = oracle_run.run([_theirs(folder)], pipeline, request, explicit=explicit).image
        except Exception as error:
            return Outcome(
                "diffusers fails", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if theirs.shape[-2:] != mine.shape[-2:]:
            return Outcome("DIFFERENT", f"sizes {theirs.shape[-2:]} and {mine.shape[-2:]}")
        found = psnr(theirs * (mine * 0 + 1), mine)  # grey images have one channel
        return Outcome("same" if found >= SAME_DB else "DIFFERENT", f"{found:.1f} dB")


def _ours(subject: Subject, folder: Path, tokenizers: Path) -> tuple[Pipeline, Any, frozenset[str]]:
    """Our reading, with the torch functions of its graphs: what an export would be made of."""
    source = ensemble.read(folder)
    shape = subject.shape or source.family.default_shape(source)
    size = Shape(*shape, free=False)
    graphs = {
        name: Graph(spec.kind, f"{name}/model.onnx", spec.inputs, spec.outputs, sizes=spec.sizes)
        for name, spec in ensemble.specs(source, size).items()
    }
    stages = ensemble.stages(source, size)
    words = hub._write_tokenizers(source, tokenizers) if any(graph.kind == "text" for graph in graphs.values()) else ()
    model = Model(source.family.NAME, source.pipeline, graphs, words, stages, ())
    opened = cache(lambda name: record.TorchSession(source, name, graphs[name], [], shape))
    pipeline, asked = Pipeline(model, tokenizers, opened), {"steps": cascade.few(stages, STEPS)}
    if cascade.main(stages)[0].strength is not None:
        request = example.from_image(model, example.one(model), strength=0.6, **asked)
    else:
        request = example.request(model, example.one(model), **asked)
    return pipeline, request, frozenset({"size"} if subject.shape else ())


def _theirs(folder: Path) -> Any:
    """diffusers' own pipeline, weights and all, as its users load it."""
    index = diffusers.DiffusionPipeline.load_config(folder)
    named = str(index["_class_name"])
    kind = getattr(diffusers, SAME.get(named, named))
    expected, _ = kind._get_signature_keys(kind)
    absent = {name: None for name in expected if index.get(name) in (None, [None, None])}
    with quiet():
        pipe = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(found: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> str:
    """Rows of Markdown: for each class and kind of change, how many came out how."""
    columns = ("same", "refused", "diffusers fails", "DIFFERENT")
    lines = ["| pipeline class | changes | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, kinds in found.items():
        every = [outcome.what for outcomes in kinds.values() for outcome in outcomes]
        lines.append(f"| `{name}` | {len(every)} | " + " | ".join(str(every.count(what)) for what in columns) + " |")
    return "\n".join(lines)
