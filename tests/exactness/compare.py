"""A changed checkpoint as diffusers' own pipeline reads it, and as we do: the first image of both."""

from __future__ import annotations

import inspect
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers import pipelines
from numpy.typing import NDArray

from exporter import ensemble, oracle_run, record
from exporter.checkpoint import Checkpoint
from exporter.families import Shape
from exporter.trace import quiet
from runtimes import cascade, example
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.hints import Hint
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import Session
from tests.exactness.mutations import Mutation, mutations
from tests.exactness.subjects import INPAINTING, Subject
from tests.families.harness import described

Array = NDArray[Any]
STEPS, STRENGTH = 4, 0.6  # the fewest that PNDM takes; a start from an image whose steps are no whole number
SAME_DB = 50.0  # PSNR of two images that are the same: diffusers' own rounding in fp32 costs no more
# Of an image that rounding alone makes another one: how near it must be to itself, and how much farther diffusers' is.
ROUNDING, LEAST_DB, MARGIN_DB = 2.0**-23, 25.0, 6.0
WEIGHTS = ".safetensors"
MEMORY = 8 << 30  # bytes that a process may have while diffusers loads and runs
LONGEST = 300  # characters of what is said of a crash
SCALES = ("controlnet_conditioning_scale", "adapter_conditioning_scale")


@dataclass(frozen=True)
class Outcome:
    """What became of a change, one of ``KINDS``, and how, in a line.

    altered: whether the image is another one than that without the change.
    """

    SAME: ClassVar[str] = "same image"
    REFUSED: ClassVar[str] = "refused by dexport"
    BOTH: ClassVar[str] = "refused by both"
    THEIRS: ClassVar[str] = "diffusers fails"
    BUILT: ClassVar[str] = "built all the same"
    FOUND: ClassVar[str] = "found by a build"
    DIFFERENT: ClassVar[str] = "silently different"
    KINDS: ClassVar[tuple[str, ...]] = (SAME, REFUSED, BOTH, THEIRS, BUILT, FOUND, DIFFERENT)
    WRONG: ClassVar[tuple[str, ...]] = (FOUND, DIFFERENT)

    what: str
    how: str = ""
    altered: bool = False


@dataclass(frozen=True)
class Reading:
    """Our reading of a checkpoint: a pipeline of the torch functions of its graphs, and what is asked of it.

    files: the folder of its tokenizers' files. explicit: what diffusers is to be told, where its defaults need not be
    ours. opened: the torch functions by graph.
    """

    source: Checkpoint
    files: Path
    pipeline: Pipeline
    request: Request
    explicit: frozenset[str]
    opened: Callable[[str], Session]

    def image(self) -> Array:
        """The image, [B, 3, H, W], or the video that our pipeline makes."""
        return _drawn(self.pipeline, self.request)

    def rounded(self) -> Array:
        """The image where all that the torch functions give is rounded in another way."""
        return _drawn(Pipeline(self.pipeline.model, self.files, lambda name: _Rounded(self.opened(name))), self.request)


class _Rounded:
    """A session whose outputs are off by the rounding of float32."""

    def __init__(self, session: Session) -> None:
        self.max_batch, self._session, self._random = session.max_batch, session, np.random.default_rng(0)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = self._session.run(inputs)
        off = {name: 1 + ROUNDING * self._random.standard_normal(value.shape) for name, value in found.items()}
        return {name: (value * off[name]).astype(value.dtype) for name, value in found.items()}


def _drawn(pipeline: Pipeline, request: Request) -> Array:
    *_, last = pipeline.generate(request)
    return pipeline.decode(last.sample, request)


@dataclass(frozen=True)
class Comparison:
    """A subject's checkpoint, and our reading of it as it is."""

    subject: Subject
    checkpoint: Path
    unchanged: Reading
    mutations: tuple[Mutation, ...]

    @classmethod
    @contextmanager
    def of(cls, subject: Subject) -> Iterator[Comparison]:
        """Make a subject's checkpoint, which is there until the end."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            with quiet():
                subject.make(folder)
            yield cls(subject, folder, _ours(subject, folder, Path(scratch) / "tokens"), tuple(mutations(folder)))

    @cached_property
    def image(self) -> Array:
        """Our image of the checkpoint as it is."""
        return self.unchanged.image()

    def as_it_is(self) -> Outcome:
        """Compare what diffusers and we make of the checkpoint without a change."""
        try:
            theirs = _image(_theirs(self.checkpoint), self.unchanged)
        except Exception as error:  # each class fails in its own way
            return Outcome(Outcome.THEIRS, _line(error))
        return _compared(self.unchanged, self.image, theirs)

    def outcome(self, mutation: Mutation) -> Outcome:
        """Change a copy of the checkpoint, and compare what diffusers and we make of it."""
        with tempfile.TemporaryDirectory(dir=self.checkpoint.parent) as scratch:
            folder = Path(shutil.copytree(self.checkpoint, Path(scratch) / "checkpoint", copy_function=_copied))
            mutation.apply(folder)
            mine, crash = None, ""
            try:
                ours = _ours(self.subject, folder, Path(scratch) / "tokens")
                try:
                    mine = ours.image()
                except (TypeError, ValueError, RuntimeError) as error:  # as torch's modules fail; so may diffusers
                    crash = _line(error)
            except DexportError as error:
                return Outcome(self._refused(folder), str(error).replace(str(folder), "CHECKPOINT"))
            except Exception as error:  # a bug of ours, whatever diffusers makes of it
                return Outcome(Outcome.DIFFERENT, f"a crash: {_line(error)}"[:LONGEST])
            try:
                theirs = _image(_theirs(folder), ours)
            except Exception as error:  # each class fails in its own way
                return self._proven(ours, Outcome(Outcome.THEIRS, _line(error)))
            if mine is None:
                return Outcome(Outcome.DIFFERENT, f"a crash: {crash}"[:LONGEST])
            found = _compared(ours, mine, theirs)
            if found.what != Outcome.SAME:
                return self._proven(ours, replace(found, what=Outcome.FOUND))
            altered = mine.shape != self.image.shape or not psnr(self.image, mine) >= SAME_DB
            return replace(found, altered=altered)

    def _refused(self, folder: Path) -> str:
        """Whether diffusers' own pipeline makes no image of the checkpoint either, asked as it is unchanged."""
        try:
            image = _image(_theirs(folder), self.unchanged)
        except Exception:  # each class fails in its own way
            return Outcome.BOTH
        return Outcome.REFUSED if np.isfinite(image).all() else Outcome.BOTH

    def _proven(self, ours: Reading, found: Outcome) -> Outcome:
        """What is no image of both must end a build with an error too, or be said to be unproven: it is looked at."""
        try:
            built = record.record(ours.source, ours.pipeline.model, ours.files)
        except DexportError as error:
            return replace(found, how=f"{found.how}; a build: {error}"[:LONGEST])
        except Exception as error:  # a bug of ours
            return replace(found, what=Outcome.DIFFERENT, how=f"{found.how}; a build crashes: {_line(error)}"[:LONGEST])
        if built.left.keys() & {self.subject.task, "sampler"}:
            return found
        what = Outcome.BUILT if found.what == Outcome.THEIRS else Outcome.DIFFERENT
        return replace(found, what=what, how=f"{found.how}; a build goes through"[:LONGEST])


def _compared(ours: Reading, mine: Array, theirs: Array) -> Outcome:
    """Whether two images are the same; some samplers make an image another one by the rounding of float32 alone."""
    if theirs.shape[-2:] != mine.shape[-2:]:
        return Outcome(Outcome.DIFFERENT, f"sizes {theirs.shape[-2:]} and {mine.shape[-2:]}")
    found = psnr(np.broadcast_to(theirs, mine.shape), mine)  # grey images have one channel
    if found >= SAME_DB:
        return Outcome(Outcome.SAME, f"{found:.1f} dB")
    itself = psnr(ours.rounded(), mine)
    is_same = itself >= LEAST_DB and found >= itself - MARGIN_DB
    return Outcome(Outcome.SAME if is_same else Outcome.DIFFERENT, f"{found:.1f} dB, and {itself:.1f} dB by rounding")


def _copied(source: str, target: str) -> str:
    """A file for a copy that is changed: weights are not, and so need no copy."""
    if source.endswith(WEIGHTS):
        os.link(source, target)
        return target
    return str(shutil.copyfile(source, target))


def _ours(subject: Subject, folder: Path, tokenizers: Path) -> Reading:
    source = ensemble.read(folder)
    shape = subject.shape or source.family.default_shape(source)
    model = described(source, tokenizers, Shape(*shape, free=False))
    opened = cache(lambda name: record.TorchSession(source, name, model.graphs[name], [], shape))
    asked: dict[str, Any] = {"steps": cascade.few(model.stages, STEPS)}
    said = {"size"} if subject.shape else set()
    if subject.task:
        masked = subject.task == INPAINTING
        request = example.from_image(model, example.one(model), masked=masked, strength=STRENGTH, **asked)
        said |= {"guidance"} if subject.pipeline != source.pipeline else set()
    else:
        request = example.request(model, example.one(model), **asked)
    request = replace(request, hints=_weighed(subject.pipeline, request.hints))
    return Reading(source, tokenizers, Pipeline(model, tokenizers, opened), request, frozenset(said), opened)


def _weighed(pipeline: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Hints with the scale that a class of diffusers has by default; of bundles it is 1, whatever they are asked."""
    known = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    scale = next((known[name].default for name in SCALES if name in known), None)
    return {name: Hint(image, scale) for name, image in hints.items()}


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let what takes much more memory than any subject fail, and not the machine.

    A config that leaves out a language model's sizes is one of billions of weights to transformers, which makes up all
    of those that the file does not have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@_little_memory()
def _theirs(folder: Path) -> Any:
    """diffusers' own pipeline, weights and all, as its users load it."""
    index = diffusers.DiffusionPipeline.load_config(folder)
    kind = getattr(diffusers, index["_class_name"])
    expected, optional = kind._get_signature_keys(kind)
    absent = {name: None for name in expected if index.get(name) in (None, [None, None])}
    with quiet():
        if all(_is_known(index[name][0]) for name in expected if name not in absent):
            pipe = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **absent)
        else:
            options = {name: index[name] for name in optional if name in index}
            parts = {name: _part(folder / name, *index[name]) for name in expected if name not in absent}
            pipe = kind(**options, **absent, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_known(library: str) -> bool:
    """Whether ``from_pretrained`` of a pipeline still finds a library: of those for one pipeline some are gone."""
    return library in ("diffusers", "transformers") or hasattr(pipelines, library)


def _part(folder: Path, library: str, name: str) -> Any:
    """A component as its own class loads it, from the place where diffusers has it now."""
    packages = {"diffusers": diffusers, "transformers": transformers}
    package = packages.get(library) or getattr(pipelines, library, None) or getattr(pipelines.deprecated, library)
    made = getattr(package, name).from_pretrained(folder, local_files_only=True)
    return made.to(torch.float32).eval() if isinstance(made, torch.nn.Module) else made


@_little_memory()
def _image(pipe: Any, ours: Reading) -> Array:
    """What diffusers' pipeline draws when it is asked what ours is, with the noise of ours."""
    image = oracle_run.run([pipe], ours.pipeline, ours.request, explicit=ours.explicit).image
    assert image is not None
    return image


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
