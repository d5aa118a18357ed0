"""The hub to a TensorRT engine, in the precision that the graph's own types say.

For a named GPU generation (``tensorrt:sm89``) TensorRT-RTX compiles on any machine, with or without a GPU. For the
GPU of this machine (``tensorrt``) the flavour that is installed does, TensorRT first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.precision import cast
from runtimes import cuda
from runtimes.backends.tensorrt import flavour, has_fp8, make_logger, missing
from runtimes.backends.tensorrt import precisions as gpu_precisions
from runtimes.errors import BackendError, DexportError, Progress
from runtimes.manifest import Graph
from runtimes.target import Target

WHY = "its GPU has no kernels for it, or dexport builds no engines so"
DYNAMIC = ()  # its int8 kernels take one scale for an activation, known when the engine is built
SCORES = ()  # its fused attention is of floats
QUANTIZED = ("int8", "fp8")  # layers as the graph's QDQ says; what is beside them is fp16, which a GPU is fast with


def precisions(target: Target) -> tuple[str, ...]:
    """What the target's GPU computes in; for this machine's GPU where none is here, what GPUs of today do."""
    local = target.device == "local"
    if local and missing():
        return ("fp32", "fp16", "bf16", *QUANTIZED)
    gpu = cuda.gpu().capability if local else target.device
    return (*gpu_precisions(gpu), *(precision for precision in QUANTIZED if precision != "fp8" or has_fp8(gpu)))


def computes_in_fp16(target: Target, precision: str) -> bool:
    """In fp16 itself, and beside quantized layers."""
    return precision == "fp16" or precision in QUANTIZED


def check(target: Target) -> None:
    """The flavour that builds for the target must be there, and for this machine's GPU a GPU."""
    _flavour(target)


def depends_on(target: Target) -> str:
    """Flavour, version and GPU: an engine is bound to all three."""
    trt = _flavour(target)
    gpu = f"{cuda.gpu()}" if target.device == "local" else target.device
    return f"{trt.__name__} {trt.__version__} {gpu}"


def alternatives(graph: Graph, target: Target, precision: str) -> tuple[Graph, ...]:
    """None: its files say all."""
    return ()


def build(
    source: Path, graph: Graph, output: Path, target: Target, precision: str, max_batch: int, progress: Progress,
    islands: Collection[str] = frozenset(),
) -> Graph:  # fmt: skip
    """Write model.engine, for batches of 1 to ``max_batch``. See exporter.compile.compile_graph."""
    trt = _flavour(target)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    progress(f"{graph.kind}: reading into TensorRT", 0.0)
    # The cast graph is written on the disk that the engine goes to: it is as large as the weights.
    with tempfile.TemporaryDirectory(prefix=".cast-", dir=output.parent) as folder:
        file = _write_cast(source, Path(folder), precision, islands)
        if not parser.parse_from_file(str(file)):
            raise BackendError.of(f"{graph.kind}: TensorRT cannot read this graph", _parse_error(parser, logger))
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, target)
    config.add_optimization_profile(_profile(builder, graph, max_batch))
    progress(f"{graph.kind}: building the engine", 0.2)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError.of(f"{graph.kind}: TensorRT cannot build an engine for {target}", logger.cause())
    with (output / "model.engine").open("wb") as stream:
        stream.write(engine)
    properties = {
        "runtime": trt.__name__,
        "version": trt.__version__,
        "compute_capability": cuda.gpu().capability if target.device == "local" else target.device,
        "max_batch": str(max_batch),
    }
    return replace(graph, file=f"{output.name}/model.engine", properties=properties)


def _flavour(target: Target) -> Any:
    """The flavour that builds for a target, or a DexportError that says what is missing for it."""
    if target.device != "local":
        trt = flavour("tensorrt_rtx")
        if trt is None:
            raise DexportError(f"{target}: only TensorRT-RTX builds for a GPU that is not here; "
                               "run: pip install 'dexport[tensorrt-rtx]'")  # fmt: skip
        return trt
    if why := missing():
        raise DexportError(f"{target} means this machine's GPU: {why}; or name the GPU's generation: tensorrt:sm89")
    return flavour()


def _strongly_typed(trt: Any) -> int:
    """The flag for a network whose types are law; TensorRT 11 knows no other networks and may lack the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 1 << int(flag) if flag is not None else 0


def _write_cast(source: Path, folder: Path, precision: str, islands: Collection[str]) -> Path:
    """The graph in ``precision`` but for its ``islands``: ``source`` itself for fp32, else a new file."""
    model, modified = cast(ir.load(source), "fp16" if precision in QUANTIZED else precision, islands)
    if not modified:
        return source
    for node in model.graph:
        # TensorRT's parser refuses this attribute: in which precision it does an attention's softmax is its own
        # choice, which no flag of its interface changes.
        if node.op_type == "Attention":
            node.attributes.pop("softmax_precision", None)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def _parse_error(parser: Any, logger: Any) -> str:
    if not parser.num_errors:
        return str(logger.cause())
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()!r}: {' '.join(error.desc().split())}"


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow every attention to become plain operators where no fused kernel has its head size or mask.

    Without leave the build fails there; with it the fused kernels are still taken wherever they exist.
    """
    if not hasattr(trt, "IAttentionBoundaryLayer"):
        return  # older than TensorRT 11: its parser decomposes by itself
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer  # the bindings give the base class, without `attention`
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, target: Target) -> None:
    # TF32 rounds fp32 factors to 10 bits: fp32 is to mean fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if target.device != "local":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.device.upper()), 0)


def _profile(builder: Any, graph: Graph, max_batch: int) -> Any:
    """The shapes that the engine takes: a batch of 1 to ``max_batch``, tuned for the largest.

    Of the graph's own sizes it is tuned for the smallest, which is that of a short prompt.
    """
    limits = {"batch": (1, max_batch), **graph.sizes}
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        if free := [dim for dim in tensor.shape if isinstance(dim, str) and dim not in limits]:
            raise DexportError(
                f"{graph.kind}: {free[0]} of {tensor.name!r} is free, and an engine needs it fixed; export with --shape"
            )
        low, high = (tuple(limits[dim][end] if isinstance(dim, str) else dim for dim in tensor.shape) for end in (0, 1))
        best = tuple(max_batch if dim == "batch" else size for dim, size in zip(tensor.shape, low, strict=True))
        if low != high or "batch" in tensor.shape:
            profile.set_shape(tensor.name, low, best, high)
    return profile
