"""JSON as RFC 8259 has it, and no more: Python's reader lets NaN, doubled keys and endless nesting pass."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str | bytes, *, finite: bool = True) -> Any:
    """Read JSON; ValueError, saying why, if it is damaged, nested too deep or has a key twice.

    With ``finite``, NaN, Infinity and numbers beyond float64 are errors too. diffusers writes -Infinity into scheduler
    configs, so these are read without.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_unique, **hooks)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def dumps(value: Any) -> str:
    """Write JSON: sorted keys, two spaces, so that equal values give equal bytes. ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands there twice")
    return value
