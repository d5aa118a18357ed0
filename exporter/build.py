"""``dexport build``: export, record the reference, then for each target compile, prove and publish."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration import islands
from calibration.islands import Found
from calibration.quality import Budget
from exporter import compile as compilers
from exporter import ensemble, gate, hub, quantized, record, report, spread, tiny_decoder
from exporter.ensemble import Origin
from exporter.families import Shape
from exporter.quantized import Quantization
from exporter.spread import Limits
from exporter.tries import Calibrated
from runtimes import bundle
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Manifest, Model, SelfTest, Stage, to_json
from runtimes.session import Session, backend, one_at_a_time, require, runs_here
from runtimes.target import Target

if TYPE_CHECKING:
    from exporter.own import OwnModel

TOOLS = ("dexport", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True)
class Built:
    """A published bundle: where, how large in bytes, what the gate found, and seconds a model call (None: not run).

    notes: on what was left out of the checkpoint.
    """

    target: str
    precision: str
    folder: Path
    size: int
    accuracy: Mapping[str, Any]
    seconds: float | None
    notes: tuple[str, ...] = ()


def build(
    checkpoint: Origin | OwnModel | Path | str,
    output: Path | str,
    *,
    targets: Sequence[str] | str,
    precisions: Sequence[str] | str = ("fp32",),
    shape: tuple[int, int] | None = None,
    dynamic_shape: bool = False,
    max_batch: int = 2,
    cache: Path | None = None,
    overwrite: bool = False,
    keep_hub: Path | str | None = None,
    quantization: Quantization | None = None,
    progress: Progress = silent,
) -> list[Built]:
    """Make bundles of a checkpoint, one for each target and precision, each proven against the torch model.

    ``targets``: "openvino", for each of ``precisions``; or "openvino=bf16", in that one alone. With one target and
    precision ``output`` is the bundle, else ``output/<target>-<precision>``. ``shape``: (height, width) in pixels.
    ``max_batch``: the largest batch of an engine whose shapes are fixed when it is built. ``keep_hub``: keep the ONNX
    hub there. ``quantization``: for int8, how it is calibrated and the quality that it must keep; its prompts also find
    where fp16 overflows. Raises DexportError for bad input and GateError for a missed band; each bundle is published
    whole or not at all.
    """
    origin, output = Origin.of(checkpoint), Path(output)
    keep_hub = Path(keep_hub) if keep_hub else None
    precisions = [precisions] if isinstance(precisions, str) else precisions
    pairs = _pairs([targets] if isinstance(targets, str) else targets, precisions)
    folders = [output] if len(pairs) == 1 else [output / f"{target.folder}-{precision}" for target, precision in pairs]
    for (target, precision), folder in zip(pairs, folders, strict=True):
        compilers.check(target, precision)  # now, not after the export
        bundle.check_free(folder, overwrite, [*origin.checkpoints, *([keep_hub] if keep_hub else [])])
    settings = _check_quantization(quantization, pairs)
    if keep_hub:
        bundle.check_free(keep_hub, overwrite, origin.checkpoints)
    source = ensemble.read(origin, progress=_shares(progress, 1 + len(pairs))(0, 0.01))
    size = Shape(*(shape or source.family.default_shape(source)), free=dynamic_shape)
    _check_use(ensemble.stages(source, size), pairs, settings)  # likewise
    with tempfile.TemporaryDirectory(prefix=".dexport-", dir=_existing(output)) as work:
        hub_folder = keep_hub or Path(work) / "hub"
        share = _shares(progress, 1 + len(pairs))
        model = hub.export(
            source, hub_folder, shape=shape, dynamic_shape=dynamic_shape, overwrite=overwrite, progress=share(0, 0.5)
        )
        reference = record.record(source, model, hub_folder, share(0.5, 0.8))
        is_shown = _shows_export(pairs[0]) or backend("onnxruntime").version() is None
        noise = spread.measure(source, model, reference, _precisions(pairs), record.size(model), share(0.8, 0.9))
        if not is_shown:
            gate.prove_hub(source, reference, model, hub_folder, share(0.9, 0.95))
        decoded = {}
        if tiny_decoder.COMPONENT in source.components:
            decoded["decoder"] = tiny_decoder.against_full(source, reference, replace(size, free=False))
        recipe = {"shape": list(_shape(model)), "dynamic_shape": dynamic_shape, "max_batch": max_batch}
        if origin.clip_skip != 1:
            recipe["clip_skip"] = origin.clip_skip
        prepared = _prepare(model, hub_folder, pairs, settings, share(0.95, 1))
        built = []
        for index, ((target, precision), folder) in enumerate(zip(pairs, folders, strict=True), 1):
            with bundle.publish(folder, overwrite) as partial:
                compiled, quality = _compile(
                    hub_folder, model, partial, target, precision, max_batch, cache, prepared,
                    share(index, index + 0.5),
                )  # fmt: skip
                gate.write_golden(reference, partial / bundle.GOLDEN)
                limits = spread.limits(noise, compiled, precision)
                proof = _prove(reference, compiled, partial, target, precision, limits, share(index + 0.5, index + 1))
                proof = replace(proof, accuracy={**proof.accuracy, **quality, **decoded})
                text = report.render(compiled, str(target), precision, recipe, proof, reference)
                (partial / "report.html").write_text(text, encoding="utf-8")
                test = gate.self_test(reference, compiled, limits)
                manifest = _write_manifest(partial, compiled, target, precision, recipe, proof.accuracy, test)
            total = sum(file.size for file in manifest.files)
            built.append(Built(str(target), precision, folder, total, proof.accuracy, proof.seconds, model.notes))
    progress("done", 1.0)
    return built


def _pairs(targets: Sequence[str], precisions: Sequence[str]) -> list[tuple[Target, str]]:
    pairs = []
    for text in targets:
        name, equals, own = text.partition("=")
        if equals and not own:
            raise DexportError(f"{text!r}: name a precision after the =, like {name}=bf16")
        pairs += [(Target.parse(name), precision) for precision in ([own] if equals else precisions)]
    if not pairs:
        raise DexportError("no target, or no precision, given; try --target openvino --precision fp32")
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise DexportError(f"{pair[0]} {pair[1]} is asked for twice")
    return pairs


def compile_hub(
    hub_folder: Path | str,
    output: Path | str,
    *,
    target: str,
    precision: str = "fp32",
    max_batch: int = 2,
    cache: Path | None = None,
    overwrite: bool = False,
    quantization: Quantization | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Make a bundle from a hub folder alone, with nothing to prove it against; the manifest says so.

    ``target``: "openvino", or "openvino=bf16" in place of ``precision``. ``quantization``: as in ``build``; int8 is
    judged by the hub's own pictures in fp32.
    """
    hub_folder, output = Path(hub_folder), Path(output)
    pairs = _pairs([target], [precision])
    where, precision = pairs[0]
    compilers.check(where, precision)
    bundle.check_free(output, overwrite, [hub_folder])
    settings = _check_quantization(quantization, pairs)
    model = hub.load(hub_folder)
    _check_use(model.stages, pairs, settings)
    share = _shares(progress, 2)
    prepared = _prepare(model, hub_folder, pairs, settings, share(0, 1))
    dynamic = any(isinstance(side, str) for side in _sample(model).shape[1:])
    recipe = {"shape": list(_shape(model)), "dynamic_shape": dynamic, "max_batch": max_batch}
    accuracy = {"gate": "not run", "why": "compiled from a hub, without its checkpoint", "next": "use dexport build"}
    with bundle.publish(output, overwrite) as partial:
        compiled, quality = _compile(
            hub_folder, model, partial, where, precision, max_batch, cache, prepared, share(1, 2)
        )
        return _write_manifest(partial, compiled, where, precision, recipe, {**accuracy, **quality})


@dataclass(frozen=True)
class _Prepared:
    """What was found out of a hub for all its bundles: for those that quantize, and for those that compute in fp16.

    islands: by whether the denoiser is the one that is quantized.
    """

    calibrated: Calibrated | None
    budget: Budget
    islands: Mapping[bool, Found]


def _prepare(
    model: Model, hub_folder: Path, pairs: Sequence[tuple[Target, str]], settings: quantized.Settings,
    progress: Progress,
) -> _Prepared:  # fmt: skip
    is_quantized = [precision in quantized.PRECISIONS for _, precision in pairs]
    kinds = {own for pair, own in zip(pairs, is_quantized, strict=True) if compilers.computes_in_fp16(*pair)}
    share = _shares(progress, any(is_quantized) + len(kinds))
    calibrated = quantized.prepare(model, hub_folder, settings, share(0, 1)) if any(is_quantized) else None
    found = {
        own: islands.find(
            model, hub_folder, settings.prompts and settings.prompts[0], quantized=own, progress=share(index, index + 1)
        )
        for index, own in enumerate(sorted(kinds), int(any(is_quantized)))
    }  # fmt: skip
    return _Prepared(calibrated, settings.budget, found)


def _compile(
    hub_folder: Path, model: Model, output: Path, target: Target, precision: str, max_batch: int,
    cache: Path | None, prepared: _Prepared, progress: Progress,
) -> tuple[Model, Mapping[str, Any]]:  # fmt: skip
    """Compile each graph of a hub into ``output`` and copy the tokenizers.

    Returns the model as the bundle has it, and what was measured on the way: of fp16's islands, of the quantization.
    """
    is_quantized = precision in quantized.PRECISIONS
    found = prepared.islands[is_quantized] if compilers.computes_in_fp16(target, precision) else None
    quality = {"fp16": found.report()} if found else {}
    later = {stage.denoiser for stage in model.stages} if is_quantized else set()
    graphs = dict(model.graphs)
    for index, (name, graph) in enumerate(model.graphs.items()):
        if name in later:
            continue
        own = quantized.BESIDE[target.backend] if is_quantized else precision
        progress(f"{target} {own}: {name}", index / len(model.graphs))
        (output / name).mkdir()
        beside = compilers.compile_graph(
            hub_folder / graph.file, graph, output / name, target, own, max_batch=max_batch,
            islands=found.nodes(name) if found else frozenset(), cache=cache,
        )  # fmt: skip
        graphs[name] = replace(beside, properties={**beside.properties, "precision": own}) if is_quantized else beside
    for tokenizer in model.tokenizers:
        (output / tokenizer.file).parent.mkdir(exist_ok=True)
        shutil.copyfile(hub_folder / tokenizer.file, output / tokenizer.file)
    compiled = replace(model, graphs=graphs)
    if not is_quantized or prepared.calibrated is None:
        return compiled, quality
    name = model.stages[0].denoiser
    made = quantized.make(
        prepared.calibrated, prepared.budget, compiled, output, target, precision, max_batch, cache, progress,
        found.nodes(name) if found else frozenset(),
    )  # fmt: skip
    return replace(model, graphs=graphs | {name: made.graph}), {**quality, "quantization": made.report}


def _check_quantization(quantization: Quantization | None, pairs: Sequence[tuple[Target, str]]) -> quantized.Settings:
    """How to quantize, and the prompts to run; refuse settings that nothing uses, before the long work."""
    asked = quantization or Quantization()
    used = any(precision in quantized.PRECISIONS for _, precision in pairs)
    only_prompts = asked == Quantization(prompts=asked.prompts)
    if quantization and not used and not (only_prompts and any(compilers.computes_in_fp16(*pair) for pair in pairs)):
        raise DexportError(
            f"a budget, prompts and statistics are for {', '.join(quantized.PRECISIONS)}, and none is asked for; "
            f"add --precision {quantized.PRECISIONS[0]}"
        )
    return asked.checked()


def _check_use(stages: Sequence[Stage], pairs: Sequence[tuple[Target, str]], settings: quantized.Settings) -> None:
    """Raise DexportError for a model that is not quantized, and for prompts that it does not take."""
    if any(precision in quantized.PRECISIONS for _, precision in pairs):
        quantized.check(stages)
    settings.check_for(stages)


def _shows_export(pair: tuple[Target, str]) -> bool:
    """Whether a bundle runs the exported graphs in fp32 here, so that its own proof shows a fault of theirs."""
    target, precision = pair
    return precision == "fp32" and target.backend != "tensorrt" and runs_here(target)


def _precisions(pairs: Sequence[tuple[Target, str]]) -> list[str]:
    """The precisions of all graphs to be, those beside a quantized denoiser among them."""
    beside = [quantized.BESIDE[target.backend] for target, precision in pairs if precision in quantized.PRECISIONS]
    return sorted({precision for _, precision in pairs} | set(beside))


def _prove(
    reference: record.Reference, model: Model, folder: Path, target: Target, precision: str, limits: Limits,
    progress: Progress,
) -> gate.Proof:  # fmt: skip
    """Run the gate where this machine can run the target, else say why it was not run."""
    runtime = require(target.backend)
    if not runs_here(target):
        return gate.not_run(reference, f"this machine has no device that runs {target}")

    def load(name: str) -> Session:
        return runtime.open(folder / model.graphs[name].file, model.graphs[name], target.device, None, None)

    return gate.prove(reference, model, folder, precision, limits, one_at_a_time(load), progress)


def _write_manifest(
    folder: Path, model: Model, target: Target, precision: str, recipe: Mapping[str, Any], accuracy: Mapping[str, Any],
    test: SelfTest | None = None,
) -> Manifest:  # fmt: skip
    tools = {target.backend: str(require(target.backend).version())}
    for name in TOOLS:
        with suppress(metadata.PackageNotFoundError):  # dexport itself, where it runs from its source
            tools[name] = metadata.version(name)
    files = bundle.list_files(folder, without=(bundle.MANIFEST,))
    manifest = Manifest(
        bundle.FORMAT, bundle.VERSION, str(target), precision, model, recipe, tools, files, accuracy, test
    )
    (folder / bundle.MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return bundle.load_manifest(folder, check=False)  # what no reader would take is not published


def _sample(model: Model) -> Any:
    stage = model.stages[0]
    return next(tensor for tensor in model.graphs[stage.denoiser].inputs if tensor.name == "sample")


def _shape(model: Model) -> tuple[int, int]:
    stage = model.stages[-1]
    height, width = stage.sample[-2:]
    return height * stage.factor, width * stage.factor


def _existing(output: Path) -> Path:
    """The nearest folder above ``output`` that exists: the hub is written on the disk that the bundle goes to."""
    return next(parent for parent in output.absolute().parents if parent.is_dir())


def _shares(progress: Progress, total: int) -> Any:
    """Give ``share(start, end)``: a progress that fills that part of ``total`` equal parts."""

    def share(start: float, end: float) -> Progress:
        return lambda what, part: progress(what, (start + (end - start) * part) / total)

    return share
