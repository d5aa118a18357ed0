"""The errors that users see: one line that says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[[str, float], None]
"""Called as ``progress("denoiser: tracing", 0.25)``: what is being done, and the share of the whole that is done."""


def silent(what: str, share: float) -> None:
    """The default progress: say nothing."""


def with_article(name: str) -> str:
    """A class's name as a sentence has it: "an AutoencoderKL"."""
    return f"an {name}" if name[:1] in "AEIOU" else f"a {name}"


def first_of(names: Iterable[str], shown: int = 3) -> str:
    """The first names in quotes, and how many there are beyond: "'a', 'b', 'c' and 5 more"."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - shown} more" if len(quoted) > shown else ""
    return ", ".join(quoted[:shown]) + more


class DexportError(Exception):
    """Wrong use or wrong input (exit code 2)."""

    exit_code = 2


class GateError(DexportError):
    """A result is outside its accuracy band (exit code 1)."""

    exit_code = 1


class BackendError(DexportError):
    """A runtime fails on a graph that dexport made (exit code 70): a bug of one of the two, and no wrong input."""

    exit_code = 70

    @classmethod
    def of(cls, what: str, cause: str) -> DexportError:
        """The error that says what failed and why; want of memory is no bug, and exits like other wrong use."""
        if any(word in cause.lower() for word in ("alloc", "out of memory")):
            return DexportError(f"{what}: {cause}; ask for less at once, or take a machine with more memory")
        return cls(f"{what}: {cause}; this is a bug, please report it; another precision or target may do meanwhile")


class IntegrityError(DexportError):
    """Bytes on disk are not what their manifest says (exit code 2)."""
