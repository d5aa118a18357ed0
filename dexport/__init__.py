"""Turn a trained diffusion checkpoint into a bundle that a device can run, checked against the original.

    import dexport

    dexport.build(Path("checkpoint"), Path("bundle"), targets=["openvino"], precisions=["bf16"])
    pipeline = dexport.load("bundle")
    pipeline("red apple").images[0].save("apple.png")

Every name is loaded when it is first used, so that importing dexport costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dexport.plot import plot
    from exporter.build import Built, build
    from exporter.build import compile_hub as compile
    from exporter.ensemble import Origin
    from exporter.hub import export
    from exporter.inspect import inspect
    from exporter.own import OwnModel
    from exporter.quantized import Quantization
    from exporter.quantized import calibrate_hub as calibrate
    from runtimes.bench import bench
    from runtimes.doctor import doctor
    from runtimes.errors import DexportError, GateError, IntegrityError
    from runtimes.hints import Hint
    from runtimes.manifest import Guidance
    from runtimes.pipeline import Pipeline, Result
    from runtimes.request import Request
    from runtimes.samplers.describe import describe as sampler
    from runtimes.verify import verify

    load = Pipeline.load

__version__ = "0.1.0"

__all__ = [
    "Built",
    "DexportError",
    "GateError",
    "Guidance",
    "Hint",
    "IntegrityError",
    "Origin",
    "OwnModel",
    "Pipeline",
    "Quantization",
    "Request",
    "Result",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compile",
    "doctor",
    "export",
    "inspect",
    "load",
    "plot",
    "sampler",
    "verify",
]

_HOMES = {
    "Built": "exporter.build:Built",
    "DexportError": "runtimes.errors:DexportError",
    "GateError": "runtimes.errors:GateError",
    "Guidance": "runtimes.manifest:Guidance",
    "Hint": "runtimes.hints:Hint",
    "IntegrityError": "runtimes.errors:IntegrityError",
    "Origin": "exporter.ensemble:Origin",
    "OwnModel": "exporter.own:OwnModel",
    "Pipeline": "runtimes.pipeline:Pipeline",
    "Quantization": "exporter.quantized:Quantization",
    "Request": "runtimes.request:Request",
    "Result": "runtimes.pipeline:Result",
    "bench": "runtimes.bench:bench",
    "build": "exporter.build:build",
    "calibrate": "exporter.quantized:calibrate_hub",
    "compile": "exporter.build:compile_hub",
    "doctor": "runtimes.doctor:doctor",
    "export": "exporter.hub:export",
    "inspect": "exporter.inspect:inspect",
    "load": "runtimes.pipeline:Pipeline.load",
    "plot": "dexport.plot:plot",
    "sampler": "runtimes.samplers.describe:describe",
    "verify": "runtimes.verify:verify",
}
"""Where each public name lives: module, colon, the way to it inside the module."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dexport' has no attribute {name!r}")
    module, _, path = _HOMES[name].partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
