"""Write fp16 or bf16 into an ONNX graph: casts and narrow weights, for runtimes that compute what the types say.

TensorRT's networks are strongly typed: an operator computes in the type of its inputs and nothing is changed behind
one's back. So a precision is a property of the graph, and this pass is where it is decided:

- Inputs and outputs of the graph stay float32, whatever is inside, so every precision has the same interface.
- Norms, softmax, reductions, sines and exponentials stay float32 (``HIGH``): they sum many squares or span many
  magnitudes. ``Attention`` takes narrow inputs and is told to do its softmax in float32.
- What is computed from plain numbers alone (``NUMBERS``: the timestep, a guidance, sizes in pixels) stays float32: it
  is small, and every layer depends on it. Of 1,000 fp16 has no halves left, and sines are made of them. So does what is
  computed from constants alone, such as angles of positions, which costs nothing at run time; and what ends in whole
  numbers or comparisons, such as T5's table of distances: a rounded 7.99 would be another row.
- What the caller names stays float32: the islands where values go beyond fp16 (calibration/overflow.py finds them).
- ``QuantizeLinear`` takes its input as it comes, in float32 too, and ``DequantizeLinear`` gives what its readers want.
- Everything else is narrow, where the operator's ONNX schema allows it. An input whose type the schema fixes
  (``Resize``'s scales) is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from calibration.graph import readers, release
from runtimes.errors import DexportError

NARROW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LIMITS = {"fp16": float(np.finfo(np.float16).max), "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
MASKED = float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)  # from here on down, a mask's "never": -inf, or a type's least
NUMBERS = frozenset({"timestep", "guidance", "time_ids", "resolution"})
"""Inputs of denoisers that are a few numbers a row, of which models make sines."""
CHUNK = 1 << 22  # elements looked at together, so that memory stays flat

HIGH = frozenset({
    "GroupNormalization", "LayerNormalization", "RMSNormalization", "InstanceNormalization",
    "BatchNormalization", "LpNormalization", "MeanVarianceNormalization", "Softmax", "LogSoftmax", "Softplus",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "CumSum", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos",
})  # fmt: skip
TYPED = frozenset({"Cast", "Constant", "ConstantOfShape", "RandomNormal", "RandomUniform", "EyeLike", "Shape", "Size"})
"""Operators whose output type an attribute sets, or none of their inputs."""
QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})


def cast(model: ir.Model, precision: str, keep: Collection[str] = frozenset()) -> tuple[ir.Model, bool]:
    """Make ``model`` compute in ``precision`` ("fp32", "fp16" or "bf16"); return it and whether it was modified.

    ``keep``: names of nodes that compute in float32 all the same, with casts around them. The model is changed in
    place. Narrow weights are lazy: each is read and rounded (to nearest, ties to even) when the model is saved, so
    that memory does not grow with it. Raises DexportError, naming the tensor, for a weight that ``precision`` cannot
    hold, for a graph with branches or loops, and for a name in ``keep`` that no node has.
    """
    if precision == "fp32":
        return model, False
    if precision not in NARROW:
        raise DexportError(f"no precision {precision!r} to cast to; there are fp32, {', '.join(NARROW)}")
    if model.functions:
        InlinePass()(model)
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    if unknown := sorted(set(keep) - {str(node.name) for node in model.graph}):
        raise DexportError(f"there is no node {unknown[0]!r} to keep in float32; find the islands of this very graph")
    _Caster(model, precision, keep).run()
    return model, True


class _Caster:
    """One walk over a graph in its order; ``narrowed`` and ``widened`` hold each value's other form, made once."""

    def __init__(self, model: ir.Model, precision: str, keep: Collection[str]) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports
        self.precision, self.narrow = precision, NARROW[precision]
        self.others: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.high = from_numbers_alone(self.graph) | _from_constants(self.graph) | _to_whole_numbers(self.graph)
        self.kept = {node for node in self.graph if node.name in keep}
        self.high |= self.kept | {node for node in self.graph if node.op_type in HIGH}

    def run(self) -> None:
        for node in list(self.graph):
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise DexportError(
                    f"{node.op_type} {node.name!r} has a branch or a loop; {self.precision} cannot be written"
                )
            if node.op_type not in TYPED:
                self._retype(node)
        for index, output in enumerate(self.graph.outputs):
            if output.dtype == self.narrow:
                self._widen_output(index, output)
        unused = [
            value for value in self.graph.initializers.values() if not value.uses() and not value.is_graph_output()
        ]
        for value in unused:
            del self.graph.initializers[str(value.name)]

    def _retype(self, node: ir.Node) -> None:
        """Give a node's float inputs the one type that it is to compute in, and say so of its outputs."""
        variables = self._variables(node)
        high = node in self.high or not variables or self._is_wide_scale(node)
        wanted = ir.DataType.FLOAT if high else self.narrow
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, self.narrow):
                continue
            fits = high or _formal(self._schema(node).inputs, index).type_str in variables
            target = wanted if fits else ir.DataType.FLOAT
            if value.dtype != target:
                node.replace_input_with(index, self._as(value, target, node))
        for index, output in enumerate(node.outputs):
            if output.dtype == ir.DataType.FLOAT and not high:
                # What is dequantized has its scale's type, by a default that the schema does not tell.
                if (
                    node.op_type == "DequantizeLinear"
                    or _formal(self._schema(node).outputs, index).type_str in variables
                ):
                    output.dtype = self.narrow
            elif output.dtype is None:
                raise DexportError(f"the type of {output.name!r} is unknown; export the graph with its types")
        if node.op_type == "Attention" and not high:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)

    def _is_wide_scale(self, node: ir.Node) -> bool:
        """Whether a node quantizes a float32, or dequantizes for kept nodes alone: both may be beyond the limit."""
        if node.op_type == "QuantizeLinear":
            return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT
        return node.op_type == "DequantizeLinear" and self.kept.issuperset(readers(node.outputs[0]))

    def _variables(self, node: ir.Node) -> set[str]:
        """The schema's type variables that hold a float32 here and may hold the narrow type: "T", "T1", ..."""
        schema = self._schema(node)
        allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
        name = f"tensor({self.narrow.name.lower()})"
        floats = {
            _formal(schema.inputs, index).type_str
            for index, value in enumerate(node.inputs)
            if value is not None and value.dtype in (ir.DataType.FLOAT, self.narrow)
        }
        return {variable for variable in floats if name in allowed.get(variable, ())}

    def _schema(self, node: ir.Node) -> Any:
        try:
            return onnx.defs.get_schema(node.op_type, self.opset[node.domain], node.domain)
        except (onnx.defs.SchemaError, KeyError) as error:
            raise DexportError(
                f"{node.domain}::{node.op_type} {node.name!r} is no ONNX operator; {self.precision} cannot be written"
            ) from error

    def _as(self, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        """The same value in another type: a rounded weight, or a Cast before the first node that needs it."""
        if (value, dtype) in self.others:
            return self.others[value, dtype]
        name = f"{value.name}_{dtype.name.lower()}"
        if value.const_value is not None and value.is_initializer():
            tensor = _narrow_tensor(value.const_value, dtype, name, self.precision)
            other = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=tensor)
            self.graph.register_initializer(other)
        else:
            other = self._cast_before(user, value, dtype, name)
        self.others[value, dtype] = other
        return other

    def _cast_before(self, user: ir.Node, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        other = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], outputs=[other], name=f"cast_{name}")
        self.graph.insert_before(user, node)
        return other

    def _widen_output(self, index: int, output: ir.Value) -> None:
        """Let a graph's output be float32 again under its own name."""
        name = output.name
        output.name = f"{name}_{self.narrow.name.lower()}_output"
        wide = ir.Value(name=name, shape=output.shape, type=ir.TensorType(ir.DataType.FLOAT))
        to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        self.graph.append(ir.Node("", "Cast", [output], [to], outputs=[wide], name=f"cast_{name}"))
        self.graph.outputs[index] = wide


def _formal(parameters: Any, index: int) -> Any:
    """The schema's parameter for the index-th argument; the last one may stand for any number of them."""
    return parameters[min(index, len(parameters) - 1)]


def from_numbers_alone(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose value depends on ``NUMBERS`` and on constants, and on no other input."""
    alone: set[ir.Node] = set()
    constant = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        free = [value for value in inputs if value not in constant]
        if not free:
            constant.update(node.outputs)
        elif all(value.name in NUMBERS if value.is_graph_input() else value.producer() in alone for value in free):
            alone.add(node)
    return alone


def _from_constants(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose value depends on constants alone, but for weights in 8 bits and what is made of them."""
    constant = set(graph.initializers.values())
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type not in QUANTIZING and all(value in constant for value in node.inputs if value is not None):
            constant.update(node.outputs)
            found.add(node)
    return found


def _to_whole_numbers(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of floats that nothing reads but what makes whole numbers or truth values of them."""
    found: set[ir.Node] = set()
    for node in reversed(list(graph)):
        read = [use.node for value in node.outputs for use in value.uses()]
        if not read or any(value.is_graph_output() for value in node.outputs):
            continue
        if all(one in found or _makes_no_float(one) for one in read):
            found.add(node)
    return found


def _makes_no_float(node: ir.Node) -> bool:
    return node.op_type not in QUANTIZING and not any(
        value.dtype is None or value.dtype.is_floating_point() for value in node.outputs
    )


def _narrow_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str, precision: str) -> ir.LazyTensor:
    """A tensor that reads and rounds ``tensor`` each time it is asked for, after a look at its range now."""
    _check_range(tensor, precision)
    kind, limit = dtype.numpy(), LIMITS[precision]

    def load() -> ir.TensorProtocol:
        wide = tensor.numpy()
        value = np.where((wide <= MASKED) & np.isfinite(wide), np.float32(-limit), wide).astype(kind)
        del wide  # a view of the mapped file, which holds it open
        release(tensor)
        return ir.Tensor(value, dtype=dtype, name=name)

    return ir.LazyTensor(load, dtype, ir.Shape(tensor.shape.numpy()), name=name)


def _check_range(tensor: ir.TensorProtocol, precision: str) -> None:
    limit = LIMITS[precision]
    wrong = beyond(tensor, limit)
    if wrong is not None:
        raise DexportError(
            f"weight {tensor.name!r} holds {wrong:g}, and {precision} ends at {limit:g}; use bf16 or fp32"
        )


def beyond(tensor: ir.TensorProtocol, limit: float) -> float | None:
    """The largest finite element of a tensor if it is beyond ``limit``, or None; what is masked does not count."""
    pieces = (piece for piece in _beyond(tensor.numpy().reshape(-1), limit) if piece.size)
    wrong = max((float(piece[np.abs(piece).argmax()]) for piece in pieces), key=abs, default=None)
    del pieces  # a view of the mapped file, which holds it open
    release(tensor)
    return wrong


def _beyond(flat: NDArray[Any], limit: float) -> Iterator[NDArray[Any]]:
    """The finite elements beyond ``limit``, piece by piece."""
    for start in range(0, flat.size, CHUNK):
        piece = flat[start : start + CHUNK]
        yield piece[(np.abs(piece) > limit) & np.isfinite(piece) & (piece > MASKED)]
