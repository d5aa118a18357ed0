"""The hub: a checkpoint as ONNX graphs that every backend compiles from, with what a pipeline must know of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter import ensemble
from exporter import tokenizer as tokenizers
from exporter.checkpoint import Checkpoint
from exporter.ensemble import Origin
from exporter.families import Shape, Spec
from runtimes import timetable
from runtimes.bundle import HUB, publish
from runtimes.check import ELEMENTS, SIDE, check_model
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph, Model, Stage, Tokenizer, from_json, to_json

if TYPE_CHECKING:
    from exporter.own import OwnModel

INLINE = 1024  # bytes: a tensor up to this size stays in model.onnx, where shape inference sees it


def export(
    checkpoint: Origin | OwnModel | Checkpoint | Path | str,
    output: Path | str,
    *,
    shape: tuple[int, int] | None = None,
    dynamic_shape: bool = False,
    graphs: Collection[str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Model:
    """Export a checkpoint, or what was read of one, to the hub folder ``output`` and return what hub.json says.

    ``shape`` is (height, width) of the picture in pixels, the checkpoint's own by default; with ``dynamic_shape`` the
    graphs take every size. ``graphs``: the names of those to export, all by default. ``output`` appears whole or not at
    all. Raises DexportError for input that is missing, damaged or not supported, and for a full disk.
    """
    output = Path(output)
    if isinstance(checkpoint, Checkpoint):
        source = checkpoint
    else:
        source = ensemble.read(checkpoint, progress=_within(progress, 0.0, 0.05))
    family = source.family
    size = Shape(*(shape or family.default_shape(source)), free=dynamic_shape)
    if max(size.height, size.width) > SIDE or 3 * size.height * size.width > ELEMENTS:
        raise DexportError(f"a picture of {size.height}x{size.width} pixels is too large; choose a smaller --shape")
    specs = _choose(ensemble.specs(source, size), graphs)
    for whole in filter(None, (source, source.refiner)):
        tokenizers.check(whole)
    stages = tuple(_only(stage, specs) for stage in ensemble.stages(source, size) if stage.denoiser in specs)
    for stage in stages:  # now, not after an export that nothing could run
        timetable.compile_stage(stage, stage.steps, stage.sample)
    with publish(output, overwrite) as folder:
        made = {}
        for index, (name, spec) in enumerate(specs.items()):
            start, part = 0.05 + 0.9 * index / len(specs), 0.9 / len(specs)
            made[name] = _export_graph(source, name, spec, folder, _within(progress, start, part))
        progress("hashing the checkpoint", 0.95)
        model = Model(
            family.NAME,
            source.pipeline,
            made,
            _write_tokenizers(source, folder) if any(spec.kind == "text" for spec in specs.values()) else (),
            stages,
            ensemble.source(source),
            source.adapters,
            source.notes,
        )
        check_model(model, str(output), whole=False)
        (folder / HUB).write_text(to_json(model), encoding="utf-8")
    progress("done", 1.0)
    return model


def load(folder: Path, *, whole: bool = True) -> Model:
    """Read a hub folder's hub.json; DexportError if there is none, it makes no sense or a graph is missing.

    With ``whole``, a hub of chosen graphs that has no stage to run is refused too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DexportError(f"{folder}: no such folder")
    if not (folder / HUB).is_file():
        raise DexportError(f"{folder}: not a hub: it has no {HUB}; make one with: dexport export")
    try:
        text = (folder / HUB).read_text(encoding="utf-8")
    except ValueError as error:
        raise DexportError(f"{folder / HUB}: not valid UTF-8; export it again") from error
    model = from_json(Model, text, str(folder / HUB))
    check_model(model, str(folder / HUB), whole=whole)
    for path in [graph.file for graph in model.graphs.values()] + [item.file for item in model.tokenizers]:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise DexportError(f"{folder / HUB}: {path!r} is a link to the outside of the hub")
        if not (folder / path).is_file():
            raise DexportError(f"{folder}: {path} is missing; export it again")
    return model


def _choose(specs: Mapping[str, Spec], graphs: Collection[str] | None) -> Mapping[str, Spec]:
    if graphs is None:
        return specs
    if unknown := sorted(set(graphs) - set(specs)):
        raise DexportError(f"no graph {unknown[0]!r}; there are {', '.join(specs)}")
    if not graphs:
        raise DexportError(f"no graph chosen; there are {', '.join(specs)}")
    return {name: spec for name, spec in specs.items() if name in graphs}


def _export_graph(source: Checkpoint, name: str, spec: Spec, folder: Path, progress: Progress) -> Graph:
    """Write ``folder``/NAME/model.onnx and model.onnx.data, and return their description."""
    # Here, so that `import exporter.hub` and looking at a hub do not wait for torch.
    import onnx_ir

    from exporter import passes, trace
    from exporter.weights import bind, parameter_shapes, tied

    progress(f"{name}: tracing", 0.0)
    modules = trace.build(spec)
    weights = bind(ensemble.owner(source, name), parameter_shapes(modules), tied(modules))
    try:
        model = trace.trace(spec, modules, weights)
    except Exception as error:  # whatever torch raises for code that has no graph
        if not source.in_memory:
            raise  # a graph of ours must have one
        raise DexportError(f"your {name} has no graph: torch says {_cause(error)}; see docs/own-model.md") from error
    progress(f"{name}: optimizing", 0.5)
    model = passes.run(model, passes.HUB)
    progress(f"{name}: writing", 0.7)
    file = folder / name / "model.onnx"
    file.parent.mkdir()
    onnx_ir.save(model, file, external_data=f"{file.name}.data", size_threshold_bytes=INLINE)
    return Graph(spec.kind, f"{name}/{file.name}", spec.inputs, spec.outputs, sizes=spec.sizes)


def _cause(error: BaseException) -> str:
    """The kind and first line of what came first: torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def _write_tokenizers(source: Checkpoint, folder: Path) -> tuple[Tokenizer, ...]:
    made = []
    for name, (files, tokens, words) in ensemble.token_inputs(source).items():
        file = f"{name}/{tokenizers.JSON}"
        tokenizers.write(files.made, folder / file, words)
        said = (tokens.template, tokens.negative, tokens.lower, tokens.side or files.made.side)
        made.append(Tokenizer(file, tokens.input, tokens.length, files.made.pad, *said))
    return tuple(made)


def _only(stage: Stage, made: Collection[str]) -> Stage:
    """The stage without the graphs that are not exported."""

    def kept(name: str | None) -> str | None:
        return name if name in made else None

    hints = tuple(hint for hint in stage.hints if hint.graph is None or hint.graph in made)
    states = stage.states if stage.text in made else ()
    return replace(
        stage, text=kept(stage.text), decoder=kept(stage.decoder), encoder=kept(stage.encoder), hints=hints,
        states=states,
    )  # fmt: skip


def _within(progress: Progress, start: float, part: float) -> Progress:
    return lambda what, share: progress(what, start + part * share)
