"""The public names: there, lazy, and where they say they are."""

from __future__ import annotations

import importlib.metadata

import pytest

import dexport


@pytest.mark.parametrize("name", dexport.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dexport, name) is not None
    assert name in dir(dexport)


def test_names_are_the_library_s_own() -> None:
    from exporter.build import build, compile_hub
    from runtimes.errors import DexportError, GateError
    from runtimes.pipeline import Pipeline

    assert dexport.build is build
    assert dexport.compile is compile_hub
    assert dexport.Pipeline is Pipeline
    assert dexport.load == Pipeline.load
    assert issubclass(dexport.GateError, DexportError) and dexport.GateError is GateError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        dexport.nothing_of_that_name  # noqa: B018  # the access itself is what is tested


def test_every_lazy_name_has_a_type_for_checkers() -> None:
    """What is served lazily and what type checkers are told are two lists; they must be one."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(dexport))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    told |= {target.id for node in block.body if isinstance(node, ast.Assign) for target in node.targets}
    assert told | {"__version__"} == set(dexport.__all__) == set(dexport._HOMES) | {"__version__"}


def test_the_version_is_the_installed_one() -> None:
    assert dexport.__version__ == importlib.metadata.version("dexport")
