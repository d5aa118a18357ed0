"""Your own model: torch modules and a small description of them, in place of a checkpoint that diffusers saved.

The modules speak the contract that every family is brought to (docs/own-model.md), so this family has no wrappers of
its own: it finds sizes by running each module once without weights, and hands out the weights as they lie in memory.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from exporter import trace
from exporter.checkpoint import Checkpoint, Component, TokenizerFiles
from exporter.families import Shape, Spec, Tokens, pixel
from exporter.stored import MEMORY, Held
from exporter.trace import BATCH
from runtimes import samplers
from runtimes.check import ASKED
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Kind, Labels, SourceFile, Stage, Tensor

PIPELINE = "OwnModel"
SAMPLER = "dpmpp_2m"  # for a schedule of betas, which names none
TOKENIZER = "PreTrainedTokenizerFast"  # transformers' class for any tokenizer.json
TIMESTEP = Tensor("timestep", "float32", ("batch",))
LABELS = Tensor("labels", "int64", ("batch",))
GUIDANCE = Tensor("guidance", "float32", ("batch",))


@dataclass(frozen=True, eq=False)
class OwnModel:
    """Torch modules that make up a diffusion model, and what a pipeline must know of them.

    denoiser: called as ``denoiser(sample, timestep, **conditioning)`` with ``sample`` [B, C, h, w] and ``timestep``
    [B], both float32; gives what ``prediction`` says, shaped like ``sample``. sample: (C, h, w).
    The noise schedule is one of three: ``betas``, one for each step of the training; ``alphas_cumprod``, likewise,
    falling from almost 1; or ``scheduler``, a config in diffusers' words, for all other kinds of models, like
    ``{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}``. prediction: "epsilon", "v_prediction" or
    "sample", unless ``scheduler`` says it. sampler: a name of those that ``dexport sampler`` knows.
    guidance: the scale of classifier-free guidance, up to 1 for none; ``Guidance("embedded", 3.5)`` for a denoiser that
    takes the scale as ``guidance`` [B].
    labels: how many classes there are, or their names; the denoiser then takes ``labels`` [B] int64. null_label: the
    number that stands for no class, which guidance steers away from. inputs: further inputs of the denoiser with the
    values that they always have, numbers or lists of them, without batch.
    text: called with ``tokens`` [B, length] int64; gives the tensors that the denoiser takes by the names in
    ``conditioning``, one or a tuple of them. tokenizer: a folder with a tokenizer.json that transformers saved;
    length: how many tokens the text module takes.
    decoder: a sample to a picture [B, 3, H, W] in [0, 1]; without one the sample is the picture, in [-1, 1]. encoder:
    the way back, for image to image. multiple: of what height and width of other samples must be multiples.
    """

    denoiser: torch.nn.Module
    sample: tuple[int, int, int]
    betas: Sequence[float] | None = None
    alphas_cumprod: Sequence[float] | None = None
    scheduler: Mapping[str, Any] | None = None
    prediction: str | None = None
    sampler: str | None = None
    steps: int = 20
    guidance: float | Guidance = 1.0
    labels: int | Sequence[str] = 0
    null_label: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    text: torch.nn.Module | None = None
    conditioning: Sequence[str] = ("encoder_hidden_states",)
    tokenizer: Path | str | None = None
    length: int = 77
    decoder: torch.nn.Module | None = None
    encoder: torch.nn.Module | None = None
    multiple: int = 1


@dataclass(frozen=True)
class OwnCheckpoint(Checkpoint):
    """An ``OwnModel`` where a checkpoint is asked for."""

    own: Own | None = None

    @property
    def family(self) -> Any:
        """A family of one."""
        return self.own

    @property
    def in_memory(self) -> bool:
        """They lie in the modules."""
        return True

    def source(self) -> tuple[SourceFile, ...]:
        """The size and the sha256 of each module's weights and buffers, in the order of their names."""
        assert self.own is not None
        return tuple(_file(name, module) for name, module in self.own.modules.items())


def read(model: OwnModel) -> OwnCheckpoint:
    """Check a model, and return it as a checkpoint.

    Raises DexportError for a description that does not fit its modules, and for weights that are not finite.
    """
    own = Own(model)
    components = {name: _component(name, module) for name, module in own.modules.items()}
    for name, module in own.modules.items():
        for entry in _held(module).values():
            if not entry.finite():
                raise DexportError(f"{MEMORY}: {name}: {entry.name!r} holds NaN or infinity")
    words = {} if model.tokenizer is None else {"tokenizer": TokenizerFiles(TOKENIZER, Path(model.tokenizer))}
    return OwnCheckpoint(MEMORY, PIPELINE, components, _scheduler(model), words, {}, own=own)


class Own:
    """The family of one model, as ``exporter.families.Family`` has it."""

    NAME = "own"
    COMPONENTS: Mapping[str, tuple[str | None, ...]] = {}

    def __init__(self, model: OwnModel) -> None:
        """Check the description by itself; the modules are looked at when sizes are asked for."""
        sample: Any = model.sample
        if not (isinstance(sample, Sequence) and len(sample) == 3 and all(type(n) is int and n > 0 for n in sample)):
            raise DexportError(f"sample must be (channels, height, width), not {sample!r:.60}")
        for name, value in (("steps", model.steps), ("length", model.length), ("multiple", model.multiple)):
            if type(value) is not int or value < 1:
                raise DexportError(f"{name} must be a whole number from 1, not {value!r:.60}")
        self.model = model
        self.sample: tuple[int, int, int] = (sample[0], sample[1], sample[2])
        self.modules = _modules(model)
        self.labels = _labels(model)
        self.guidance = _guidance(model, self.labels)
        self.further = _constants(model.inputs)

    @cached_property
    def factor(self) -> int:
        """Pixels of the picture for each element of the sample, along height and width."""
        channels, *sides = self.sample
        if "decoder" not in self.modules:
            if channels not in (1, 3):
                raise DexportError(f"a picture has 3 channels, or 1 where it is grey; give a decoder for {channels}")
            return 1
        (image,) = _shapes_of("decoder", self._spec("decoder", sides, sides))
        factor = image[2] // sides[0] if len(image) == 4 else 0
        if not factor or image != [BATCH, 3, sides[0] * factor, sides[1] * factor]:
            raise DexportError(
                f"decoder: a sample of {[BATCH, *self.sample]} gave a picture of {image}; it must be "
                f"[{BATCH}, 3, H, W], with H and W the same whole multiple of {sides[0]} and {sides[1]}"
            )
        return factor

    @cached_property
    def states(self) -> tuple[Tensor, ...]:
        """What the text module gives, none where there is none."""
        if "text" not in self.modules:
            return ()
        names, tokens = list(self.model.conditioning), Tensor("tokens", "int64", ("batch", self.model.length))
        if isinstance(self.model.conditioning, str) or not names:
            raise DexportError(f"conditioning must list the names of what text gives, not {self.model.conditioning!r}")
        shapes = _shapes_of("text", Spec("text", self._builder("text"), _encode, (tokens,), (), {}))
        if len(shapes) != len(names) or any(shape[:1] != [BATCH] for shape in shapes):
            raise DexportError(f"text: it gave {shapes} for a batch of {BATCH}; conditioning names {', '.join(names)}")
        return tuple(Tensor(name, "float32", ("batch", *shape[1:])) for name, shape in zip(names, shapes, strict=True))

    def default_shape(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Height and width of the picture in pixels."""
        return self.sample[1] * self.factor, self.sample[2] * self.factor

    def specs(self, checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
        """The graphs. Raises DexportError for a size that the model does not draw, and modules that give another."""
        step = self.factor * self.model.multiple
        if shape.height % step or shape.width % step:
            raise DexportError(f"{shape.height}x{shape.width} pixels: this model needs multiples of {step}")
        image = [shape.height, shape.width]
        sides = [side // self.factor for side in image]
        specs: dict[str, Spec] = {}
        for name in self._graphs():
            spec = self._spec(name, sides, image)
            if name == "text":
                specs[name] = spec
                continue
            (found,) = _shapes_of(name, spec)
            wanted: list[Any] = [BATCH, *spec.outputs[0].shape[1:]]
            if name == "denoiser" and found == [BATCH, 2 * self.sample[0], *sides]:  # with a learned variance
                wanted = found
                spec = replace(spec, outputs=(replace(spec.outputs[0], shape=("batch", *found[1:])),))
            if found != wanted:
                raise DexportError(f"{name}: it gave the shape {found}, and must give {wanted}")
            specs[name] = self._free(name, spec, sides, image) if shape.free else spec
        return specs

    def stages(self, checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
        """One loop."""
        sample = (self.sample[0], shape.height // self.factor, shape.width // self.factor)
        inputs = {name: value.tolist() for name, value in self.further.items()}
        return (
            Stage(
                "base", "denoiser", "text" if self.states else None, "decoder",
                "encoder" if "encoder" in self._graphs() else None, sample, self.factor, checkpoint.scheduler,
                self.guidance, self.model.steps, inputs, labels=self.labels, multiple=self.model.multiple,
            ),
        )  # fmt: skip

    def token_inputs(self, checkpoint: Checkpoint) -> Mapping[str, Tokens]:
        """The ids of the one tokenizer."""
        return {"tokenizer": Tokens("tokens", self.model.length, side="right")} if self.states else {}

    def rename(self, component: str, name: str) -> str | None:
        """Weights come by their modules' own names."""
        return name

    def _graphs(self) -> tuple[Kind, ...]:
        """All but an encoder where only a decoder was given, and but text where there is none."""
        text: tuple[Kind, ...] = ("text",) if self.states else ()
        both = "encoder" in self.modules or "decoder" not in self.modules
        return (*text, "denoiser", "decoder", "encoder") if both else (*text, "denoiser", "decoder")

    def _spec(self, name: Kind, sides: Sequence[int | str], image: Sequence[int | str]) -> Spec:
        """A graph for samples of these ``sides`` and pictures of the size ``image``."""
        if name == "text":
            tokens = Tensor("tokens", "int64", ("batch", self.model.length))
            return Spec(name, self._builder(name), _encode, (tokens,), self.states, {})
        sample = Tensor("sample", "float32", ("batch", self.sample[0], *sides))
        picture = Tensor("image", "float32", ("batch", 3, *image))
        if name == "denoiser":
            output = Tensor("output", "float32", sample.shape)
            return Spec(
                "denoiser", self._builder(name), self._denoise, (sample, TIMESTEP, *self._asked()), (output,), {}
            )
        takes, gives = (sample, picture) if name == "decoder" else (picture, sample)
        if name not in self.modules:  # the sample is a picture
            encoder = pixel.encoder if self.sample[0] == 3 else pixel.grey_encoder
            return Spec(name, {}, pixel.decoder if name == "decoder" else encoder, (takes,), (gives,), {})
        return Spec(
            name, self._builder(name), lambda modules, value: getattr(modules, name)(value), (takes,), (gives,), {}
        )

    def _free(self, name: Kind, fixed: Spec, sides: Sequence[int], image: Sequence[int]) -> Spec:
        """The graph with height and width free, traced at the sizes of the ``fixed`` one."""
        free = self._spec(name, ("height", "width"), ("image_height", "image_width"))
        sizes = dict(zip(("height", "width", "image_height", "image_width"), (*sides, *image), strict=True))
        channels = fixed.outputs[0].shape[1]
        output = replace(free.outputs[0], shape=("batch", channels, *free.outputs[0].shape[2:]))
        return replace(free, outputs=(output,), example=sizes)

    def _asked(self) -> tuple[Tensor, ...]:
        """The denoiser's inputs beside sample and timestep."""
        further = [
            Tensor(name, "int64" if value.dtype.kind in "iu" else "float32", ("batch", *value.shape))
            for name, value in self.further.items()
        ]
        labels = (LABELS,) if self.labels else ()
        guidance = (GUIDANCE,) if self.guidance.kind == "embedded" else ()
        return (*self.states, *labels, *guidance, *further)

    def _denoise(self, modules: Any, sample: Any, timestep: Any, *asked: Any) -> Any:
        names = [tensor.name for tensor in self._asked()]
        return modules.denoiser(sample, timestep, **dict(zip(names, asked, strict=True)))

    def _builder(self, name: str) -> Mapping[str, Any]:
        return {name: lambda: _without_weights(self.modules[name])}


def _constants(inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The values that further inputs always have."""
    found = {}
    for name, value in dict(inputs).items():
        if name in ASKED or name in ("sample", "timestep"):
            raise DexportError(f"inputs: {name!r} is filled by the request; leave it out")
        try:
            found[name] = np.asarray(value)
        except ValueError:  # lists of different lengths
            found[name] = np.zeros(0, object)
        if found[name].dtype.kind not in "biuf" or not np.isfinite(found[name]).all():
            raise DexportError(f"inputs: {name!r} must be numbers or lists of them, not {value!r:.60}")
    return found


def _modules(model: OwnModel) -> dict[str, torch.nn.Module]:
    """The modules that there are, by the graph that each becomes."""
    found = {name: getattr(model, name) for name in ("text", "denoiser", "decoder", "encoder")}
    for name, module in found.items():
        if not isinstance(module, torch.nn.Module) and not (module is None and name != "denoiser"):
            raise DexportError(f"{name} must be a torch.nn.Module, not {module!r:.60}")
    if (model.text is None) != (model.tokenizer is None):
        raise DexportError("text and tokenizer go together: give both, or neither")
    return {name: module for name, module in found.items() if module is not None}


def _encode(modules: Any, tokens: Any) -> Any:
    return modules.text(tokens)


def _labels(model: OwnModel) -> Labels | None:
    """The classes, with the names that they were given."""
    asked, null = model.labels, model.null_label
    names = list(asked) if isinstance(asked, list | tuple) else []
    count = len(names) or (asked if type(asked) is int else -1)
    if not count and null is None:
        return None
    if count < 1 or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise DexportError(f"labels must say how many classes there are, or list their names, not {asked!r:.60}")
    if len({name.strip().lower() for name in names}) < len(names):
        raise DexportError("labels: two classes have the same name; give each its own")
    if null is not None and (type(null) is not int or null < 0):
        raise DexportError(f"null_label must be the number that stands for no class, not {null!r:.60}")
    return Labels(count, null, {str(number): name for number, name in enumerate(names)})


def _guidance(model: OwnModel, labels: Labels | None) -> Guidance:
    """What the model says of guidance, with the number of a scale alone made whole."""
    if isinstance(model.guidance, Guidance):
        given = model.guidance
    else:
        scale: Any = model.guidance
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise DexportError(f"guidance must be a number, or a dexport.Guidance, not {scale!r:.60}")
        given = Guidance("cfg" if scale > 1 else "none", float(scale))
    if given.kind == "cfg" and model.text is None and (labels is None or labels.null is None):
        raise DexportError("guidance needs something to steer away from: give null_label, or leave guidance out")
    return given


def _scheduler(model: OwnModel) -> dict[str, Any]:
    """The noise schedule as diffusers' configs say it."""
    given = [value for value in (model.betas, model.alphas_cumprod, model.scheduler) if value is not None]
    if len(given) != 1:
        raise DexportError("give one of betas, alphas_cumprod and scheduler: the noise that the model was trained with")
    if model.scheduler is not None:
        if not isinstance(model.scheduler, Mapping):
            raise DexportError(
                f"scheduler must be a config, like a diffusers scheduler's .config, not {model.scheduler!r:.60}"
            )
        config = dict(model.scheduler)
        if model.prediction is not None:
            config["prediction_type"] = model.prediction
        return samplers.choose(config, model.sampler)
    try:
        values = np.asarray(given[0], np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 1 or not values.size:
        raise DexportError("betas and alphas_cumprod are lists of numbers, one for each step of the training")
    if not ((values > 0) & (values < 1)).all() or (model.betas is None and (np.diff(values) >= 0).any()):
        raise DexportError("betas must lie between 0 and 1, and alphas_cumprod fall from almost 1 to almost 0")
    betas = values if model.betas is not None else 1 - values / np.concatenate([[1.0], values[:-1]])
    name, options = samplers.find(SAMPLER)
    config = {
        "_class_name": name, **options, "num_train_timesteps": len(betas), "trained_betas": betas.tolist(),
        "prediction_type": model.prediction or "epsilon", "clip_sample": False,  # latents go beyond 1
    }  # fmt: skip
    return samplers.choose(config, model.sampler)


def _without_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares nothing with ``module``: its parameters on the meta device, its buffers real, on the CPU."""
    empty = {
        id(value): torch.nn.Parameter(torch.empty(value.shape, device="meta"), requires_grad=False)
        for value in module.parameters()
    }
    bare = copy.deepcopy(module, dict(empty))
    for part in bare.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.detach().cpu())
    return bare


def _shapes_of(name: str, spec: Spec) -> list[list[int]]:
    """The shapes of a graph's outputs for a batch of ``BATCH``; DexportError where its module does not run."""
    try:
        output = trace.outline(spec)
    except DexportError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise DexportError(
            f"{name}: it goes by the value of a tensor ({_first_line(error)}), and no graph can"
        ) from error
    except Exception as error:  # whatever the module raises
        shapes = ", ".join(f"{tensor.name} {[BATCH, *tensor.shape[1:]]}" for tensor in spec.inputs)
        raise DexportError(
            f"{name}: it does not run on {shapes}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    outputs = output if isinstance(output, tuple) and name == "text" else (output,)
    if not all(isinstance(one, torch.Tensor) for one in outputs):
        raise DexportError(f"{name}: it gave a {type(output).__name__}; it must give one tensor")
    return [[int(side) for side in one.shape] for one in outputs]


def _component(name: str, module: torch.nn.Module) -> Component:
    """A module's weights as they lie in memory."""
    entries = {key: Held(key, value) for key, value in module.named_parameters(remove_duplicate=False)}
    return Component(name, type(module).__name__, MEMORY, {}, entries)


def _held(module: torch.nn.Module) -> dict[str, Held]:
    """All that a module holds: its weights, and its buffers, such as the statistics of a norm."""
    return {name: Held(name, value) for name, value in (*module.named_parameters(), *module.named_buffers())}


def _file(name: str, module: torch.nn.Module) -> SourceFile:
    """What a module holds as one file of the source: there is none on a disk."""
    digest, size = hashlib.sha256(), 0
    for key, entry in sorted(_held(module).items()):
        digest.update(f"{key} {entry.dtype} {entry.shape}\n".encode())
        digest.update(np.ascontiguousarray(entry.load()).tobytes())
        size += entry.size
    return SourceFile(name, size, digest.hexdigest())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
