"""Options of a scheduler that are asked for by name: as values, or as text that is read as the option's type.

Beside the options of its class a scheduler may be given ``timesteps`` or ``sigmas``, a list in place of its spacing,
where the class takes them (``Sampler.takes``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtimes.errors import DexportError
from runtimes.samplers.sampler import OneOf, Sampler

LISTS = ("timesteps", "sigmas")
UNSET = ("none", "null", "default")  # as text: the class's own default
BOOLS = {"true": True, "false": False}


def read(name: str, sampler: Sampler, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options ``asked`` for of the class ``name``, text among them read; None unsets one.

    Raises DexportError for an option that the class does not have, with those that it has, and for text that says no
    value of it. Whether a value is possible is found with the whole config (``sampler.resolve``).
    """
    if not isinstance(asked, Mapping):
        raise DexportError(f"options of a scheduler are given by name, like timestep_spacing, not as {asked!r:.60}")
    lists = [option for option in LISTS if option in sampler.takes]
    found = {}
    for option, value in asked.items():
        if option in lists:
            found[option] = _numbers(name, option, value)
        elif option in sampler.options:
            found[option] = _value(name, option, sampler.options[option], value)
        else:
            raise DexportError(f"{name} has no option {option!r:.60}; it has {', '.join([*sampler.options, *lists])}")
    if all(found.get(option) is not None for option in LISTS):
        raise DexportError("timesteps and sigmas exclude each other; give one of them")
    return found


def merged(scheduler: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config with ``changes``, which count even where the config calls them unset; None unsets."""
    config = {**scheduler, **changes}
    unset = config.get("_use_default_values")
    if isinstance(unset, list | tuple):
        config["_use_default_values"] = [option for option in unset if option not in changes]
    # One list takes the place of the other.
    others = [option for option in LISTS for other in LISTS if option != other and changes.get(other) is not None]
    return {
        key: value
        for key, value in config.items()
        if not (key in others and key not in changes) and not (key in changes and value is None)
    }


def _value(name: str, option: str, known: Any, value: Any) -> Any:
    """A value; of text, what it says as the option's type. Types of other values are ``resolve``'s to check."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    default, plain = known.default if isinstance(known, OneOf) else known, value.strip().lower()
    if isinstance(known, OneOf):
        choices = {str(choice).lower(): choice for choice in known.choices}
        if plain in choices:
            return choices[plain]
    if plain in UNSET:
        return None
    if isinstance(known, OneOf):
        raise DexportError(f"{name}: {option} is one of {', '.join(map(str, known.choices))}, not {value!r:.60}")
    if isinstance(default, bool):
        if plain not in BOOLS:
            raise DexportError(f"{name}: {option} is true or false, not {value!r:.60}")
        return BOOLS[plain]
    if isinstance(default, str):
        return value.strip()
    try:
        return int(plain) if isinstance(default, int) else float(plain) if isinstance(default, float) else _json(plain)
    except ValueError as error:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise DexportError(f"{name}: {option} must be {kind}, not {value!r:.60}") from error


def _json(text: str) -> Any:
    """What text says of an option whose default has no type: a number, a truth or a list."""
    return json.loads(f"[{text}]" if "," in text and not text.startswith("[") else text)


def _numbers(name: str, option: str, value: Any) -> list[float] | None:
    if isinstance(value, str):
        if value.strip().lower() in UNSET:
            return None
        try:
            value = [float(part) for part in value.strip().strip("[]").split(",")]
        except ValueError:
            value = None
    elif value is None:
        return None
    numbers = isinstance(value, list | tuple) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value
    )
    if not numbers or not value:
        raise DexportError(f"{name}: {option} are numbers with commas between, like 999,749,499,249")
    return [int(number) if float(number).is_integer() else float(number) for number in value]
