"""What a hub or a bundle says must also make sense: its names, paths, sizes and numbers, before anything is done by it.

The types are checked by runtimes.manifest as it reads; docs/bundle-format.md has the rules. Whoever made the folder is
not trusted: a path or a name decides where files are written, a number how much memory is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from runtimes import cascade, conditioning, subject, timetable, video
from runtimes.errors import DexportError, IntegrityError
from runtimes.manifest import (
    PRECISIONS,
    PROMPT,
    SEQUENCE,
    Graph,
    Kind,
    Manifest,
    Model,
    SelfTest,
    Stage,
    Tensor,
    Tokenizer,
)
from runtimes.target import Target

GRAPH_NAME = re.compile(r"[a-z][a-z0-9_]*")
TOKENIZER_FILE = re.compile(r"tokenizer[a-z0-9_]*/[^/]+")
FREE = ("batch", "height", "width", "image_height", "image_width", SEQUENCE)  # the dimensions that may be free
DTYPES = ("float32", "int64")
NEGATIVE = "negative_"  # before the name of a hint graph's output: in its place in the call with the negative prompt
GATES = ("passed", "not run")
SIDE = 65536  # the largest side of a tensor or a picture, and the longest prompt
ELEMENTS = 2**28  # of a sample or a picture
RANK = 8
STEPS = 10_000
MOST_LABELS = 10**6
NUMBER = re.compile(r"0|[1-9][0-9]{0,6}", re.ASCII)
TENSORS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": ((), ()),
    "denoiser": (("sample", "timestep"), ("output",)),
    "decoder": (("sample",), ()),  # "image", or what its stage gives
    "encoder": (("image",), ("sample",)),
    "hint": (("image",), ()),
}
"""The inputs and outputs that a pipeline gives and takes by name."""
GUIDANCE = "guidance"  # the denoiser's further input where it is told the scale
PAINTING = ("mask", "masked_sample")  # of a denoiser that was trained to paint into a picture
ASKED = (GUIDANCE, "labels", "image", *PAINTING)  # further inputs that a request fills
LARGEST = 100.0  # scale of a hint


def check_paths(paths: Iterable[str], where: str) -> None:
    """Raise IntegrityError for a path that is not plain and relative, or that may lead out of its folder."""
    for path in paths:
        pure = PurePosixPath(path)
        plain = bool(pure.parts) and str(pure) == path and path.isprintable() and not pure.is_absolute()
        if not plain or ".." in pure.parts or "\\" in path or ":" in path:
            raise IntegrityError(f"{where}: {path!r:.60} is not a plain path inside its folder")


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise DexportError unless a bundle's manifest makes sense, its model included; ``where`` names the file."""
    try:
        Target.parse(manifest.target)
    except DexportError as error:
        raise DexportError(f"{where}: target: {error}") from error
    if manifest.precision not in PRECISIONS:
        raise _wrong(where, "precision", manifest.precision, ", ".join(PRECISIONS))
    if manifest.accuracy.get("gate") not in GATES:
        raise _wrong(where, "accuracy: gate", manifest.accuracy.get("gate"), " or ".join(map(repr, GATES)))
    for name, graph in manifest.model.graphs.items():
        if (own := graph.properties.get("precision", manifest.precision)) not in PRECISIONS:
            raise _wrong(where, f"graphs: {name}: properties: precision", own, ", ".join(PRECISIONS))
    check_paths((file.path for file in manifest.files), where)
    check_model(manifest.model, where)
    if manifest.self_test is not None:
        _check_self_test(manifest.self_test, manifest.model, f"{where}: self_test")


def _check_self_test(test: SelfTest, model: Model, where: str) -> None:
    """The run must be one that the model takes, and each graph must have a band."""
    if set(test.bands.graphs) != set(model.graphs):
        raise _wrong(where, "bands: graphs", ", ".join(test.bands.graphs), f"those of {', '.join(model.graphs)}")
    if not all(map(math.isfinite, (*test.bands.graphs.values(), test.bands.latents))):
        raise DexportError(f"{where}: bands: not finite; build the bundle anew")
    names = {way[0].name for way in cascade.ways(model.stages)}
    for name, steps in test.steps.items():
        if name not in names or not 1 <= steps <= STEPS:
            raise _wrong(where, f"steps: {name}", steps, f"1 to {STEPS}, of {' or '.join(sorted(names))}")
    if test.strength is not None and not 0 < test.strength <= 1:
        raise _wrong(where, "strength", test.strength, "above 0 and at most 1")


def check_model(model: Model, where: str, *, whole: bool = True) -> None:
    """Raise DexportError unless a model makes sense; with ``whole``, also if it has no stage to run."""
    if not model.graphs:
        raise DexportError(f"{where}: there are no graphs")
    if whole and not model.stages:
        raise DexportError(f"{where}: there are no stages: it holds no denoiser; export all graphs")
    for name, graph in model.graphs.items():
        _check_graph(name, graph, where)
    _check_tokenizers(model, where)
    for adapter in model.adapters:
        if adapter.path not in {file.path for file in model.source} or not math.isfinite(adapter.scale):
            raise _wrong(where, "adapters", adapter.path, "a file of the source, with a finite scale")
        if adapter.word is not None and not adapter.word.isprintable():
            raise _wrong(where, "adapters: word", adapter.word, "printable")
    for note in model.notes:
        if not note.isprintable():
            raise _wrong(where, "notes", note, "printable lines")
    for index, stage in enumerate(model.stages):
        _check_stage(model, stage, f"{where}: stages[{index}]")
    if whole:
        for way in cascade.ways(model.stages):
            _check_way(way, where)
        _check_given(model, where)
        if spare := sorted(set(model.graphs) - _used(model)):
            raise _wrong(where, "graphs", spare[0], "used by a stage")


def _used(model: Model) -> set[str | None]:
    """The graphs that the stages name."""
    return {
        name
        for stage in model.stages
        for name in (stage.denoiser, stage.text, stage.decoder, stage.encoder, *(hint.graph for hint in stage.hints))
    }


def _check_graph(name: str, graph: Graph, where: str) -> None:
    if not GRAPH_NAME.fullmatch(name) or name.startswith("tokenizer"):
        raise _wrong(where, "a graph's name", name, "lower-case letters, digits and _, and not tokenizer")
    where = f"{where}: graphs: {name}"
    check_paths([graph.file], where)
    # A folder of its own: no graph can take the place of another file of the bundle.
    if len(PurePosixPath(graph.file).parts) != 2 or not graph.file.startswith(f"{name}/"):
        raise _wrong(where, "file", graph.file, f"a file in the folder {name}")
    for tensors, needed in zip((graph.inputs, graph.outputs), TENSORS[graph.kind], strict=True):
        names = [tensor.name for tensor in tensors]
        if not names or len(set(names)) != len(names):
            raise DexportError(f"{where}: inputs and outputs must have a name each, and at least one of both")
        if missing := [item for item in needed if item not in names]:
            raise DexportError(f"{where}: a {graph.kind} must have {missing[0]!r}; there is only {names!r:.60}")
        for tensor in tensors:
            _check_tensor(tensor, where)
    free = {side for tensor in graph.inputs for side in tensor.shape if isinstance(side, str)}
    for side, sizes in graph.sizes.items():
        if side not in free or len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1] <= SIDE:
            raise _wrong(where, f"sizes: {side!r:.60}", sizes, "two numbers from 1 that rise, of a free dimension")
    if SEQUENCE in free and (graph.kind != "denoiser" or SEQUENCE not in graph.sizes):
        raise DexportError(f"{where}: a free {SEQUENCE} is a denoiser's, and its sizes must say how long it may be")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", graph.properties.get("max_batch", "1"), re.ASCII):
        raise _wrong(where, "properties: max_batch", graph.properties["max_batch"], "a number from 1")
    if graph.kind == "text" and any(tensor.dtype != "int64" for tensor in graph.inputs):
        raise DexportError(f"{where}: a text graph's inputs must be int64")


def _check_tensor(tensor: Tensor, where: str) -> None:
    where = f"{where}: {tensor.name!r:.60}"
    if not tensor.name.isprintable():
        raise DexportError(f"{where}: a tensor's name must be printable")
    if tensor.dtype not in DTYPES:
        raise _wrong(where, "dtype", tensor.dtype, " or ".join(DTYPES))
    if not 1 <= len(tensor.shape) <= RANK:
        raise _wrong(where, "shape", tensor.shape, f"1 to {RANK} dimensions")
    for side in tensor.shape:
        if side not in FREE if isinstance(side, str) else not 1 <= side <= SIDE:
            raise _wrong(where, "shape", side, f"1 to {SIDE}, or one of {', '.join(FREE)}")


def _check_tokenizers(model: Model, where: str) -> None:
    files = [tokenizer.file for tokenizer in model.tokenizers]
    check_paths(files, where)
    if len(set(files)) != len(files):
        raise IntegrityError(f"{where}: two tokenizers have the same file")
    if len({tokenizer.input for tokenizer in model.tokenizers}) != len(files):
        raise DexportError(f"{where}: two tokenizers have the same input")
    for tokenizer in model.tokenizers:
        if not TOKENIZER_FILE.fullmatch(tokenizer.file):
            raise _wrong(where, "a tokenizer's file", tokenizer.file, "a file in a folder tokenizer...")
        if not 1 <= tokenizer.length <= SIDE:
            raise _wrong(where, "a tokenizer's length", tokenizer.length, f"1 to {SIDE}")
        if not 0 <= tokenizer.pad < 2**31:
            raise _wrong(where, "a tokenizer's pad", tokenizer.pad, "0 to 2147483647")
        for template in (tokenizer.template, tokenizer.negative):
            if template is not None and template.count(PROMPT) != 1:
                raise _wrong(where, "a tokenizer's template", template, f"a text with one {PROMPT}")
    texts = [graph for graph in model.graphs.values() if graph.kind == "text"]
    for graph in texts:
        _check_text(graph, model.tokenizers, where)
    used = {tensor.name for graph in texts for tensor in graph.inputs}
    if any(tokenizer.input not in used for tokenizer in model.tokenizers):
        raise DexportError(f"{where}: there are tokenizers, but no text graph that takes their tokens")


def _check_text(graph: Graph, tokenizers: Sequence[Tokenizer], where: str) -> None:
    """The tokenizers must fill the text graph's inputs, one each."""
    wanted, given = sorted(tensor.name for tensor in graph.inputs), sorted(item.input for item in tokenizers)
    if not set(wanted) <= set(given):
        raise DexportError(f"{where}: the tokenizers give {given!r:.60} where the text graph takes {wanted!r:.60}")
    lengths = {item.input: item.length for item in tokenizers}
    for tensor in graph.inputs:
        if tensor.shape != ("batch", lengths[tensor.name]):
            raise _wrong(where, f"the shape of {tensor.name!r:.60}", tensor.shape, f"[batch, {lengths[tensor.name]}]")


def _check_stage(model: Model, stage: Stage, where: str) -> None:
    roles: list[tuple[Kind, str | None]] = [
        ("denoiser", stage.denoiser), ("text", stage.text), ("decoder", stage.decoder), ("encoder", stage.encoder),
    ]  # fmt: skip
    for kind, name in roles:
        if name is not None and (name not in model.graphs or model.graphs[name].kind != kind):
            raise _wrong(where, kind, name, f"a graph of the kind {kind}")
    is_last = stage is model.stages[-1]
    own, many = (3, "three") if stage.fps is None else (4, "four")  # a video has frames before its height
    ranks = (own,) if is_last or stage.gives is None else range(1, RANK)
    if len(stage.sample) not in ranks or not all(1 <= side <= SIDE for side in stage.sample):
        raise _wrong(where, "sample", stage.sample, f"{many} numbers from 1 to {SIDE}, or fewer where it is given on")
    frames = stage.sample[1 : own - 2] if len(stage.sample) == own else ()
    sides = stage.sample[1 + len(frames) :]
    picture = [3, *frames, *(side * stage.factor for side in sides)]
    if stage.factor < 1 or max(picture) > SIDE or max(math.prod(picture), math.prod(stage.sample)) > ELEMENTS:
        raise _wrong(where, "sample and factor", (stage.sample, stage.factor), f"at most {ELEMENTS} numbers a picture")
    if not 1 <= stage.steps <= STEPS:
        raise _wrong(where, "steps", stage.steps, f"1 to {STEPS}")
    if not math.isfinite(stage.guidance.scale):
        raise _wrong(where, "guidance: scale", stage.guidance.scale, "a finite number")
    if len(stage.span) != 2 or not 0 <= stage.span[0] < stage.span[1] <= 1:
        raise _wrong(where, "span", stage.span, "two numbers that rise within 0 to 1")
    strengths = {"strength": stage.strength}
    strengths |= {f"{task}: strength": getattr(stage, task).strength for task in ("image_to_image", "inpaint")}
    for name, strength in strengths.items():
        if strength is not None and not 0 < strength <= 1:
            raise _wrong(where, name, strength, "above 0 and at most 1")
    if not 1 <= stage.multiple <= SIDE or any(side % stage.multiple for side in sides):
        raise _wrong(where, "multiple", stage.multiple, "a number from 1 that divides the sample's sides")
    if stage.patch is not None and (stage.patch < 1 or stage.multiple % stage.patch):
        raise _wrong(where, "patch", stage.patch, "null, or a number from 1 that divides multiple")
    if stage.guidance.normalize == "tokens" and stage.patch is None:
        raise DexportError(f"{where}: guidance: to normalize tokens needs patch, their size")
    _check_inputs(model.graphs[stage.denoiser], stage, where)
    _check_video(model, stage, where)
    _check_hints(model, stage, where)
    _check_labels(model.graphs[stage.denoiser], stage, where)
    _check_states(model, stage, where)
    try:
        timetable.compile_stage(stage, stage.steps, stage.sample)
    except DexportError as error:
        raise DexportError(f"{where}: scheduler: {error}") from error


def _check_video(model: Model, stage: Stage, where: str) -> None:
    """A video is drawn out of noise by one way, with a fixed number of frames; its decoder takes one of them."""
    if stage.fps is None:
        return
    try:
        video.check_fps(stage.fps)
    except DexportError as error:
        raise DexportError(f"{where}: fps: {error}") from error
    if stage.gives is not None or len(cascade.ways(model.stages)) > 1:
        raise DexportError(f"{where}: fps is for the stages of a model with one way, which draws the video")
    if stage.encoder is not None:
        raise _wrong(where, "encoder", stage.encoder, "null, since a video starts from noise")
    if isinstance(_sample(model, stage).shape[2], str):
        raise _wrong(where, "the denoiser's frames", _sample(model, stage).shape[2], "a number")
    if stage.decoder is not None:
        taken = next(tensor for tensor in model.graphs[stage.decoder].inputs if tensor.name == "sample").shape
        if len(taken) != len(stage.sample):
            raise _wrong(where, "what the decoder takes", list(taken), "one frame, [batch, C, h, w]")


def _check_inputs(graph: Graph, stage: Stage, where: str) -> None:
    """The denoiser must take the stage's sample, and the values that the stage has for further inputs."""
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    sides = tensors["sample"].shape[1:]
    fits = len(sides) == len(stage.sample) and all(
        isinstance(a, str) or a == b for a, b in zip(sides, stage.sample, strict=True)
    )
    if not fits:
        raise _wrong(where, "sample", stage.sample, f"the denoiser's {list(sides)}")
    for name, value in (*stage.inputs.items(), *stage.negative.items()):
        if name not in tensors or name in (*TENSORS["denoiser"][0], *ASKED):
            raise _wrong(where, "inputs", name, "further inputs of the denoiser")
        try:
            array = conditioning.array(value, tensors[name].dtype, (1, 1))
        except DexportError as error:
            raise DexportError(f"{where}: inputs: {name!r:.60}: {error}") from error
        if array.shape != tensors[name].shape[1:]:
            raise _wrong(where, f"inputs: the shape of {name!r:.60}", array.shape, str(list(tensors[name].shape[1:])))
    if only := sorted(set(stage.negative) - set(stage.inputs)):
        raise _wrong(where, "negative", only[0], "one of the stage's inputs")
    _check_painting(tensors, stage, where)
    told = GUIDANCE in tensors
    if told != (stage.guidance.kind == "embedded") or (told and tensors[GUIDANCE].shape != ("batch",)):
        raise _wrong(where, "guidance: kind", stage.guidance.kind, f"'embedded' for a denoiser with {GUIDANCE} [batch]")


def _check_painting(tensors: Mapping[str, Tensor], stage: Stage, where: str) -> None:
    """A denoiser that is told a mask is told the masked picture too, in the sample's size and by its encoder."""
    if not any(name in tensors for name in PAINTING):
        return
    batch, channels, *sides = tensors["sample"].shape
    for name, count in zip(PAINTING, (1, channels), strict=True):
        if tensors.get(name) != Tensor(name, "float32", (batch, count, *sides)):
            raise DexportError(f"{where}: the denoiser's {name!r} must be float32 {[batch, count, *sides]}")
    if stage.encoder is None:
        raise DexportError(f"{where}: a denoiser that paints into a picture needs an encoder")


def _check_states(model: Model, stage: Stage, where: str) -> None:
    """States must be a text graph's, one for each token of each tokenizer; the denoiser may take those of more."""
    denoiser = model.graphs[stage.denoiser]
    long = {tensor.name for tensor in denoiser.inputs if SEQUENCE in tensor.shape}
    if not long <= set(stage.states):
        raise _wrong(where, "states", stage.states, f"{', '.join(sorted(long))}, whose {SEQUENCE} is free")
    if not stage.states:
        return
    text = model.graphs[stage.text] if stage.text is not None else None
    lengths = {tensor.shape[1] for tensor in text.inputs} if text else set()
    outputs = {tensor.name: tensor.shape for tensor in text.outputs} if text else {}
    for tokenizer in model.tokenizers:
        if text and tokenizer.input in {tensor.name for tensor in text.inputs}:
            said = (tokenizer.template, tokenizer.negative, tokenizer.lower, tokenizer.side)
            if said != (PROMPT, None, False, "right"):
                raise DexportError(f"{where}: states whose words may weigh are those of a prompt as it is")
    for name in stage.states:
        shape = outputs.get(name, ())
        if len(shape) != 3 or lengths != {shape[1]}:
            raise _wrong(where, "states", name, "an output of the text graph with a state for each token")
        taken = next((tensor for tensor in denoiser.inputs if tensor.name == name), None)
        if taken is None or taken.shape not in (shape, (shape[0], SEQUENCE, shape[2])):
            raise _wrong(where, "states", name, f"an input of the denoiser, {list(shape)} or with a free {SEQUENCE}")
        if long and (denoiser.sizes[SEQUENCE][0] != shape[1] or denoiser.sizes[SEQUENCE][1] % shape[1]):
            raise _wrong(where, f"sizes of {SEQUENCE}", denoiser.sizes[SEQUENCE], f"{shape[1]} and a multiple of it")


def _check_way(stages: Sequence[Stage], where: str) -> None:
    """The stages must make the whole way from noise to picture, one after the other, on samples of one shape."""
    spans = [stage.span for stage in stages]
    joined = all(before[1] == after[0] for before, after in pairwise(spans))
    if not joined or spans[0][0] != 0 or spans[-1][1] != 1:
        raise _wrong(where, "the stages' spans", spans, "a way from 0 to 1 without a gap")
    if len({(stage.sample, stage.factor, stage.fps) for stage in stages}) > 1:
        raise DexportError(f"{where}: the stages' samples differ; one must go on with what the other made")
    if not all(subject.alike(stages[0], stage) for stage in stages):
        raise DexportError(f"{where}: the stages must all take a prompt, or the same classes, or neither")


def _check_given(model: Model, where: str) -> None:
    """What a way ends with must be an input of a denoiser after it; the last one ends with the picture."""
    every = cascade.ways(model.stages)
    names = [way[0].name for way in every]
    if any(stage.gives_negative and (stage.gives is None or stage.text is None) for stage in model.stages):
        raise DexportError(f"{where}: gives_negative is for a stage that gives what it makes of a prompt")
    if model.stages[-1].gives is not None:
        raise _wrong(where, "the last stage's gives", model.stages[-1].gives, "null, since it draws the picture")
    if len(set(names)) != len(names):
        raise _wrong(where, "the stages' names", names, "different, since they start from noise of their own")
    for index, way in enumerate(every):
        stage, first = way[-1], way[0]
        if not (subject.alike(first, model.stages[0]) or subject.needs_nothing(first)):
            raise DexportError(f"{where}: {first.name!r:.60} must take the first stage's prompt or classes, or nothing")
        decoder = None if stage.decoder is None else model.graphs[stage.decoder]
        made = {tensor.name: tensor for tensor in decoder.outputs} if decoder else {}
        result = stage.gives or "image"
        if decoder is not None and result not in made:
            raise DexportError(f"{where}: graphs: {stage.decoder}: a decoder must have {result!r:.60} here")
        if stage.gives is None:
            continue
        denoisers = [model.graphs[later.denoiser] for one in every[index + 1 :] for later in one]
        taken = [tensor for graph in denoisers for tensor in graph.inputs if tensor.name == result]
        if not taken or result in (*TENSORS["denoiser"][0], *ASKED):
            raise _wrong(where, f"what {stage.name!r:.60} gives", result, "a further input of a later denoiser")
        shape = made[result].shape[1:] if decoder else _sample(model, stage).shape[1:]
        others = [made[name] for name in [cascade.NEGATIVE + result] if name in made]
        if any(not _meets(tensor, shape) for tensor in (*taken, *others)):
            raise _wrong(where, f"what {stage.name!r:.60} gives", shape, "of the shape that later denoisers take")
    free = [cascade.is_free(model, stage) for stage in model.stages if len(stage.sample) > 2]
    if any(free) and not free[-1]:
        raise DexportError(f"{where}: the last stage's samples have one size alone, where those before it are free")


def _meets(tensor: Tensor, shape: Sequence[int | str]) -> bool:
    """Whether what is given with a ``shape``, without batch, can be a tensor's."""
    sides = tensor.shape[1:]
    fits = len(sides) == len(shape) and all(
        isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(sides, shape, strict=True)
    )
    return fits and tensor.dtype == "float32"


def _sample(model: Model, stage: Stage) -> Tensor:
    return next(tensor for tensor in model.graphs[stage.denoiser].inputs if tensor.name == "sample")


def _check_labels(graph: Graph, stage: Stage, where: str) -> None:
    """A denoiser with classes must say which there are; to be guided it needs one that stands for none."""
    labels, taken = stage.labels, [tensor for tensor in graph.inputs if tensor.name == "labels"]
    if bool(labels) != bool(taken):
        raise DexportError(f"{where}: labels and an input 'labels' of the denoiser must go together")
    if labels is None:
        return
    if taken != [Tensor("labels", "int64", ("batch",))]:
        raise DexportError(f"{where}: the denoiser's 'labels' must be int64 [batch]")
    if not 1 <= labels.count <= MOST_LABELS:
        raise _wrong(where, "labels: count", labels.count, f"1 to {MOST_LABELS}")
    if labels.null is not None and not 0 <= labels.null <= MOST_LABELS:
        raise _wrong(where, "labels: null", labels.null, f"0 to {MOST_LABELS}")
    if labels.null is None and stage.guidance.kind == "cfg":
        raise DexportError(f"{where}: guidance needs a class that stands for none")
    for number, name in labels.names.items():
        if not (NUMBER.fullmatch(number) and int(number) < labels.count and name.isprintable()):
            raise _wrong(
                where, f"labels: names: {number!r:.20}", name, f"a name of a class from 0 to {labels.count - 1}"
            )


def _check_hints(model: Model, stage: Stage, where: str) -> None:
    """Each hint must have a name, and fill inputs of the denoiser that nothing else fills, by a graph or itself."""
    filled = [*TENSORS["denoiser"][0], *ASKED, *stage.inputs]
    denoiser = {tensor.name: tensor for tensor in model.graphs[stage.denoiser].inputs}
    for hint in stage.hints:
        if not GRAPH_NAME.fullmatch(hint.name):
            raise _wrong(where, "a hint's name", hint.name, "lower-case letters, digits and _")
        own = f"{where}: hints: {hint.name}"
        if hint.graph is not None and (hint.graph not in model.graphs or model.graphs[hint.graph].kind != "hint"):
            raise _wrong(own, "graph", hint.graph, "a graph of the kind hint")
        taken = denoiser if hint.graph is None else {tensor.name: tensor for tensor in model.graphs[hint.graph].inputs}
        picture = taken.get(hint.input)
        if (
            picture is None
            or picture.dtype != "float32"
            or picture.shape[:2] != ("batch", 3)
            or len(picture.shape) != 4
        ):
            raise _wrong(own, "input", hint.input, "an input of float32 [batch, 3, height, width]")
        if hint.graph is not None and len(taken) != 1:
            raise _wrong(own, "graph", hint.graph, "a graph with one input")
        made = {tensor.name: tensor for tensor in model.graphs[hint.graph].outputs} if hint.graph is not None else {}
        for name, tensor in made.items():
            of = name if name in denoiser else name.removeprefix(NEGATIVE)
            if of not in made or denoiser.get(of) != Tensor(of, tensor.dtype, tensor.shape):
                raise _wrong(own, "an output of its graph", name, f"an input of the denoiser, or {NEGATIVE} and one")
        if denoiser.get(hint.scale) != Tensor(hint.scale, "float32", ("batch",)):
            raise _wrong(own, "scale", hint.scale, "an input of the denoiser of float32 [batch]")
        if not abs(hint.default) <= LARGEST:
            raise _wrong(own, "default", hint.default, f"a number up to {LARGEST:g}")
        filled += [hint.scale, *([hint.input] if hint.graph is None else made.keys() & denoiser.keys())]
    if twice := [name for name in filled if filled.count(name) > 1]:
        raise DexportError(f"{where}: the denoiser's input {twice[0]!r:.60} is filled twice")
    if len({hint.name for hint in stage.hints}) != len(stage.hints):
        raise DexportError(f"{where}: two hints have the same name")


def _wrong(where: str, what: str, value: object, wanted: str) -> DexportError:
    return DexportError(f"{where}: {what} is {value!r:.60}; it must be {wanted}")
