"""TensorRT and TensorRT-RTX: an engine on the first NVIDIA GPU, without torch.

Both have one interface under two import names. An engine runs only in the one that built it, so the bundle says which
(``runtime`` in the graph's properties); ``dexport build`` takes the first that is installed.
"""

from __future__ import annotations

import importlib
import secrets
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import cuda
from runtimes.errors import BackendError, DexportError
from runtimes.manifest import Graph
from runtimes.session import Array, Device, check_inputs

EXTRA = "tensorrt-rtx"
FLAVOURS = ("tensorrt", "tensorrt_rtx")
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
OLDEST_BF16 = 80  # Ampere: the first compute capability with bf16 arithmetic
OLDEST_FP8 = 89  # Ada: the first with fp8 in its tensor cores


def flavour(name: str | None = None) -> Any:
    """Import TensorRT: the flavour of this name, or else the first that is installed; None where there is none."""
    for candidate in (name,) if name else FLAVOURS:
        try:
            return importlib.import_module(candidate)
        except (ImportError, OSError):  # OSError: the module is there, a library that it loads is not
            continue
    return None


def version() -> str | None:
    """The installed flavour and its version, e.g. "tensorrt_rtx 1.7.1.116", or None."""
    found = flavour()
    return f"{found.__name__} {found.__version__}" if found else None


def devices() -> list[Device]:
    """The first GPU, named by its compute capability ("sm89"); none without TensorRT, a driver and a GPU."""
    if missing():
        return []
    gpu = cuda.gpu()
    return [Device(gpu.capability, f"{gpu.name}, CUDA {gpu.driver}", precisions(gpu.capability))]


def precisions(capability: str) -> tuple[str, ...]:
    """What a GPU of this compute capability ("sm89") computes in."""
    return ("fp32", "fp16", "bf16") if int(capability[2:]) >= OLDEST_BF16 else ("fp32", "fp16")


def has_fp8(capability: str) -> bool:
    """Whether a GPU of this compute capability multiplies 8-bit floats."""
    return int(capability[2:]) >= OLDEST_FP8


def missing() -> str | None:
    """Why nothing can run here, in one line, or None."""
    if flavour() is None:
        return f"TensorRT is not installed; run: pip install 'dexport[{EXTRA}]'"
    return cuda.missing()


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors instead of printing them: ``logger.errors`` is a list of their texts.

    TensorRT returns None or False where it fails; what went wrong it says only here.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # its class is only known once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def cause(self) -> str:
            """The first error: the later ones follow from it."""
            return self.errors[0] if self.errors else "no reason given"

    return Logger()


def open(file: Path, graph: Graph, device: str, threads: int | None, cache: Path | None) -> TensorRtSession:
    """Open a model.engine. ``cache``: TensorRT-RTX keeps the kernels there that it compiles on this GPU."""
    return TensorRtSession(file, graph, device, cache)


class TensorRtSession:
    """An engine with its buffers and its stream. Copies and kernels are queued; one wait a call, at its end."""

    def __init__(self, file: Path, graph: Graph, device: str, cache: Path | None) -> None:
        self._graph = graph
        self.max_batch: int | None = int(graph.properties["max_batch"]) if "max_batch" in graph.properties else None
        trt = _installed(file, graph)
        _check_gpu(file, graph, device)
        cuda.use()
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise DexportError(f"{file}: TensorRT cannot open this engine: {self._logger.cause()}; build it anew")
        self._check_tensors(file, trt)
        self._cache = _KernelCache(self._engine, cache, file) if trt.__name__ == "tensorrt_rtx" else None
        self._context = self._create_context()
        if self._context is None:
            raise DexportError(f"{file}: TensorRT cannot start this engine: {self._logger.cause()}")
        self._stream = cuda.Stream()
        self._buffers = {tensor.name: cuda.Buffer() for tensor in (*graph.inputs, *graph.outputs)}
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the last call's inputs
        weakref.finalize(self, _free, self._stream, list(self._buffers.values()))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine; see runtimes.session.Session."""
        check_inputs(self._graph, inputs)
        batch = len(next(iter(inputs.values())))
        if self.max_batch and batch > self.max_batch:
            raise DexportError(f"{self._graph.kind}: a batch of {batch}; this engine was built for {self.max_batch}")
        cuda.use()
        self._logger.errors.clear()
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        new = shapes != self._shapes
        if new:
            self._reserve(shapes)
        for name, value in inputs.items():
            self._buffers[name].upload(value, self._stream)
        if not self._context.execute_async_v3(self._stream.handle.value):
            raise BackendError.of(f"{self._graph.kind}: TensorRT failed", self._logger.cause())
        arrays = {
            tensor.name: self._buffers[tensor.name].download(
                tuple(self._context.get_tensor_shape(tensor.name)), tensor.dtype, self._stream
            )
            for tensor in self._graph.outputs
        }
        self._stream.wait()
        if new and self._cache:
            self._cache.save()
        return {name: copy() for name, copy in arrays.items()}

    def _reserve(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell the engine the inputs' shapes, and give each tensor a buffer of its size."""
        self._shapes = None  # until all of this has gone well
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DexportError(
                    f"{self._graph.kind}: this engine was not built for {name!r} of shape {list(shape)}: "
                    f"{self._logger.cause()}; build it with a larger --max-batch"
                )
        if unknown := self._context.infer_shapes():
            raise DexportError(f"{self._graph.kind}: TensorRT needs a shape for {unknown[0]!r}; build the engine anew")
        for tensor in (*self._graph.inputs, *self._graph.outputs):
            buffer = self._buffers[tensor.name]
            elements = int(np.prod(tuple(self._context.get_tensor_shape(tensor.name))))
            buffer.reserve(elements * np.dtype(tensor.dtype).itemsize)
            if not self._context.set_tensor_address(tensor.name, buffer.address):
                raise DexportError(f"{self._graph.kind}: TensorRT takes no buffer for {tensor.name!r}")
        self._shapes = shapes

    def _create_context(self) -> Any:
        if self._cache:
            return self._engine.create_execution_context(runtime_config=self._cache.config)
        return self._engine.create_execution_context()

    def _check_tensors(self, file: Path, trt: Any) -> None:
        """The engine's inputs and outputs must be those of the manifest: the buffers are made after the manifest."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        known = {tensor.name: np.dtype(tensor.dtype) for tensor in (*self._graph.inputs, *self._graph.outputs)}
        real = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        if real != known:
            raise DexportError(f"{file}: the engine's tensors {real} are not the manifest's {known}; build it anew")


class _KernelCache:
    """TensorRT-RTX's runtime cache: kernels compiled on this GPU for the shapes in use, kept in a file."""

    def __init__(self, engine: Any, folder: Path | None, file: Path) -> None:
        trt = importlib.import_module("tensorrt_rtx")
        self.config = engine.create_runtime_config()
        # Kernels made for the shapes before the first call, not during it: the lazy way changes kernels between calls,
        # and with them the bytes of the result.
        self.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = self.config.create_runtime_cache()
        self._file = folder / f"{file.parent.name}.{file.stem}.kernels" if folder else None
        self._size = 0
        if self._file and self._file.is_file():
            # False for another GPU, driver or version: then the kernels are compiled again and the file replaced.
            self._cache.deserialize(self._file.read_bytes())
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache beside its file and rename, if it has grown."""
        if self._file is None:
            return
        data = memoryview(self._cache.serialize())
        if data.nbytes == self._size:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f".{self._file.name}.{secrets.token_hex(4)}")
        partial.write_bytes(data)
        partial.replace(self._file)
        self._size = data.nbytes


def _installed(file: Path, graph: Graph) -> Any:
    """The flavour that built the engine, in the version that built it."""
    name, built = graph.properties.get("runtime"), graph.properties.get("version")
    if name is not None and name not in FLAVOURS:
        raise DexportError(f"{file}: built with {name!r}, which is none of {', '.join(FLAVOURS)}")
    trt = flavour(name)
    if trt is None:
        extra = EXTRAS[name] if name else EXTRA
        raise DexportError(f"{file}: needs {name or 'TensorRT'}; run: pip install 'dexport[{extra}]'")
    if built and built != trt.__version__:
        raise DexportError(
            f"{file}: built with {trt.__name__} {built}, and {trt.__version__} is installed; an engine runs only in "
            f"the version that built it: build it anew, or install {built}"
        )
    return trt


def _check_gpu(file: Path, graph: Graph, device: str) -> None:
    if why := cuda.missing():
        raise DexportError(f"{file}: a TensorRT engine needs a GPU: {why}")
    built, here = graph.properties.get("compute_capability", device), cuda.gpu()
    if built not in ("local", here.capability):
        raise DexportError(
            f"{file}: built for {built}, and this GPU ({here.name}) is {here.capability}; "
            f"build it with --target tensorrt or tensorrt:{here.capability}"
        )


def _free(stream: cuda.Stream, buffers: list[cuda.Buffer]) -> None:
    cuda.use()
    for buffer in buffers:
        buffer.close()
    stream.close()
