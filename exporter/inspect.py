"""What a path is: a checkpoint, an ONNX hub or a bundle, in figures. Loads no weight.

Only a checkpoint needs torch, which counts what a build of it will take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes import bundle, cascade
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Model, Stage, Tensor
from runtimes.safetensors import Stored

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint


def inspect(
    path: Path | str, *, config: Path | str | None = None, prior: Path | str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Describe what lies at ``path``, ready for JSON; ``kind`` is "bundle", "hub" or "checkpoint", sizes are in bytes.

    A checkpoint has also what it "needs" (``exporter.estimate``), or why it "cannot be built".
    ``config``, ``prior``, ``variant``: of a checkpoint, as in ``exporter.ensemble.Origin``; so ``path`` may be a
    repository on the hub, which is downloaded.
    Hashes are not checked (``verify`` does that) and weights not searched for NaN (``export`` does). Raises
    DexportError for what is none of the three.
    """
    path = Path(path)
    if (path / bundle.MANIFEST).is_file():
        return _bundle(path)
    if (path / bundle.HUB).is_file():
        return _hub(path)
    return _checkpoint(path, config, prior, variant)


def _bundle(path: Path) -> dict[str, Any]:
    manifest = bundle.load_manifest(path, check=False)
    sizes = {file.path: file.size for file in manifest.files}
    return {
        "kind": "bundle",
        "target": manifest.target,
        "precision": manifest.precision,
        **_model(manifest.model, sizes),
        "recipe": dict(manifest.recipe),
        "tools": dict(manifest.tools),
        "accuracy": dict(manifest.accuracy),
    }


def _hub(path: Path) -> dict[str, Any]:
    from exporter import hub

    model = hub.load(path, whole=False)
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    found = _model(model, sizes)
    for name, graph in model.graphs.items():
        found["graphs"][name] |= _operators(path / graph.file)
    return {"kind": "hub", **found}


def _model(model: Model, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a hub and a bundle share; ``sizes``: bytes by path of every file in the folder."""
    return {
        "family": model.family,
        "pipeline": model.pipeline,
        "size": sum(sizes.values()),
        **(_main(model) if model.stages else {}),  # a hub of chosen graphs may hold no whole stage
        **({"stages": {stage.name: _span(stage) for stage in model.stages}} if len(model.stages) > 1 else {}),
        **({"adapters": {item.path: item.scale for item in model.adapters}} if model.adapters else {}),
        **({"words": words} if (words := [item.word for item in model.adapters if item.word]) else {}),
        **({"notes": list(model.notes)} if model.notes else {}),
        "graphs": {name: _graph(graph, sizes) for name, graph in model.graphs.items()},
        "source_files": len(model.source),
        "source_size": sum(file.size for file in model.source),
    }


def _main(model: Model) -> dict[str, Any]:
    stage, last = cascade.main(model.stages)[0], model.stages[-1]
    return {
        **({"image": _pixels(last)} if len(last.sample) > 2 else {}),
        **({"frames": f"{last.sample[1]}, {last.fps:g} a second"} if last.fps else {}),
        "sampler": stage.scheduler["_class_name"],
        "steps": stage.steps,
        "guidance": f"{stage.guidance.kind}, scale {stage.guidance.scale:g}",
        **({"classes": stage.labels.count} if stage.labels else {}),
        **({"hints": {hint.name: hint.default for hint in stage.hints}} if stage.hints else {}),
    }


def _pixels(stage: Stage) -> str:
    height, width = stage.sample[-2:]
    return f"{height * stage.factor}x{width * stage.factor} pixels"


def _span(stage: Stage) -> str:
    start, end = stage.span
    gives = f", to {stage.gives} for those after it" if stage.gives else ""
    return f"{stage.denoiser}, {stage.steps} steps, from {start:g} to {end:g} of the way out of noise{gives}"


def _graph(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    folder = graph.file.rpartition("/")[0] + "/"
    return {
        "file": graph.file,
        "size": sum(size for path, size in sizes.items() if path.startswith(folder)),
        "inputs": _tensors(graph.inputs),
        "outputs": _tensors(graph.outputs),
        "properties": dict(graph.properties),
    }


def _tensors(tensors: Iterable[Tensor]) -> dict[str, str]:
    return {t.name: f"{t.dtype} [{', '.join(str(side) for side in t.shape)}]" for t in tensors}


def _operators(file: Path) -> dict[str, Any]:
    """Count the nodes and parameters of an ONNX file without reading its external data."""
    import onnx_ir

    graph = onnx_ir.load(file).graph
    kinds = Counter(node.op_type for node in graph.all_nodes())
    values = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    return {
        "nodes": sum(kinds.values()),
        "parameters": sum(value.size for value in values if value.dtype.is_floating_point()),
        "operators": dict(kinds.most_common()),
    }


def _checkpoint(path: Path, config: Path | str | None, prior: Path | str | None, variant: str | None) -> dict[str, Any]:
    from exporter import checkpoint, ensemble, hints

    origin = ensemble.local(ensemble.Origin(path, config=config, prior=prior, variant=variant))
    read = checkpoint.read(
        Path(str(origin.path)), config=origin.config, prior=origin.prior, variant=variant, check=False
    )
    found = hints.add(read, variant=variant, check=False)
    components = {name: _component(c.class_name, c.entries.values()) for name, c in found.components.items()}
    return {
        "kind": "checkpoint",
        "family": found.family.NAME,
        "pipeline": found.pipeline,
        "size": sum(file.stat().st_size for file in found.files.values()),
        "parameters": sum(component["parameters"] for component in components.values()),
        "scheduler": found.scheduler["_class_name"],
        "components": components,
        **({"notes": list(found.notes)} if found.notes else {}),
        **_needs(found),
    }


def _needs(found: Checkpoint) -> dict[str, Any]:
    """What a build takes, or the reason why there can be none."""
    from exporter import estimate

    try:
        return {"needs": estimate.needs(found)}
    except DexportError as error:
        return {"cannot be built": str(error)}


def _component(class_name: str, entries: Iterable[Stored]) -> dict[str, Any]:
    entries = list(entries)
    return {
        "class": class_name,
        "parameters": sum(prod(entry.shape) for entry in entries),
        "tensors": len(entries),
        "size": sum(entry.size for entry in entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries)),
    }
