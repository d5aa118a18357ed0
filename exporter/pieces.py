"""Run an exported graph piece by piece with ONNX Runtime: only one piece's weights are in memory, whatever the model.

A graph of the hub is run once, to see that it is what was exported. As a whole it would need its weights in fp32 beside
the runtime's own copies of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LARGEST = 512 << 20  # bytes of a piece's weights, as far as its nodes can be parted
FOLDER = "session.model_external_initializers_file_folder_path"


def run(file: Path, inputs: Mapping[str, Array], largest: int = LARGEST) -> dict[str, Array]:
    """The outputs of an ONNX graph whose weights lie beside it, by name; nodes are run in the file's order."""
    import onnx
    import onnxruntime

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = [value.name for value in graph.output]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    pieces = list(_pieces(graph.node, weights, largest))
    levels = onnxruntime.GraphOptimizationLevel  # more than the basic ones make second copies of weights
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if len(pieces) > 1 else levels.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # a piece runs once
    options.add_session_config_entry(FOLDER, str(file.parent))
    values = dict(inputs)
    for index, nodes in enumerate(pieces):
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input if name}
        later = {name for piece in pieces[index + 1 :] for node in piece for name in node.input}
        kept = [name for name in made if name in later or name in outputs]
        given = {name: values[name] for name in sorted(read - made - weights.keys())}
        part = onnx.helper.make_graph(
            nodes, f"piece_{index}", [_described(name, value) for name, value in given.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in kept],
            [weights[name] for name in sorted(read & weights.keys())],
        )  # fmt: skip
        whole = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values |= dict(zip(kept, session.run(kept, given), strict=True))
        values = {name: value for name, value in values.items() if name in later or name in outputs}
        del session
    return {name: values[name] for name in outputs}


def _pieces(nodes: Sequence[Any], weights: Mapping[str, Any], largest: int) -> Iterator[list[Any]]:
    """The nodes in their order, cut where the weights that they read would be more than ``largest`` bytes."""
    piece: list[Any] = []
    read: set[str] = set()
    size = 0
    for node in nodes:
        new = [name for name in node.input if name in weights and name not in read]
        more = sum(4 * int(np.prod(weights[name].dims)) for name in new)
        if piece and more and size + more > largest:
            yield piece
            piece, read, size = [], set(), 0
            new = [name for name in node.input if name in weights]
            more = sum(4 * int(np.prod(weights[name].dims)) for name in new)
        piece.append(node)
        read |= set(new)
        size += more
    yield piece


def _described(name: str, value: Array) -> Any:
    """An input of a piece, as the value that it is given."""
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)
