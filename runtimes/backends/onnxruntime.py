"""ONNX Runtime on the CPU: the graph as exporter/compile/onnxruntime.py wrote it, in fp32.

Only the CPU provider is used, whatever others a build of the runtime may carry: a bundle's accuracy was proven there.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import BackendError, DexportError
from runtimes.manifest import Graph
from runtimes.session import Array, Device, check_inputs
from runtimes.target import DEVICES

EXTRA = "onnxruntime"
ERRORS_ONLY = 3  # ONNX Runtime's log severities: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal


def version() -> str | None:
    """The installed ONNX Runtime's version, or None."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def devices() -> list[Device]:
    """The CPU. It has no bf16 arithmetic, and fp16 is slower than fp32 there, so fp32 is what it offers."""
    if version() is None:
        return []
    name = "arm64" if platform.machine().lower() in ("arm64", "aarch64") else "cpu"
    return [Device(name, platform.processor() or platform.machine(), ("fp32",))]


def missing() -> str | None:
    """Why nothing can run here, in one line, or None."""
    return None if version() else f"ONNX Runtime is not installed; run: pip install 'dexport[{EXTRA}]'"


def open(file: Path, graph: Graph, device: str, threads: int | None, cache: Path | None) -> OnnxRuntimeSession:
    """Open a model.onnx. ``cache`` is not used: ONNX Runtime compiles nothing that is worth keeping."""
    if device not in DEVICES["onnxruntime"]:
        raise DexportError(f"{file}: ONNX Runtime has no device {device!r} here; it has cpu")
    return OnnxRuntimeSession(file, graph, threads)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime; any batch."""

    max_batch: int | None = None

    def __init__(self, file: Path, graph: Graph, threads: int | None, *, content: bytes | None = None) -> None:
        """``content``: a model in place of ``file``'s own, whose weights lie beside ``file``."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = threads or _default_threads()
        if sums_may_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")
        # A pattern is planned in the first call, and from the second on its memory stands beside what that one took: a
        # large decoder then needs nearly twice as much, for no time gained.
        options.enable_mem_pattern = False
        self._graph = graph
        self._outputs = [tensor.name for tensor in graph.outputs]
        try:
            if content is not None:
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(file.parent)
                )
            self._session: Any = onnxruntime.InferenceSession(content or str(file), options, ["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions have no common base class but this
            raise DexportError(f"{file}: ONNX Runtime cannot open it: {_first_line(error)}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see runtimes.session.Session."""
        check_inputs(self._graph, inputs)
        feed = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            outputs = self._session.run(self._outputs, feed)
        except Exception as error:  # as above
            raise BackendError.of(f"{self._graph.kind}: ONNX Runtime failed", _first_line(error)) from error
        # Copies: the runtime's own arrays lie in the session's memory, and would keep all of it while they live.
        return {name: np.array(output) for name, output in zip(self._outputs, outputs, strict=True)}


def sums_may_overflow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether 8-bit kernels here add pairs of products in 16 bits, which overflow, and others must be taken.

    x86 processors without VNNI do. The others are half as fast (measured where VNNI is), and ONNX Runtime takes them
    whenever it is told to, so it is told only where it must be. ``cpuinfo``: Linux's; elsewhere nothing says what the
    processor has.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = cpuinfo.read_text(encoding="ascii", errors="replace").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def _default_threads() -> int:
    """0 lets the runtime take every physical core; it fails to pin them where the process may use only some."""
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        return len(os.sched_getaffinity(0))
    return 0


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
