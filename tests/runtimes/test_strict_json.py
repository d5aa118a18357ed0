"""Our JSON reader refuses what RFC 8259 does not have, and writes nothing else."""

from __future__ import annotations

import json
import math

import pytest

from runtimes import strict_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[NaN]", "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ("[1e999]", "1e999 is too large"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("[1,]", "line 1"),
        ("9" * 100_000, "digits"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json.loads(text)


def test_reads_and_writes_as_json_does() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "\n"}}
    assert strict_json.loads(json.dumps(value)) == value
    assert json.loads(strict_json.dumps(value)) == value
    assert strict_json.dumps({"b": 1, "a": 2}) == strict_json.dumps({"a": 2, "b": 1})


def test_infinity_only_where_it_is_asked_for() -> None:
    assert strict_json.loads("[-Infinity, 1e999]", finite=False) == [-math.inf, math.inf]
    with pytest.raises(ValueError, match="twice"):
        strict_json.loads('{"a": 1, "a": 2}', finite=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json.dumps([math.nan])
