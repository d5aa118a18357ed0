"""The little of CUDA that an engine needs: memory on the device, pinned memory on the host, a stream.

It calls the driver (libcuda) through ctypes. The driver is there wherever a GPU can be used at all, so nothing has to
be installed; the `cuda-python` package would bring 40 MB for the same twelve functions, and torch gigabytes.
https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from runtimes.errors import DexportError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: independent of the default stream
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (c_void_p,),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (c_void_p, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
}
"""The functions in use; a device pointer is 64 bits wide whatever the host's pointers are. Each returns a CUresult."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, its compute capability ("sm89"), and the CUDA version of its driver ("13.0")."""

    name: str
    capability: str
    driver: str


@cache
def _library() -> ctypes.CDLL:
    """Load and initialize the driver; OSError where it is not installed."""
    library = ctypes.CDLL(LIBRARY)
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    if code := library.cuInit(0):
        raise OSError(f"cuInit failed: {_reason(library, code)}")
    return library


def _reason(library: ctypes.CDLL, code: int) -> str:
    text = c_char_p()
    library.cuGetErrorString(code, byref(text))
    return text.value.decode() if text.value else f"CUDA error {code}"


def call(name: str, *arguments: Any) -> None:
    """Call a driver function of ``ARGUMENTS``; a DexportError says what failed and why."""
    library = _library()
    if code := getattr(library, name)(*arguments):
        raise DexportError(f"the GPU failed in {name}: {_reason(library, code)}")


def missing() -> str | None:
    """Why no GPU can be used here, in one line, or None."""
    count = c_int()
    try:
        call("cuDeviceGetCount", byref(count))
    except OSError as error:
        return f"no NVIDIA driver can be used here ({error}); install the driver of an NVIDIA GPU"
    return None if count.value else "the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES"


def gpu() -> Gpu:
    """Describe the first GPU; OSError without a driver, DexportError without a GPU."""
    device, major, minor, driver = c_int(), c_int(), c_int(), c_int()
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGet", byref(device), 0)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceGetAttribute", byref(major), MAJOR, device)
    call("cuDeviceGetAttribute", byref(minor), MINOR, device)
    call("cuDriverGetVersion", byref(driver))
    version = f"{driver.value // 1000}.{driver.value % 1000 // 10}"
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", version)


@cache
def _context() -> c_void_p:
    """The first GPU's primary context, which TensorRT's own CUDA calls share. It lives as long as the process."""
    device, context = c_int(), c_void_p()
    call("cuDeviceGet", byref(device), 0)
    call("cuDevicePrimaryCtxRetain", byref(context), device)
    return context


def use() -> None:
    """Make the first GPU's context the current one of this thread."""
    call("cuCtxSetCurrent", _context())


class Stream:
    """A queue of copies and kernels on the GPU; ``close`` frees it."""

    def __init__(self) -> None:
        use()
        self.handle = c_void_p()
        call("cuStreamCreate", byref(self.handle), NON_BLOCKING)

    def wait(self) -> None:
        """Block until everything in the queue is done; raises what failed in it."""
        call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        call("cuStreamDestroy_v2", self.handle)


class Buffer:
    """Memory on the GPU with as much pinned memory on the host beside it: only pinned memory is copied asynchronously.

    It grows when more is asked for and never shrinks; ``address`` may change then. ``close`` frees it.
    """

    def __init__(self) -> None:
        self.size = 0  # bytes
        self.address = 0  # on the device
        self._device, self._host = c_uint64(), c_void_p()

    def reserve(self, size: int) -> None:
        """Hold at least ``size`` bytes; what was in it may be lost. The stream that uses it must be idle."""
        if size <= self.size:
            return
        self.close()
        call("cuMemAlloc_v2", byref(self._device), size)
        self.address = int(self._device.value)
        call("cuMemHostAlloc", byref(self._host), size, 0)
        self.size = size

    def upload(self, value: np.ndarray[Any, Any], stream: Stream) -> None:
        """Queue the copy of an array to the device; it may change as soon as this returns."""
        self._view(value.shape, value.dtype)[...] = value
        call("cuMemcpyHtoDAsync_v2", self._device, self._host, value.nbytes, stream.handle)

    def download(self, shape: tuple[int, ...], dtype: Any, stream: Stream) -> Callable[[], np.ndarray[Any, Any]]:
        """Queue the copy to the host; the function that it returns gives the array, after ``stream.wait()``."""
        view = self._view(shape, np.dtype(dtype))
        call("cuMemcpyDtoHAsync_v2", self._host, self._device, view.nbytes, stream.handle)
        return view.copy

    def _view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        size = int(np.prod(shape)) * dtype.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(self._host.value or 0))
        return np.frombuffer(memory.cast("B"), dtype).reshape(shape)

    def close(self) -> None:
        """Free both; safe to call twice, and after a failure half way."""
        device, host = self._device.value, self._host.value
        self._device, self._host, self.size, self.address = c_uint64(), c_void_p(), 0, 0
        if device:
            call("cuMemFree_v2", device)
        if host:
            call("cuMemFreeHost", host)
