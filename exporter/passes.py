"""Passes over a hub graph, each ``model -> (model, modified)``; ``HUB`` is the list that every export goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from exporter.weights import Weight
from runtimes.safetensors import Stored

Pass = Callable[[ir.Model], tuple[ir.Model, bool]]

# Elements. Folding may look at shapes, axes and position ids, never at a weight matrix, and make no large table.
FOLD_INPUT = 1024
FOLD_OUTPUT = 65536
ALMOST_ZERO = 1e-7  # up to a little less (1e-8) the rewriting rules take a number for 0
ROUNDS = 2  # of folding and rewriting: what one leaves the other may use
# onnxscript's own list without its rule that makes Split of Slices, which goes over the whole graph for each node and
# finds none in ours, and without those that multiply weights, for which the matrices would have to be in memory.
RULES = (
    rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule,
    rules.dropout_zero_rule, rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule, rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule,
    rules.min_min_rule, rules.max_max_rule, rules.min_max_rule, rules.max_min_rule,
    rules.successive_relu_rule, rules.successive_clip_rule, rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule, rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule,
    rules.reshape_reshape_rule, rules.flatten_to_reshape_rule, rules.squeeze_reshape_1d_rule,
    rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule,
    rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)  # fmt: skip


def run(model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
    """Run ``passes`` in order."""
    for one in passes:
        model, _ = one(model)
    return model


def strip(model: ir.Model) -> tuple[ir.Model, bool]:
    """Remove what torch notes about itself: stack traces with paths, scopes, version numbers."""
    modified = ClearMetadataAndDocStringPass()(model).modified
    model.producer_name, model.producer_version, model.graph.name = "dexport", None, "graph"
    for value in _values(model):
        modified = modified or bool(value.metadata_props)
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            value.const_value.doc_string = None
    return model, modified


def share_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store a weight once that several parameters take from the same place of the checkpoint."""
    modified = False
    first: dict[tuple[Stored, tuple[int, ...]], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        weight = value.const_value
        if not isinstance(weight, Weight):
            continue
        key = (weight.entry, weight.order)
        kept = first.setdefault(key, value)
        if kept is not value and not value.is_graph_output():
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
            modified = True
    return model, modified


def turn_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store a linear layer's weight as its MatMul takes it, [in, out], instead of turning it at run time.

    Constant folding would do so too, but with all matrices in memory.
    """
    modified = False
    turned: dict[tuple[str | None, tuple[int, ...]], ir.Value] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not isinstance(source.const_value, Weight):
            continue
        order = tuple(node.attributes["perm"].as_ints())
        new = turned.get((source.name, order))
        if new is None:
            weight = source.const_value.transposed(order)
            weight.name = f"{source.name}.transposed"
            new = ir.Value(name=weight.name, shape=weight.shape, type=source.type, const_value=weight)
            model.graph.initializers.add(new)
            turned[source.name, order] = new
        node.outputs[0].replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        modified = True
    return model, modified


def keep_epsilons(model: ir.Model) -> tuple[ir.Model, bool]:
    """Keep a term such as 1e-15, which keeps a division by 0 away: the rules that follow would drop it as 0.

    They look at scalars only, so it becomes a tensor of one axis.
    """
    modified = False
    for node in list(model.graph):
        for index, value in enumerate(node.inputs if node.op_type in ("Add", "Sub") else ()):
            number = ir.convenience.get_const_tensor(value) if value is not None else None
            if number is None or number.shape.rank() or number.dtype != ir.DataType.FLOAT:
                continue
            if 0 < abs(float(number.numpy())) < ALMOST_ZERO:
                term = ir.Value(name=f"{node.name}_epsilon", const_value=ir.tensor(number.numpy().reshape(1)))
                term.shape, term.dtype = ir.Shape([1]), ir.DataType.FLOAT
                model.graph.register_initializer(term)
                node.replace_input_with(index, term)
                modified = True
    return model, modified


def optimize(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fold what depends on constants alone, and rewrite the exporter's clumsy patterns (sequences to Split, ...)."""
    before = [node.op_type for node in model.graph]
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # fewer nodes to match rules with
    InlinePass()(model)
    for _ in range(ROUNDS):
        with np.errstate(divide="ignore", invalid="ignore"):  # T5's positions take a logarithm of 0, and do not use it
            fold_constants_ir(
                model, onnx_shape_inference=True, input_size_limit=FOLD_INPUT, output_size_limit=FOLD_OUTPUT,
                should_fold=_reads_no_matrix,
            )  # fmt: skip
        for one in (RewritePass(RULES), RemoveUnusedNodesPass(), RemoveUnusedFunctionsPass(), RemoveUnusedOpsetsPass()):
            one(model)
    for one in (
        RemoveUnusedNodesPass(), LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(), CommonSubexpressionEliminationPass(), OutputFixPass(), NameFixPass(),
    ):  # fmt: skip
        one(model)
    return model, before != [node.op_type for node in model.graph]


def _reads_no_matrix(node: ir.Node) -> bool | None:
    """False keeps a node unfolded; None leaves it to the size limits, which spare some operators."""
    weights = [value.const_value for value in node.inputs if value is not None]
    return False if any(isinstance(w, Weight) and w.size > FOLD_INPUT for w in weights) else None


def drop_ones(model: ir.Model) -> tuple[ir.Model, bool]:
    """Drop multiplications by a 1 that is spread to the other factor's size, as the unconditional UNet has one.

    It would make the timestep seem to depend on the sample, and what depends on the timestep alone stays exact.
    """
    modified = False
    for node in list(model.graph):
        if node.op_type != "Mul" or node.outputs[0].is_graph_output():
            continue
        for kept, ones in (node.inputs, node.inputs[::-1]):
            if kept is not None and ones is not None and _is_one(ones) and _same_size(kept, ones):
                node.outputs[0].replace_all_uses_with(kept)
                model.graph.remove(node, safe=True)
                modified = True
                break
    return model, modified


def _is_one(value: ir.Value) -> bool:
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Expand" else None
    constant = source.const_value if source is not None else None
    return constant is not None and constant.size == 1 and constant.numpy().item() == 1


def _same_size(one: ir.Value, other: ir.Value) -> bool:
    sizes = [[getattr(size, "value", size) for size in value.shape or ()] for value in (one, other)]
    return bool(sizes[0]) and sizes[0] == sizes[1] and None not in sizes[0]


def spread_masks(model: ir.Model) -> tuple[ir.Model, bool]:
    """Spread a mask that is the same for all queries over them, [B, 1, 1, K] to [B, 1, Q, K].

    ONNX's Attention spreads it by itself; ONNX Runtime's kernel, as of 1.32, takes such a mask for one of one query.
    """
    modified = False
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        query = node.inputs[0]
        shape = mask.shape if mask is not None else None
        if mask is None or shape is None or len(shape) != 4 or shape[2] != 1 or query is None:
            continue
        one = ir.tensor([1], name=f"{node.name}_one")
        ones = ir.Value(name=one.name, shape=ir.Shape([1]), type=ir.TensorType(one.dtype), const_value=one)
        model.graph.initializers.add(ones)
        queries = ir.node("Shape", [query], {"start": 2, "end": 3})
        sizes = ir.node("Concat", [ones, ones, queries.outputs[0], ones], {"axis": 0})
        spread = ir.node("Expand", [mask, sizes.outputs[0]])
        spread.outputs[0].type = mask.type
        for new in (queries, sizes, spread):
            new.outputs[0].name = f"{node.name}_{new.op_type}"
            model.graph.insert_before(node, new)
        node.replace_input_with(3, spread.outputs[0])
        modified = True
    return model, modified


def drop_unused(model: ir.Model) -> tuple[ir.Model, bool]:
    """Remove nodes without a use, and weights such as the encoder's in a decoder's graph."""
    return model, RemoveUnusedNodesPass()(model).modified


def drop_formulas(model: ir.Model) -> tuple[ir.Model, bool]:
    """Drop inner shapes with sizes such as "2*s30 + 2": runtimes infer them, and take two texts for two sizes."""
    named = {size.value for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    named |= {size.value for value in model.graph.outputs for size in value.shape or () if not isinstance(size, int)}
    modified = False
    for node in model.graph:
        for value in node.outputs:
            if any(not isinstance(size, int) and size.value not in named for size in value.shape or ()):
                value.shape, modified = None, True
    return model, modified


def number_names(model: ir.Model) -> tuple[ir.Model, bool]:
    """Name nodes and inner values by their place, so that the same graph has the same names in every process.

    The exporter numbers values over all that it has traced before. Inputs, outputs and weights keep their names.
    """
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    modified = False
    constants = [(n, v) for n, v in model.graph.initializers.items() if not isinstance(v.const_value, Weight)]
    for name, _ in constants:
        del model.graph.initializers[name]
    for index, (name, value) in enumerate(constants):
        value.name = f"constant_{index}"
        model.graph.initializers.add(value)
        modified = modified or name != value.name
    for index, node in enumerate(model.graph):
        name = f"{node.op_type}_{index}"
        modified = modified or node.name != name
        node.name = name
        for position, value in enumerate(node.outputs):
            if id(value) not in kept and value.name:
                value.name = f"{name}_{position}" if len(node.outputs) > 1 else f"{name}_output"
    return model, modified


HUB: tuple[Pass, ...] = (
    share_weights,
    turn_weights,
    drop_unused,
    keep_epsilons,
    optimize,
    drop_ones,
    spread_masks,
    drop_unused,
    drop_formulas,
    strip,
    number_names,
)


def _values(model: ir.Model) -> list[ir.Value]:
    inner = [value for node in model.graph for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *inner]
