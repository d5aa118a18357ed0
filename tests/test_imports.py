"""The direction of imports: dexport -> exporter -> calibration -> runtimes -> numpy, and what each may import when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("dexport", "exporter", "calibration", "runtimes")
"""Each of our packages may import itself and those after it."""

AT_IMPORT = {
    "runtimes": {"numpy", "PIL"},
    "calibration": {"numpy", "onnx", "onnx_ir", "ml_dtypes"},
    "exporter": None,  # the machine that exports has everything
    "dexport": {"click", "rich"},
}
"""What a package may import from outside the standard library when it is imported; None: anything."""

EVER = {
    "runtimes": {"av", "numpy", "PIL", "tokenizers", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"},
    "calibration": {"numpy", "onnx", "onnx_ir", "ml_dtypes"},
    "exporter": None,
    "dexport": {"click", "matplotlib", "rich", "numpy", "PIL"},
}
"""What it may import inside functions as well."""

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt")


def imports(tree: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[tuple[str, int, bool, bool]]:
    """Yield (module, line, inside a function, under TYPE_CHECKING) for each import below ``tree``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, lazy, typing
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, lazy, typing
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for item in node.body:
                yield from imports(ast.Module([item], []), lazy, True)
            for item in node.orelse:
                yield from imports(ast.Module([item], []), lazy, typing)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, inside, typing)


def faults(package: str, source: str, where: str = "file") -> list[str]:
    """What the imports of one module of ``package`` break, as readable lines."""
    found = []
    for module, line, lazy, typing in imports(ast.parse(source)):
        top = module.partition(".")[0]
        if not top:
            found.append(f"{where}:{line}: write the package's name instead of {module!r}")
        elif top in ORDER:
            if ORDER.index(top) < ORDER.index(package):
                found.append(f"{where}:{line}: {package} may not import {top}")
        elif top not in sys.stdlib_module_names:
            allowed = EVER[package] if lazy or typing else AT_IMPORT[package]
            if allowed is not None and top not in allowed:
                found.append(f"{where}:{line}: {package} may not import {top}{'' if lazy else ' at module level'}")
    return found


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules"
    found = [fault for file in files for fault in faults(package, file.read_text(), str(file.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("runtimes", "import exporter.hub"),
        ("runtimes", "def f():\n    from calibration.precision import x"),
        ("runtimes", "import torch"),
        ("runtimes", "def f():\n    import torch"),
        ("runtimes", "import onnxruntime"),
        ("runtimes", "try:\n    import tokenizers\nexcept ImportError:\n    pass"),
        ("runtimes", "class A:\n    import diffusers"),
        ("runtimes", "from . import session"),
        ("calibration", "from exporter import hub"),
        ("exporter", "import dexport"),
        ("dexport", "import torch"),
        ("dexport", "import numpy"),
    ],
)
def test_a_wrong_import_is_found(package: str, source: str) -> None:
    assert len(faults(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("runtimes", "import json\nimport numpy as np\nfrom runtimes.session import Array"),
        ("runtimes", "def f():\n    import onnxruntime"),
        ("dexport", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from exporter.build import build"),
        ("exporter", "import torch\nfrom calibration import precision"),
    ],
)
def test_a_right_import_is_not(package: str, source: str) -> None:
    assert not faults(package, source)


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after running ``code``."""
    code += "\nimport sys\nprint('\\n'.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_dexport_loads_nothing_heavy() -> None:
    loaded = loaded_after("import dexport")
    assert "dexport" in loaded
    assert not loaded & {*HEAVY, "numpy", "PIL", "rich", "click", "exporter", "calibration"}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io\nfrom dexport.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "    try:\n        main(['--help'])\n    except SystemExit as stop:\n        assert stop.code == 0\n"
        "assert 'build' in text.getvalue()"
    )
    loaded = loaded_after(code)
    assert "click" in loaded
    assert not loaded & {*HEAVY, "numpy", "PIL", "rich", "exporter", "calibration"}


def test_the_device_side_loads_where_nothing_else_is_installed() -> None:
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "runtimes").rglob("*.py"))
        if file.name != "__init__.py"
    ]
    blocked = [*HEAVY, "tensorrt_rtx", "tokenizers", "safetensors", "rich", "exporter", "calibration", "dexport"]
    loaded_after(
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {names!r}:\n    importlib.import_module(name)"
    )
