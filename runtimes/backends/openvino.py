"""OpenVINO on CPU, GPU and NPU: an IR with a free batch, compiled here for each shape that is asked for.

Static shapes are the largest single gain in OpenVINO (1.7 times on SD 1.5's UNet), and the NPU takes nothing else. So
a session compiles for the very shapes that it is called with, and keeps the last two: with and without guidance.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import BackendError, DexportError
from runtimes.manifest import Graph
from runtimes.session import Array, Device, check_inputs

EXTRA = "openvino"
KEPT = 2  # compiled models that a session keeps
HINT = "INFERENCE_PRECISION_HINT"
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
PROPERTIES = (HINT, "EXECUTION_MODE_HINT", GROUP_SIZE)
"""OpenVINO's properties that a bundle may set; the others (paths, plugins) are the device's own business."""
WIDTH = {"bf16": 8, "f16": 11, "f32": 24}  # bits of the significand
VALUES = {HINT: tuple(WIDTH), "EXECUTION_MODE_HINT": ("PERFORMANCE", "ACCURACY")}
NUMBER = re.compile("[0-9]{1,6}")


def load() -> Any:
    """Import OpenVINO without its telemetry, which would phone home on import and write an id to the home folder.

    OpenVINO falls back to a stub of its own where the package openvino_telemetry cannot be imported.
    """
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        import openvino

        return openvino
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None makes the import fail: documented
    try:
        import openvino
    finally:
        del sys.modules["openvino_telemetry"]
    return openvino


def version() -> str | None:
    """The installed OpenVINO's version, or None."""
    try:
        return str(load().__version__)
    except ImportError:
        return None


def devices() -> list[Device]:
    """CPU, GPU and NPU as OpenVINO sees them; of several GPUs the first."""
    if version() is None:
        return []
    core, found = load().Core(), {}
    for name in core.available_devices:
        kind = name.partition(".")[0].lower()
        if kind in ("cpu", "gpu", "npu") and kind not in found:
            able = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
            precisions = ("fp32", "bf16", "fp16") if kind == "cpu" and "BF16" in able else ("fp32", "fp16")
            found[kind] = Device(kind, core.get_property(name, "FULL_DEVICE_NAME").strip(), precisions)
    return list(found.values())


def missing() -> str | None:
    """Why nothing can run here, in one line, or None."""
    if version() is None:
        return f"OpenVINO is not installed; run: pip install 'dexport[{EXTRA}]'"
    return None if devices() else "OpenVINO sees no CPU, GPU or NPU; see its system requirements"


def open(file: Path, graph: Graph, device: str, threads: int | None, cache: Path | None) -> OpenVinoSession:
    """Open a model.xml. ``cache``: OpenVINO keeps compiled models there, which saves start-up time."""
    return OpenVinoSession(file, graph, device, threads, cache)


class OpenVinoSession:
    """A graph in OpenVINO. ``precision`` is what the runtime says that it computes in, once it has compiled."""

    def __init__(self, file: Path, graph: Graph, device: str, threads: int | None, cache: Path | None) -> None:
        self.max_batch: int | None = 1 if device == "npu" else None
        self.precision: str | None = None
        self._graph, self._device = graph, device.upper()
        self._properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", HINT: "f32"}
        # Lower-case properties are dexport's own notes; upper-case ones are OpenVINO's.
        self._properties |= {name: value for name, value in graph.properties.items() if name.isupper()}
        if foreign := set(self._properties) - {"PERFORMANCE_HINT", *PROPERTIES}:
            raise DexportError(f"{file}: the bundle sets {min(foreign)!r}, which is none of {', '.join(PROPERTIES)}")
        for name, value in self._properties.items():
            if value not in VALUES.get(name, (value,)) or (name == GROUP_SIZE and not NUMBER.fullmatch(value)):
                raise DexportError(f"{file}: the bundle sets {name}={value!r:.60}, which this dexport does not know")
        if threads and device == "cpu":
            self._properties["INFERENCE_NUM_THREADS"] = threads
        if cache:
            self._properties["CACHE_DIR"] = str(cache)
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}  # by the inputs' shapes, the last used one last
        self._core = load().Core()
        if not any(name.partition(".")[0] == self._device for name in self._core.available_devices):
            raise DexportError(f"OpenVINO sees no {device} here; it sees {', '.join(self._core.available_devices)}")
        try:
            self._model = self._core.read_model(file)
        except RuntimeError as error:
            raise DexportError(f"{file}: OpenVINO cannot read it: {_cause(error)}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see runtimes.session.Session. A new shape costs a compilation."""
        check_inputs(self._graph, inputs)
        if self.max_batch and len(next(iter(inputs.values()))) > self.max_batch:
            raise DexportError(f"{self._graph.kind}: {self._device} takes a batch of {self.max_batch}")
        request = self._request({name: value.shape for name, value in inputs.items()})
        try:
            request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()}, share_inputs=True)
        except RuntimeError as error:
            raise BackendError.of(f"{self._graph.kind}: OpenVINO failed", _cause(error)) from error
        # A copy, since the next call writes over the request's memory.
        return {tensor.name: np.array(request.get_tensor(tensor.name).data) for tensor in self._graph.outputs}

    def _request(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        key = tuple(shapes[tensor.name] for tensor in self._graph.inputs)
        if key in self._requests:
            self._requests[key] = self._requests.pop(key)  # now the last used
            return self._requests[key]
        while len(self._requests) >= KEPT:  # before the next one is made, so that never more than KEPT hold memory
            del self._requests[next(iter(self._requests))]
        try:
            model = self._model.clone()
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            compiled = self._core.compile_model(model, self._device, self._properties)
        except RuntimeError as error:
            raise BackendError.of(f"{self._graph.kind}: OpenVINO cannot compile it", _cause(error)) from error
        self.precision = str(compiled.get_property(HINT).get_type_name())
        if WIDTH[self.precision] < WIDTH[self._properties[HINT]]:
            raise DexportError(
                f"{self._graph.kind}: asked for {self._properties[HINT]}, but OpenVINO computes in {self.precision} on "
                f"this {self._device}; build a bundle for this device"
            )
        self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


def _cause(error: RuntimeError) -> str:
    """The line of OpenVINO's many that says what happened: the last one that is no stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '", "While "))]
    return (told or lines or [type(error).__name__])[-1]
