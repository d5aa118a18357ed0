"""A target: the backend and the device that a bundle is for, written ``backend`` or ``backend:device``."""

from __future__ import annotations

from dataclasses import dataclass

from runtimes.errors import DexportError

DEVICES = {
    "onnxruntime": ("cpu", "arm64"),  # arm64: a CPU too, whose 8-bit kernels want signed numbers
    "openvino": ("cpu", "gpu", "npu"),
    "tensorrt": ("local", "sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
}
"""The devices of each backend, the default one first."""


@dataclass(frozen=True)
class Target:
    """``Target.parse("tensorrt:sm89")``; ``str(target)`` gives the same words back."""

    backend: str
    device: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``backend`` or ``backend:device``; errors list what there is."""
        backend, _, device = text.strip().lower().partition(":")
        if backend not in DEVICES:
            raise DexportError(f"no backend {backend!r}; there are {', '.join(DEVICES)}")
        device = device or DEVICES[backend][0]
        if device not in DEVICES[backend]:
            raise DexportError(f"{backend} has no device {device!r}; it has {', '.join(DEVICES[backend])}")
        return cls(backend, device)

    def __str__(self) -> str:
        return self.backend if self.device == DEVICES[self.backend][0] else f"{self.backend}:{self.device}"

    @property
    def folder(self) -> str:
        """The target as a part of a folder's name."""
        return str(self).replace(":", "-")
