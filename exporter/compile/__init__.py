"""From the hub's ONNX to what a backend runs: one module a backend, behind one small protocol.

A module writes the graph's file into a folder and returns the ``Graph`` as the bundle has it: its file, and the
properties that the runtime needs to know (precision hint, batch limit, the compiler's version). It raises DexportError
with one line for what it cannot do. docs/adding-a-backend.md tells how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from exporter import cache as compile_cache
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Graph
from runtimes.target import Target

LARGEST_BATCH = 4096  # that an engine of fixed shapes may be built for


class Compiler(Protocol):
    """What a module in exporter/compile offers."""

    WHY: str  # why it builds no other precisions: the end of the sentence "there is no bf16 here: ..."

    DYNAMIC: tuple[str, ...]  # devices whose int8 linear layers can round activations themselves, group by group
    SCORES: tuple[str, ...]  # devices on which long attention is faster with queries and keys in 8 bits

    def precisions(self, target: Target) -> tuple[str, ...]:
        """What it can build for a target, the most exact one first."""

    def computes_in_fp16(self, target: Target, precision: str) -> bool:
        """Whether values are fp16 inside, which ends at 65504; then ``build`` gets the islands that are not."""

    def check(self, target: Target) -> None:
        """Raise DexportError, saying what to install, if this machine cannot compile for ``target``."""

    def depends_on(self, target: Target) -> str:
        """Everything outside dexport that the result depends on: compiler, version, GPU; a part of the cache's key."""

    def alternatives(self, graph: Graph, target: Target, precision: str) -> tuple[Graph, ...]:
        """What was built under other properties, at least as exact, that may be faster on some machines."""

    def build(
        self, source: Path, graph: Graph, output: Path, target: Target, precision: str, max_batch: int,
        progress: Progress, islands: Collection[str] = frozenset(),
    ) -> Graph:  # fmt: skip
        """Compile ``source`` into the folder ``output``; ``islands``: see ``compile_graph``."""


def precisions(target: Target) -> tuple[str, ...]:
    """The precisions that can be built for a target, the most exact one first."""
    return _compiler(target).precisions(target)


def dynamic(target: Target) -> bool:
    """Whether its int8 kernels can round the activations of linear layers themselves, with a scale for each group."""
    return target.device in _compiler(target).DYNAMIC


def integer_scores(target: Target) -> bool:
    """Whether long attention is faster there with queries and keys in 8 bits."""
    return target.device in _compiler(target).SCORES


def alternatives(graph: Graph, target: Target, precision: str) -> tuple[Graph, ...]:
    """A compiled graph's files under other properties, at least as exact; which is faster depends on the machine."""
    return _compiler(target).alternatives(graph, target, precision)


def computes_in_fp16(target: Target, precision: str) -> bool:
    """Whether a bundle of this precision holds fp16 values on the target, so that they may overflow."""
    return _compiler(target).computes_in_fp16(target, precision)


def check(target: Target, precision: str) -> None:
    """Raise DexportError, with the reason and what to do, if ``precision`` cannot be built here for ``target``."""
    _compiler(target).check(target)
    if precision not in precisions(target):
        known = ", ".join(precisions(target))
        raise DexportError(f"{target} has no precision {precision!r}: {_compiler(target).WHY}; it has {known}")


def compile_graph(
    source: Path,
    graph: Graph,
    output: Path,
    target: Target,
    precision: str,
    *,
    max_batch: int = 2,
    islands: Collection[str] = frozenset(),
    cache: Path | None = None,
    progress: Progress = silent,
) -> Graph:
    """Compile a hub graph for a target.

    ``source``: the hub's model.onnx, with its external data beside it. ``output``: an existing empty folder, which
    the result's ``file`` is named after ("denoiser/model.xml" for the folder "denoiser"). ``max_batch``: the largest
    batch that an engine of fixed shapes takes. ``islands``: names of the nodes that stay float32 where others compute
    in fp16 (calibration/islands.py finds them); they change nothing for a target that does not. ``cache``: a folder of
    earlier results, used and added to. Raises DexportError for a precision or a graph that the target has no way to
    run.
    """
    check(target, precision)
    if not 1 <= max_batch <= LARGEST_BATCH:
        raise DexportError(f"the largest batch is {max_batch}; it must be 1 to {LARGEST_BATCH}")
    compiler = _compiler(target)
    if not compiler.computes_in_fp16(target, precision):
        islands = frozenset()
    if cache is None:
        return compiler.build(source, graph, output, target, precision, max_batch, progress, islands)
    key = compile_cache.key(source, graph, str(target), precision, max_batch, compiler.depends_on(target), islands)
    found = compile_cache.fetch(cache, key, output)
    if found is not None:
        return found
    built = compiler.build(source, graph, output, target, precision, max_batch, progress, islands)
    compile_cache.store(cache, key, output, built)
    return built


def _compiler(target: Target) -> Compiler:
    module: Any = importlib.import_module(f"exporter.compile.{target.backend}")
    return module  # type: ignore[no-any-return]
