"""What this machine can run: its runtimes, their versions, devices and precisions, and what to install for more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from runtimes.session import backend
from runtimes.target import DEVICES

PACKAGES = {
    "text": ("tokenizers",),
    "plot": ("matplotlib",),
    "video": ("av",),
    "hub": ("huggingface_hub",),
    "export": ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnx-ir", "onnxscript", "safetensors"),
}
"""The other extras, with the packages that each brings."""


def doctor() -> dict[str, Any]:
    """Look at this machine and return, ready for JSON::

        {"python", "system", "cores": int,
         "backends": {name: {"extra", "version" or None, "devices": {name: {"description", "precisions"}},
                             "targets": [...], "advice": str or None}},
         "extras": {name: {"packages": {name: version or None}, "advice": str or None}}}

    ``advice`` is what to do where something is missing. No heavy package is imported but the runtimes themselves.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "backends": {name: _backend(name) for name in DEVICES},
        "extras": {name: _extra(name, packages) for name, packages in PACKAGES.items()},
    }


def _backend(name: str) -> dict[str, Any]:
    found = backend(name)
    version = found.version()
    devices = found.devices() if version else []
    return {
        "extra": found.EXTRA,
        "version": version,
        "devices": {d.name: {"description": d.description, "precisions": list(d.precisions)} for d in devices},
        "targets": list(DEVICES[name]),
        "advice": found.missing(),
    }


def _extra(name: str, packages: tuple[str, ...]) -> dict[str, Any]:
    versions = {package: _version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    return {"packages": versions, "advice": f"pip install 'dexport[{name}]'" if missing else None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
