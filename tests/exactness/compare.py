"""A changed checkpoint as diffusers' own pipeline reads it, and as we do: the first image of both."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
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

STEPS = 4  # the fewest that PNDM takes
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
    """What became of a change, one of ``KINDS``, and how, in a line."""

    SAME: ClassVar[str] = "same image"
    REFUSED: ClassVar[str] = "refused by dexport"
    BOTH: ClassVar[str] = "refused by both"
    THEIRS: ClassVar[str] = "diffusers fails"  # and so does a build, which has nothing to be compared with
    DIFFERENT: ClassVar[str] = "silently different"
    KINDS: ClassVar[tuple[str, ...]] = (SAME, REFUSED, BOTH, THEIRS, DIFFERENT)

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
            return Outcome(_refused(folder, subject), str(error).replace(str(folder), "CHECKPOINT"))
        except Exception as error:  # a bug of ours, whatever diffusers makes of it
            return Outcome(Outcome.DIFFERENT, f"a crash: {type(error).__name__}: {error}"[:200])
        try:
            theirs = oracle_run.run([_theirs(folder)], pipeline, request, explicit=explicit).image
        except Exception as error:
            return Outcome(Outcome.THEIRS, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        if theirs.shape[-2:] != mine.shape[-2:]:
            return Outcome(Outcome.DIFFERENT, f"sizes {theirs.shape[-2:]} and {mine.shape[-2:]}")
        found = psnr(np.broadcast_to(theirs, mine.shape), mine)  # grey images have one channel
        return Outcome(Outcome.SAME if found >= SAME_DB else Outcome.DIFFERENT, f"{found:.1f} dB")


def _refused(folder: Path, subject: Subject) -> str:
    """Whether diffusers' own pipeline cannot be made of the checkpoint either, or runs into an error."""
    try:
        pipe = _theirs(folder)
        known = inspect.signature(pipe.__call__).parameters
        words = {"prompt": "a", "num_inference_steps": 1, "output_type": "np", "class_labels": [1]}
        if subject.shape:
            words |= dict(zip(("height", "width"), subject.shape, strict=True))
        with quiet(), torch.inference_mode():
            pipe(**{name: value for name, value in words.items() if name in known})
    except Exception:  # each class fails in its own way
        return Outcome.BOTH
    return Outcome.REFUSED


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


HEAD = """# Exactness

How small checkpoints of diffusers {version}'s own classes are read when a file of theirs is not what it was: an
option left out, added or of another value, a checkpoint that was saved long ago, two files that name different
schedulers. Each is one change to one JSON file; diffusers' own pipeline and ours make the first image of it from the
same noise, and the images are compared (same: {same:g} dB PSNR at least). This page is written by `make oracle`
(`python -m tests.exactness`); {how}.

"Refused by dexport" is a line that says why, before anything is written; it counts what diffusers makes an image of
all the same. Where diffusers itself fails, so does a build. A build compares every checkpoint with diffusers' own
pipeline anyway ([architecture](architecture.md#exactness-is-a-gate)): what is counted here is that the reading itself
is right.

"""
MORE = """
By the kind of change:

"""
APART = """
## Where we differ on purpose

- A caption is not cleaned (`clean_caption`), and a size is not rounded to a trained one (`use_resolution_binning`),
  as PixArt's and Sana's pipelines do by default.
- The default number of steps is smaller for Stable Diffusion and SDXL (20, where diffusers' 50 were for PNDM).
- Flux.1 schnell takes 256 tokens of T5, as its model card says; diffusers' default is 512.
- Kandinsky, Stable Cascade and Würstchen generate the size of their checkpoint by default, diffusers always 512
  pixels.
- An autoencoder gives the mode of its latents, not a draw of them; an image of another size is cropped
  ([images](images.md)).
- `StableDiffusionXLInpaintPipeline` and `AnimateDiffSDXLPipeline` leave out the mean of an autoencoder's latents on
  one side or both; we do not, and compare such a checkpoint without them.
"""


def page(found: Mapping[str, Sequence[tuple[str, str, Outcome]]], every: int, version: str) -> str:
    """The page's text: for each class and for each kind of change, how many came out how."""
    total = sum(len(run) - 1 for run in found.values())
    how = (
        f"all {total} changes were compared"
        if every == 1
        else f"here every {every}th change was compared, {total} in all"
    )
    rows = {f"`{name}`": [outcome for kind, _, outcome in run if kind] for name, run in found.items()}
    kinds: dict[str, list[Outcome]] = {}
    for run in found.values():
        for kind, _, outcome in run[1:]:
            kinds.setdefault(kind, []).append(outcome)
    head = HEAD.format(version=version, same=SAME_DB, how=how)
    return head + _table("pipeline class", rows) + MORE + _table("change", dict(sorted(kinds.items()))) + APART


def _table(first: str, rows: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [f"| {first} | changes | " + " | ".join(Outcome.KINDS) + " |", "|---" * (len(Outcome.KINDS) + 2) + "|"]
    for name, outcomes in rows.items():
        counts = [sum(outcome.what == what for outcome in outcomes) for what in Outcome.KINDS]
        lines.append(f"| {name} | {len(outcomes)} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"
