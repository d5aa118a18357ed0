"""One test for every family: a checkpoint is built, and its bundles draw what diffusers' own pipeline draws.

A family is a row of ``tests/families/test_families.py``: how to make a small checkpoint, and what to ask of it.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from PIL import Image

from calibration import islands
from exporter import compile as compilers
from exporter import ensemble, hub, record
from exporter.build import build
from exporter.checkpoint import Checkpoint
from exporter.ensemble import HANDOVER, Origin
from exporter.families import Shape
from exporter.inspect import inspect as describe
from runtimes import cascade, subject
from runtimes.bench import bench
from runtimes.bundle import load_manifest
from runtimes.manifest import Graph, Model
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import backend
from runtimes.target import Target
from runtimes.verify import RUN, verify

Array = NDArray[Any]
SEED = 11


@dataclass(frozen=True)
class Built:
    """Where a checkpoint, its hub and its bundles are."""

    checkpoint: Path
    hub: Path
    bundles: Mapping[str, Path]  # by backend, in fp32

    def pipeline(self, backend: str) -> Pipeline:
        """The bundle of a backend, its files checked."""
        return Pipeline.load(self.bundles[backend])


def build_all(checkpoint: Path, folder: Path, shape: tuple[int, int] | None = None, **said: Any) -> Built:
    """Build a checkpoint for the backends that run on a CPU, gate included; ``said``: more fields of ``Origin``."""
    made = build(
        Origin(checkpoint, **said), folder / "bundles", targets=("onnxruntime", "openvino"), keep_hub=folder / "hub",
        shape=shape,
    )  # fmt: skip
    return Built(checkpoint, folder / "hub", {item.target: item.folder for item in made})


def described(source: Checkpoint, tokenizers: Path, shape: Shape) -> Model:
    """A checkpoint's model as an export would write it; its tokenizers are written, and its graphs are not."""
    graphs = {
        name: Graph(spec.kind, f"{name}/model.onnx", spec.inputs, spec.outputs, sizes=spec.sizes)
        for name, spec in ensemble.specs(source, shape).items()
    }
    words = hub._write_tokenizers(source, tokenizers) if any(one.kind == "text" for one in graphs.values()) else ()
    return Model(source.family.NAME, source.pipeline, graphs, words, ensemble.stages(source, shape), ())


def untraced(folder: Path, tokenizers: Path, shape: Shape) -> Pipeline:
    """The torch functions of a checkpoint behind our pipeline, without the time that it takes to export them."""
    source = ensemble.read(folder)
    model = described(source, tokenizers, shape)
    opened = cache(lambda name: record.TorchSession(source, name, model.graphs[name], []))
    return Pipeline(model, tokenizers, opened)


NOT_COMPARED = {
    "StableDiffusion3Pipeline": {"inpainting"},  # diffusers' class takes latents of 16 channels alone
    "StableDiffusionXLPipeline": {"inpainting"},  # and that leaves out the mean of latents
}


def prove(made: Built) -> dict[str, Any]:
    """A bundle's golden outputs are right for every graph, and it is timed and described: what is said of it."""
    folder = made.bundles["onnxruntime"]
    checks, found = verify(folder), describe(folder)
    assert all(check.passed for check in checks)
    assert {check.graph for check in checks} - {RUN} == set(found["graphs"]) == set(bench(folder, repeats=1)["graphs"])
    assert set(found.get("stages", ["base"])) == {stage.name for stage in hub.load(made.hub).stages}
    accuracy = load_manifest(folder).accuracy
    assert accuracy["reference"].startswith("diffusers ")
    assert set(accuracy.get("not compared", ())) <= NOT_COMPARED.get(hub.load(made.hub).pipeline, set())
    assert accuracy["latents_sqnr_db"].keys() >= {"default settings"}
    return found


def build_engines(made: Built, folder: Path) -> None:
    """TensorRT compiles every graph of a hub in fp16 for a generation of GPUs, with its islands."""
    if backend("tensorrt").version() is None:
        pytest.skip("TensorRT is not installed")
    model = hub.load(made.hub)
    found = islands.find(model, made.hub)
    json.dumps(found.report(), allow_nan=False)  # as a manifest holds it
    for name, graph in model.graphs.items():
        (folder / name).mkdir()
        source, target = made.hub / graph.file, Target.parse("tensorrt:sm89")
        built = compilers.compile_graph(source, graph, folder / name, target, "fp16", islands=found.nodes(name))
        assert (folder / built.file).stat().st_size > 10_000


@dataclass(frozen=True)
class Family:
    """A row: ``make`` writes the checkpoint into a folder; ``asked``: for ``Request``, ``said``: for ``Origin``."""

    name: str
    make: Callable[[Path], Any]
    asked: Mapping[str, Any]
    said: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] | None = None  # height and width in pixels, where the checkpoint's own are too many
    told: Mapping[str, Any] = field(default_factory=dict)  # what only diffusers' pipeline is to be told
    refiner: Callable[[Path], Any] | None = None  # makes a second checkpoint, which goes on with what the first draws


@dataclass(frozen=True)
class Made:
    """A family's bundles, and what diffusers draws: last latents and pictures."""

    family: Family
    built: Built
    latents: Array
    pictures: Array


def make(family: Family, folder: Path) -> Made:
    """Build the family's bundles, and draw with diffusers."""
    family.make(folder / "checkpoint")
    refiner = None
    if family.refiner is not None:
        refiner = folder / "refiner"
        family.refiner(refiner)
    built = build_all(folder / "checkpoint", folder, family.shape, refiner=refiner, **family.said)
    return Made(family, built, *draw_theirs(family, folder / "checkpoint", refiner))


def draw(pipeline: Pipeline, request: Request) -> tuple[Array, Array]:
    """The last latents and the pictures of a bundle."""
    source: dict[tuple[int, ...], Callable[[], Array]] = {}  # as in ``same_noise``
    ways = cascade.ways(pipeline.model.stages)
    shapes = [(subject.count(request), *pipeline.sample_shape(request, way[0])) for way in ways]
    *_, last = pipeline.generate(request, [source.setdefault(shape, draws(shape)) for shape in shapes])
    return last.sample, pipeline.decode(last.sample)


def ours(pipeline: Pipeline, request: Request) -> Array:
    """The pictures [B, 3, H, W] of a bundle."""
    return draw(pipeline, request)[1]


def theirs(folder: Any, **settings: Any) -> Array:
    """The pictures [B, 3, H, W] of diffusers' own pipeline, or of that of a folder, in fp32, with the same noise."""
    pipe = _open(folder) if isinstance(folder, Path) else folder
    with same_noise():
        pictures = pipe(output_type="np", **settings).images
    return np.asarray(pictures).transpose(0, 3, 1, 2)


def draw_theirs(family: Family, folder: Path, refiner: Path | None = None) -> tuple[Array, Array]:
    """The last latents and the pictures of diffusers' own pipelines, in fp32, with the same noise as ``draw``."""
    pipe = _open(folder)
    asked, kept = dict(family.asked), []
    words = {
        "prompt": list(asked["prompts"]), "num_inference_steps": asked["steps"], "output_type": "np",
        "guidance_scale": asked.get("guidance", 0.0),
    }  # fmt: skip
    if family.shape is not None:
        words |= dict(zip(("height", "width"), family.shape, strict=True))
    words |= family.told
    if "mask" in asked:
        width, height = asked["image"].size
        words |= {"image": asked["image"], "mask_image": asked["mask"], "height": height, "width": width}
        words |= {"strength": asked["strength"]} if "strength" in asked else {}  # else each has its own
    elif "image" in asked:
        words |= {"image": encode(pipe.vae, asked["image"]), "strength": asked["strength"]}

    def keep(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(values["latents"])
        return values

    with same_noise():
        if refiner is not None:
            words["image"] = pipe(**words | {"output_type": "latent", "denoising_end": HANDOVER}).images
            pipe, words["denoising_start"] = _open(refiner), HANDOVER
        pictures = pipe(**words, **_watched(pipe, keep)).images
    latents = kept[-1]
    if latents.ndim == 3:  # tokens of packed latents
        latents = pipe._unpack_latents(latents, *pictures.shape[1:3], pipe.vae_scale_factor)
    if latents.ndim == 5:  # a video of one frame
        latents = latents[:, :, 0]
    return latents.numpy(), pictures.transpose(0, 3, 1, 2)


def _watched(pipe: Any, keep: Callable[..., Any]) -> dict[str, Any]:
    """The argument by which a pipeline calls ``keep`` after each step."""
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": keep}
    return {"callback": lambda index, t, latents: keep(pipe, index, t, {"latents": latents})}


def _open(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    needed = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters.values()
    # Parts that a checkpoint leaves out diffusers must be told of.
    absent = {p.name: None for p in needed if p.name != "self" and index.get(p.name, [None]) in ([None], [None, None])}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode(vae: Any, image: Image.Image) -> torch.Tensor:
    """The mode of a picture's latents, which pipelines take for a picture; they would draw from the distribution."""
    pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name] or fill).reshape(-1, 1, 1) for name, fill in NORMAL.items())
    return (latents - mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor / std


NORMAL = {"latents_mean": [0.0], "latents_std": [1.0]}


def draws(shape: tuple[int, ...]) -> Callable[[], Array]:
    """A source of standard normal noise that gives the same draws each time it is made."""
    stream = np.random.default_rng(SEED)
    return lambda: stream.standard_normal(shape)


@contextmanager
def same_noise() -> Any:
    """Let diffusers draw its noise from ``draws``: every module that took ``randn_tensor`` by name.

    An autoencoder gives the mode of its latents, as ours does, where it would draw from their distribution.
    """
    source: dict[tuple[int, ...], Callable[[], Array]] = {}

    def randn(shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        shape = tuple(shape)
        return torch.from_numpy(source.setdefault(shape, draws(shape))()).float()

    users = [m for n, m in list(sys.modules.items()) if n.startswith("diffusers.") and "randn_tensor" in vars(m)]
    kept = [module.randn_tensor for module in users]
    sample = DiagonalGaussianDistribution.sample
    try:
        for module in users:
            module.randn_tensor = randn
        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
        yield
    finally:
        DiagonalGaussianDistribution.sample = sample
        for module, function in zip(users, kept, strict=True):
            module.randn_tensor = function


def hole(side: int = 32) -> Image.Image:
    """A mask of a part of a picture, whose edges are no multiples of the pixels of a latent."""
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 3, side // 5, side - 3, side - 7))
    return mask


def picture(side: int = 32) -> Image.Image:
    """A picture of smooth random colours."""
    small = np.random.default_rng(SEED).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
