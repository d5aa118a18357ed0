"""The hub to OpenVINO's IR, through OpenVINO's own ONNX reader.

The IR keeps the batch free; the session makes the shapes static. Weights are stored in fp32 or fp16, and what is
computed in is the runtime's choice unless it is told: the hint in the graph's properties tells it.

The sines of the timestep, and of other inputs of plain numbers such as a distilled guidance or a size in pixels, must
stay in float32 whatever the hint. bf16 has 8 bits: 999 becomes 1000, and the sine of a phase that is off by one is any
number. Under the hint bf16 a small UNet's output at t = 999 was 4.4 % off so, and is 0.9 % off now; at t = 1 it is
0.7 % both times. OpenVINO has an attribute for this on each operation of the IR, ``DisablePrecisionConversion``. Its
Python interface cannot set it, so it is written into the file. An Unsqueeze loses it on the way (it becomes a Reshape
without its attributes), so one that makes a column of such numbers is made a Reshape here; a division or subtraction
loses it too, and so do products that are made one. The frequencies that these
numbers are multiplied with must be float32 as well, and OpenVINO stores all weights in fp16 or none, so theirs are
written anew: with frequencies in fp16 a small Flux was 20 dB from float32, with these 44.

Where values go beyond fp16 (islands) the same attribute keeps them in float32 under the hint f16. OpenVINO's reader
makes several operations of one ONNX node and names them as it likes, but its tensors keep the names of ONNX's values: a
node's operations are those between its inputs and its outputs. Convolutions, MatMuls and what is element by element
keep the attribute (under the hint bf16 on a CPU, where it can be run: 13 times nearer to float32). An operation that
OpenVINO itself replaces loses it, on a CPU a GroupNormalization; what a GPU replaces has not been seen.
"""

from __future__ import annotations

import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from calibration.graph import add_node, add_weight, drop_unused, replace_value
from calibration.precision import LIMITS, NUMBERS, beyond
from calibration.weights import DYNAMIC as NOTE
from calibration.weights import GROUP, NARROW, SMALLEST, group_of, narrow
from runtimes.backends.openvino import GROUP_SIZE, HINT, load, version
from runtimes.errors import BackendError, DexportError, Progress
from runtimes.manifest import Graph
from runtimes.session import require
from runtimes.target import Target

WHY = "OpenVINO computes in fp32, fp16, bf16 and whole numbers of 8 bits"
WEIGHTS = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "int8": "fp16", "w8": "fp32", "w4": "fp32"}
"""What weights are stored in that are not narrower already; bf16 would lose three bits that fp16 keeps."""
DYNAMIC = ("cpu",)  # linear layers of narrow weights round activations themselves; not run on GPU and NPU
SCORES = ("cpu",)  # not run on GPU and NPU
EXACT = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}  # as OpenVINO itself writes it
COMPRESSED = "_compressed"  # ends the name of a constant that OpenVINO stored in fp16; what widens it has its old name
ALIGNED = 64  # bytes
LEAST = float(np.finfo(np.float32).min)
SIGNIFICANT = ("MatMul", "Convolution")  # what the lower precision is for; the timestep's sines end before
HINTS = {
    # No CPU of today computes in f16 faster than in f32.
    "cpu": {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16", "w8": "f32", "w4": "f32"},
    "gpu": {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f16", "w8": "f16", "w4": "f16"},
    "npu": {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f16", "w8": "f16", "w4": "f16"},
}


def precisions(target: Target) -> tuple[str, ...]:
    """All that the IR and the hint can say, on any device."""
    return ("fp32", "fp16", "bf16", *NARROW, "int8")


def computes_in_fp16(target: Target, precision: str) -> bool:
    """Where the hint says f16: not on a CPU."""
    return HINTS[target.device][precision] == "f16"


def check(target: Target) -> None:
    """OpenVINO compiles for every device on any machine."""
    require("openvino")


def depends_on(target: Target) -> str:
    """OpenVINO's version: the IR is written by it, and is the same whatever the device."""
    return f"openvino {version()}"


def alternatives(graph: Graph, target: Target, precision: str) -> tuple[Graph, ...]:
    """What is beside 8 bits in f32: on some CPUs that is faster than bf16, by a third on one that has no AMX."""
    if precision == "int8" and target.device == "cpu" and graph.properties[HINT] != "f32":
        return (replace(graph, properties={**graph.properties, HINT: "f32"}),)
    return ()


def build(
    source: Path, graph: Graph, output: Path, target: Target, precision: str, max_batch: int, progress: Progress,
    islands: Collection[str] = frozenset(),
) -> Graph:  # fmt: skip
    """Write model.xml and model.bin; the same input gives the same bytes. See exporter.compile.compile_graph."""
    check(target)
    ov = load()
    progress(f"{graph.kind}: reading into OpenVINO", 0.0)
    # The narrow graph is written on the disk that the IR goes to, which is as large.
    with tempfile.TemporaryDirectory(prefix=".narrow-", dir=output.parent) as folder:
        try:
            model = ov.Core().read_model(_narrowed(source, Path(folder), graph, precision))
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            raise BackendError.of(f"{graph.kind}: OpenVINO cannot read this graph", said) from error
        _write(ov, model, graph, output, precision, progress, _ends(source, islands))
    properties = {HINT: HINTS[target.device][precision], "weights": WEIGHTS[precision]}
    if precision in NARROW and target.device == "cpu":
        # Activations are rounded to 8 bits in these groups, its fast kernels; or not at all.
        properties[GROUP_SIZE] = "0" if group_of(graph.kind, precision) else str(GROUP)
    elif (group := ir.load(source).metadata_props.get(NOTE)) is not None:
        properties |= {HINT: "f32", GROUP_SIZE: group}  # under bf16 it would not round activations
    return replace(graph, file=f"{output.name}/model.xml", properties=properties)


def _narrowed(source: Path, folder: Path, graph: Graph, precision: str) -> Path:
    """The graph with narrow weights, in ``folder``; ``source`` itself where OpenVINO can make them so."""
    if precision in NARROW:
        model, _ = narrow(ir.load(source), NARROW[precision], group_of(graph.kind, precision))
    elif precision == "int8" and WEIGHTS[precision] == "fp16":
        model, _ = store_in_fp16(ir.load(source))
    else:
        return source
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    return folder / "model.onnx"


def store_in_fp16(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store the large float weights in fp16, each with a Cast behind it, as OpenVINO's own compression does.

    That leaves a model alone in which anything is narrower already: of a quantized one all that stays in floating point
    would be stored in fp32. A weight that fp16 cannot hold stays as it is.
    """
    modified = False
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST or value.is_graph_output():
            continue
        readers = [use.node for use in value.uses()]
        scales = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in readers)
        if not readers or scales or beyond(tensor, LIMITS["fp16"]) is not None:
            continue
        half = add_weight(
            model.graph, f"{name}_fp16", tensor, lambda wide: wide.astype(np.float16), ir.DataType.FLOAT16
        )
        to = [ir.AttrInt64("to", ir.DataType.FLOAT.value)]
        first = next(node for node in model.graph if node in set(readers))
        wide = add_node(first, "Cast", [half], f"{name}_wide", ir.DataType.FLOAT, to, shape=value.shape)
        replace_value(value, wide)
        drop_unused(value)
        modified = True
    return model, modified


def _ends(source: Path, islands: Collection[str]) -> list[tuple[set[str], set[str]]]:
    """The names of the inputs and of the outputs of each node in ``islands``."""
    nodes = [node for node in ir.load(source).graph if node.name in islands] if islands else []
    if lost := sorted(set(islands) - {str(node.name) for node in nodes}):
        raise DexportError(f"there is no node {lost[0]!r} to keep in float32; find the islands of this very graph")
    return [(_names(node.inputs), _names(node.outputs)) for node in nodes]


def _names(values: Sequence[ir.Value | None]) -> set[str]:
    return {str(value.name) for value in values if value is not None}


def _write(
    ov: Any, model: Any, graph: Graph, output: Path, precision: str, progress: Progress,
    islands: Collection[tuple[set[str], set[str]]],
) -> None:  # fmt: skip
    _reshape_columns(ov, model)
    _hold_numbers(ov, model)
    _split_first(ov, model)
    if precision == "int8":
        _hold_scales(ov, model)
    _name_by_place(model)
    kept = _between(model, islands) | _wrong_in_bf16(model)
    progress(f"{graph.kind}: writing the IR", 0.5)
    ov.save_model(model, output / "model.xml", compress_to_fp16=WEIGHTS[precision] == "fp16")
    if kept or any(tensor.name in NUMBERS for tensor in graph.inputs):
        _keep_exact(model, output / "model.xml", kept)


def _between(model: Any, islands: Collection[tuple[set[str], set[str]]]) -> set[str]:
    """The operations, by name, between the inputs and the outputs of each ONNX node."""
    made = {name: output for operation in model.get_ordered_ops() for output in operation.outputs()
            for name in output.get_names()}  # fmt: skip
    kept: set[str] = set()
    for inputs, outputs in islands:
        if lost := sorted(outputs - set(made)):
            raise DexportError(f"{lost[0]!r} must stay float32, and OpenVINO's graph has no such tensor; use fp32")
        waiting = [made[name] for name in outputs]
        while waiting:
            operation = waiting.pop().get_node()
            if operation.get_friendly_name() not in kept:
                kept.add(operation.get_friendly_name())
                sources = operation.input_values()
                waiting += [value for value in sources if not inputs & set(value.get_names())]
    return kept


def _wrong_in_bf16(model: Any) -> set[str]:
    """Convolutions over frames that pad them, of an odd number of channels, by name.

    OpenVINO 2026.4.1 computes them wrong in bf16 on a CPU that has AMX: what comes out has nothing of what is right.
    The first layer of Qwen-Image's encoder is one.
    """
    found = set()
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "Convolution" and operation.get_output_partial_shape(0).rank == 5:
            pads = operation.get_attributes()
            if (pads["pads_begin"][0] or pads["pads_end"][0]) and operation.input_value(1).get_shape()[1] % 2:
                found.add(operation.get_friendly_name())
    return found


def _name_by_place(model: Any) -> None:
    """Name each operation after its place, whatever its name was; parameters, results and tensors keep theirs.

    OpenVINO numbers operations by a counter of the process, ``Reshape_547``, and ends a name that is taken with
    ``_1``. A hub's own names can meet that counter anywhere, so two conversions would differ. These never do.
    """
    for index, operation in enumerate(model.get_ordered_ops()):
        if operation.get_type_name() not in ("Parameter", "Result"):
            operation.set_friendly_name(f"{operation.get_type_name()}_at_{index}")


def _reshape_columns(ov: Any, model: Any) -> None:
    """Replace Unsqueeze of numbers, [n] to [n,1], by Reshape; see the module's head."""
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Unsqueeze" or operation.output(0).get_element_type() != ov.Type.f32:
            continue
        before, after = (value.get_partial_shape() for value in (operation.input_value(0), operation.output(0)))
        if before.rank == 1 and before[0].is_dynamic and after.rank == 2 and after[0].is_dynamic:
            same_by_one = ov.opset13.constant([0, 1], ov.Type.i64)  # 0: the size of the input's axis
            reshape = ov.opset13.reshape(operation.input_value(0), same_by_one, special_zero=True)
            reshape.set_friendly_name(operation.get_friendly_name())
            operation.output(0).replace(reshape.output(0))


def _hold_numbers(ov: Any, model: Any) -> None:
    """Let sums and products of plain numbers be such that OpenVINO leaves them as they are; see the module's head.

    Differences, and quotients by a constant, become sums and products, each with a maximum behind it, as scales have.
    """
    alone: set[str] = set()
    constant: set[str] = set()
    for operation in model.get_ordered_ops():
        kind, name = operation.get_type_name(), operation.get_name()
        sources = {value.get_node().get_name() for value in operation.input_values()}
        if kind == "Parameter":
            alone |= {name} if operation.get_friendly_name() in NUMBERS else set()
        elif constant.issuperset(sources):
            constant.add(name)
        elif kind not in SIGNIFICANT and (alone | constant).issuperset(sources):
            alone.add(name)
            if kind in ("Add", "Subtract", "Multiply", "Divide") and operation.get_element_type() == ov.Type.f32:
                held = ov.opset13.maximum(_sum_or_product(ov, operation), ov.opset13.constant(LEAST, ov.Type.f32))
                operation.output(0).replace(held.output(0))
                alone.add(held.get_name())


def _sum_or_product(ov: Any, operation: Any) -> Any:
    first, second = operation.input_values()
    kind, number = operation.get_type_name(), second.get_node()
    if kind == "Subtract":
        negative = ov.opset13.multiply(second, ov.opset13.constant(-1, ov.Type.f32))
        return ov.opset13.add(first, ov.opset13.maximum(negative, ov.opset13.constant(LEAST, ov.Type.f32)))
    if kind == "Divide" and number.get_type_name() == "Constant":
        return ov.opset13.multiply(first, ov.opset13.constant(np.float32(1) / number.data, ov.Type.f32))
    make = {"Add": "add", "Multiply": "multiply", "Divide": "divide"}[kind]
    return getattr(ov.opset13, make)(first, second)


def _split_first(ov: Any, model: Any) -> None:
    """Split [batch, 2 C] and then make it [batch, C, 1, 1], not the other way round.

    The scale and shift of a norm that goes by the timestep come out of a Split. Where it feeds them right into the
    norm's arithmetic, OpenVINO 2026.4.1 crashes while it compiles for a CPU with fixed shapes.
    """
    for operation in model.get_ordered_ops():
        before = operation.input_value(0).get_node() if operation.get_type_name() == "Split" else None
        if before is None or before.get_type_name() != "Unsqueeze":
            continue
        axis, added = (value.get_node() for value in (operation.input_value(1), before.input_value(1)))
        flat = before.input_value(0).get_partial_shape().rank == 2
        if not flat or added.get_type_name() != "Constant" or sorted(added.data.flatten().tolist()) != [2, 3]:
            continue
        split = ov.opset13.split(before.input_value(0), axis.output(0), operation.get_output_size())
        for index, output in enumerate(operation.outputs()):
            output.replace(ov.opset13.unsqueeze(split.output(index), added.output(0)).output(0))


def _hold_scales(ov: Any, model: Any) -> None:
    """Put a maximum with the least float32, which changes nothing, before what only appends axes of size 1.

    OpenVINO moves the scales of a quantized layer's channels, [1, 1, C], behind a Reshape. Where that makes
    [B, T, C, 1] of [B, T, C], as with attention heads of one channel, 2026.4.1 takes them for those of the axis T and
    does not compile. It moves nothing behind a maximum.
    """
    for operation in model.get_ordered_ops():
        if operation.get_type_name() not in ("Reshape", "Unsqueeze"):
            continue
        before, after = operation.input_value(0), operation.output(0)
        shapes = [value.get_partial_shape() for value in (before, after)]
        if any(shape.rank.is_dynamic for shape in shapes) or before.get_element_type() != ov.Type.f32:
            continue
        old, new = ([-1 if size.is_dynamic else size.get_length() for size in shape] for shape in shapes)
        added = len(new) - len(old)
        if len(old) > 2 and added > 0 and new[-added - 1 :] == [old[-1], *[1] * added]:
            least = ov.opset13.constant(LEAST, ov.Type.f32)
            operation.input(0).replace_source_output(ov.opset13.maximum(before, least).output(0))


def _keep_exact(model: Any, file: Path, kept: Collection[str]) -> None:
    """Mark operations as not to be made narrower: those of islands, ``kept``, by name, and what is computed from plain
    numbers alone, up to the first MatMul. Constants that the latter take become float32 again, as in ``model``.
    """
    tree = ElementTree.parse(file)
    layers, edges = tree.getroot().find("layers"), tree.getroot().find("edges")
    assert layers is not None and edges is not None
    parents: dict[str | None, list[str | None]] = defaultdict(list)
    for edge in edges:
        parents[edge.get("to-layer")].append(edge.get("from-layer"))
    by_number = {layer.get("id"): layer for layer in layers}
    constant: set[str | None] = set()
    exact: set[str | None] = set()
    narrowed: dict[str, tuple[ElementTree.Element, ElementTree.Element]] = {}  # by name: what widens it, and itself
    for number, layer in by_number.items():  # parents come before their children
        kind, before = layer.get("type"), parents[number]
        if kind == "Parameter":
            if layer.get("name") in NUMBERS:
                exact.add(number)
        elif constant.issuperset(before):
            constant.add(number)
        elif kind not in SIGNIFICANT and (constant | exact).issuperset(before):
            exact.add(number)
            _add_attribute(layer)
            for one in (by_number[one] for one in before if one in constant):
                name, stored = str(one.get("name")), [by_number[each] for each in parents[one.get("id")]]
                if [each.get("name") for each in stored] == [name + COMPRESSED]:
                    narrowed[name] = one, stored[0]
        elif layer.get("name") in kept:
            _add_attribute(layer)
    values = {operation.get_friendly_name(): operation for operation in model.get_ordered_ops()}
    with file.with_suffix(".bin").open("ab") as weights:
        for name, (wider, stored_one) in narrowed.items():
            _widen(wider, stored_one, values[name].data, weights)
    tree.write(file, encoding="utf-8", xml_declaration=True)


def _widen(wider: ElementTree.Element, constant: ElementTree.Element, value: Any, weights: BinaryIO) -> None:
    """Let a constant of fp16, and the Convert that widens it, be of float32, with ``value`` at the end of the file."""
    end = weights.seek(0, os.SEEK_END)
    offset = -(-end // ALIGNED) * ALIGNED
    exact = np.ascontiguousarray(value, np.float32).tobytes()
    weights.write(bytes(offset - end) + exact)
    data = constant.find("data")
    assert data is not None
    data.attrib |= {"element_type": "f32", "offset": str(offset), "size": str(len(exact))}
    for port in (*constant.iter("port"), *wider.iter("port")):
        port.set("precision", "FP32")
    if (notes := wider.find("rt_info")) is not None:
        wider.remove(notes)  # that it undoes a compression


def _add_attribute(layer: ElementTree.Element) -> None:
    notes = layer.find("rt_info")
    if notes is None:
        notes = ElementTree.Element("rt_info")
        layer.insert(1 if layer.find("data") is not None else 0, notes)
    ElementTree.SubElement(notes, "attribute", EXACT)
