"""Small changes of an ONNX graph that all passes here make: constants, lazy weights, nodes in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

Array = NDArray[Any]


def free_name(graph: ir.Graph, name: str) -> str:
    """The name, or the name with a number where the graph has a constant of this name already."""
    free, number = name, 1
    while free in graph.initializers:
        free, number = f"{name}.{number}", number + 1
    return free


def add_constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """A new initializer that holds an array."""
    array = np.asarray(value)
    tensor = ir.tensor(array, name=name)
    made = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    return made


def add_weight(
    graph: ir.Graph, name: str, of: ir.TensorProtocol, change: Callable[[Array], Array],
    dtype: ir.DataType = ir.DataType.FLOAT, shape: Sequence[int] | None = None,
) -> ir.Value:  # fmt: skip
    """A new initializer ``change(of)``, made each time that it is asked for, so that memory does not grow with it.

    dtype, shape: of the result; ``shape`` is that of ``of`` by default.
    """

    def load() -> ir.TensorProtocol:
        changed = np.ascontiguousarray(change(of.numpy()))
        release(of)
        return ir.Tensor(changed, dtype=dtype, name=name)

    sizes = ir.Shape(of.shape.numpy() if shape is None else shape)
    lazy = ir.LazyTensor(load, dtype, sizes, name=name)
    made = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(made)
    return made


def add_node(
    before: ir.Node, operator: str, inputs: Sequence[ir.Value | None], name: str, dtype: Any,
    attributes: Sequence[ir.Attr] = (), *, shape: Any = None, domain: str = "",
) -> ir.Value:  # fmt: skip
    """A new node before the node ``before``; return its only output, which is named ``name``."""
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    assert before.graph is not None
    before.graph.insert_before(
        before, ir.Node(domain, operator, inputs, attributes, outputs=[output], name=f"{operator}_{name}")
    )
    return output


def replace_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Give a node another input; the old one goes too if it was a weight that nothing reads any more."""
    old = node.inputs[index]
    node.replace_input_with(index, value)
    drop_unused(old)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everything read ``new`` in place of ``old``; a graph's output keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_before"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def drop_unused(value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more."""
    graph = value.graph if value is not None else None
    if value is not None and graph is not None and value.is_initializer() and not value.uses():
        del graph.initializers[str(value.name)]


def make_wait(tape: Tape, value: ir.Value, uses: Iterable[Any], reduced: Iterable[ir.Value]) -> None:
    """Make ``uses`` of a value wait for what was ``reduced`` of it, so that it need not live longer.

    ONNX Runtime orders nodes itself. It leaves reductions that nothing waits for to the end, and holds all that they
    read until then. So the other readers get the value through a Reshape, which copies nothing, to its own shape plus
    n − n, where n is a number that all the reductions are needed for.
    """
    least = [tape.op("ReduceMin", [one], {"keepdims": 0}) for one in reduced]
    number = tape.op("Sum", [tape.op("Cast", [one], {"to": ir.DataType.FLOAT.value}) for one in least])
    whole = tape.op("Cast", [number], {"to": ir.DataType.INT64.value})
    same = tape.op("Reshape", [value, tape.op("Add", [tape.op("Shape", [value]), tape.op("Sub", [whole, whole])])])
    same.shape, same.type = value.shape, value.type
    for use in uses:
        use.node.replace_input_with(use.idx, same)


def readers(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that read a value, each as often as it does."""
    return [] if value is None else [use.node for use in value.uses()]


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap an external tensor's file, so that its pages do not count as memory any more; no view may be left."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
