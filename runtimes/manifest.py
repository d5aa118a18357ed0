"""What a hub and a bundle say of themselves: frozen values, and their JSON.

Both hold a ``Model`` (graphs, tokenizers, stages, source); a bundle's ``Manifest`` adds target, precision, files and
the proof. Everything a device does for a model follows from these values: there is no family in the device code.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from runtimes import strict_json
from runtimes.errors import DexportError

Kind = Literal["text", "denoiser", "decoder", "encoder", "hint"]
T = TypeVar("T")
PRECISIONS = ("fp32", "fp16", "bf16", "w8", "w4", "int8", "fp8")
PROMPT = "{}"  # stands for the prompt in a template
SEQUENCE = "sequence"  # the free dimension of a denoiser that takes the states of long prompts


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output. A dimension that is a name ("batch", "height", "width") is free."""

    name: str
    dtype: str  # numpy's name: "float32", "int64"
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph, IR or engine; ``file`` is relative to the folder of the manifest.

    sizes: the smallest and the largest size of a free dimension that has such.
    """

    kind: Kind
    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    properties: Mapping[str, str] = field(default_factory=dict)  # for the runtime, e.g. INFERENCE_PRECISION_HINT
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer file, the number of tokens that the text graph takes, and the id that fills the rest.

    A prompt is put where ``template`` holds PROMPT; a negative prompt likewise in ``negative``, None for the same one.
    lower: before that, it is stripped and made lower case. side: where the ids that fill up stand.
    """

    file: str
    input: str  # the text graph's input that these tokens go to
    length: int
    pad: int
    template: str = PROMPT
    negative: str | None = None
    lower: bool = False
    side: Literal["right", "left"] = "right"


@dataclass(frozen=True)
class Guidance:
    """How a prompt or a class steers: "cfg" runs the denoiser with and without it, "none" only with it.

    "embedded" runs it only with the prompt, and tells it the scale as its input ``guidance`` [batch].
    empty: what stands for an empty negative prompt, the text graph's output for it or zeros. normalize: what of
    the guided output keeps the length that it has with the prompt, each of "tokens", ``Stage.patch`` elements a side,
    or of "rows", the elements along the width.
    """

    kind: Literal["cfg", "none", "embedded"]
    scale: float
    empty: Literal["text", "zeros"] = "text"
    normalize: Literal["none", "tokens", "rows"] = "none"


@dataclass(frozen=True)
class Labels:
    """The classes that a denoiser's input ``labels`` takes: the numbers from 0 to ``count`` - 1.

    null: the number beyond them that stands for no class, which guidance steers away from; None where there is none.
    names: the names of a number, with commas between, where it has some.
    """

    count: int
    null: int | None
    names: Mapping[str, str]


@dataclass(frozen=True)
class HintInput:
    """A picture by name that steers a denoiser: where it goes, and how strongly if nothing is asked for.

    graph: a graph of the kind "hint" that makes further inputs of the denoiser of it, once; None: the denoiser takes it
    as it is. input: that graph's input, or the denoiser's, of the picture. scale: the denoiser's input of the strength.
    resample: how a picture of another size is fitted, as in ``runtimes.image.to_array``.
    """

    name: str
    graph: str | None
    input: str
    scale: str
    default: float
    resample: Literal["lanczos", "bicubic"]


@dataclass(frozen=True)
class Start:
    """Which of n steps a stage makes of an image with the strength s, as the pipeline class of its family does.

    steps: "floor", the last int(n s); "ceil", all but the first int(n - n s); "spread", n steps within the part s of
    the noise, of a scheduler that takes a strength, and as "floor" of another. strength: the default.
    """

    steps: Literal["floor", "ceil", "spread"] = "floor"
    strength: float = 0.8


@dataclass(frozen=True)
class Stage:
    """One denoising loop with what comes before and after it; graphs are named by their key in ``Model.graphs``."""

    name: str
    denoiser: str
    text: str | None
    decoder: str | None
    encoder: str | None
    sample: tuple[int, ...]  # default shape of the loop's sample, without batch: [C, h, w]; [D] of an embedding
    factor: int  # pixels of the image for each element of the sample, along height and width
    scheduler: Mapping[str, Any]  # the checkpoint's scheduler_config.json, "_class_name" included
    guidance: Guidance
    steps: int
    # Values of further denoiser inputs, e.g. time_ids; "image_height" and "image_width" in them are the picture's size.
    inputs: Mapping[str, Any] = field(default_factory=dict)
    negative: Mapping[str, Any] = field(default_factory=dict)  # those that differ in the call with the negative prompt
    span: tuple[float, ...] = (0.0, 1.0)  # the part of the way from noise to picture that the stage makes
    strength: float | None = None  # of a model that only reworks images: how much, if nothing is asked for
    labels: Labels | None = None  # of a denoiser with classes
    multiple: int = 1  # what height and width of a sample of another size must be multiples of
    patch: int | None = None  # elements of the sample along each side of a token, of a model that counts in tokens
    # "even": from 1 to 1 / steps, in place of the scheduler's own, where it takes sigmas
    sigmas: Literal["scheduler", "even"] = "scheduler"
    hints: tuple[HintInput, ...] = field(default_factory=tuple)  # pictures that steer the denoiser
    # The text graph's outputs [B, S, D] with a state for each token, which words may weigh and long prompts are joined.
    states: tuple[str, ...] = ()
    # The input of later denoisers that its result is: its last sample, or what its decoder makes of it. The stages
    # after it start from noise of their own, with samples of another shape.
    gives: str | None = None
    # With a negative prompt it draws what that gives too, for the calls with it.
    gives_negative: bool = False
    # Of a video, whose samples are [C, F, h, w]: how many frames are shown in a second, if nothing is asked for. Its
    # decoder takes one frame, [C, h, w].
    fps: float | None = None
    image_to_image: Start = Start()  # how it starts from an image, and from one with a mask
    inpaint: Start = Start(strength=1.0)


@dataclass(frozen=True)
class File:
    """A file's path relative to its folder (with "/"), its size in bytes and its sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SourceFile(File):
    """A file of the checkpoint, and where it was published, "org/name@commit", where that is known."""

    repository: str | None = None


@dataclass(frozen=True)
class Adapter:
    """What was merged into the checkpoint's weights: a file of the source, and how strongly; or for which new word."""

    path: str
    scale: float
    word: str | None = None


@dataclass(frozen=True)
class Model:
    """All that a pipeline needs to know of a model."""

    family: str
    pipeline: str  # diffusers' class, e.g. "StableDiffusionPipeline"
    graphs: Mapping[str, Graph]
    tokenizers: tuple[Tokenizer, ...]
    stages: tuple[Stage, ...]
    source: tuple[SourceFile, ...]
    adapters: tuple[Adapter, ...] = field(default_factory=tuple)
    notes: tuple[str, ...] = field(default_factory=tuple)  # on what was left out of the checkpoint, a line each


@dataclass(frozen=True)
class Bands:
    """The least that a bundle must reach against the original model: of its own noise, measured when it was built.

    graphs: SQNR in dB of each graph alone; latents: SQNR after each step of a free run.
    """

    graphs: Mapping[str, float]
    latents: float


@dataclass(frozen=True)
class SelfTest:
    """The run whose golden values a bundle holds, and its bands.

    subject: the prompt or class, or the number of an image that is of neither. steps: by the name of each chain of
    stages. strength: of a model that only reworks images, else None.
    """

    subject: str
    steps: Mapping[str, int]
    bands: Bands
    strength: float | None = None


@dataclass(frozen=True)
class Manifest:
    """``dexport.json`` of a bundle; docs/bundle-format.md is its specification."""

    format: Literal["dexport-bundle"]
    version: int
    target: str
    precision: str
    model: Model
    recipe: Mapping[str, Any]
    tools: Mapping[str, str]
    files: tuple[File, ...]
    accuracy: Mapping[str, Any]
    self_test: SelfTest | None = None  # None: there are no golden values


def to_json(value: Any) -> str:
    """Write a manifest or model as strict JSON; equal values give equal bytes. ValueError for NaN and infinity."""
    return strict_json.dumps(dataclasses.asdict(value))


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read a ``kind`` from JSON and check every key and type; ``where`` names the file in errors."""
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise DexportError(f"{where}: not valid JSON ({error}); build the bundle anew") from error
    result: T = _decode(kind, value, where)
    return result


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(needed - set(value)):
            raise DexportError(f"{where}: {missing[0]!r} is missing")
        if unknown := sorted(set(value) - set(hints)):
            raise DexportError(f"{where}: {unknown[0]!r} is unknown; a newer dexport may read it")
        make: Any = kind  # a class; is_dataclass is true of instances too, which checkers must mind
        return make(**{key: _decode(hints[key], item, f"{where}: {key}") for key, item in value.items()})
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}: {_shown(key)}") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if option is type(None) and value is None:
                return None
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return _decode(option, value, where)
            if isinstance(option, type) and isinstance(value, option) and not isinstance(value, bool):
                return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise DexportError(f"{where}: a whole number of this length does not fit") from error
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise DexportError(f"{where}: {value!r:.60} is not what the format asks for")


def _shown(key: str) -> str:
    """A key that a file chose, so that an error stays one line."""
    return key if key.isidentifier() and len(key) < 60 else f"{key!r:.60}"
