"""What all commands share: errors as one line, exit codes, and the types of their options."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from runtimes.errors import DexportError
from runtimes.target import DEVICES, Target

DONE, FAILED_GATE, WRONG_INPUT = 0, 1, 2
LONGEST = 500  # characters of an error that we do not know
BUG = 70  # EX_SOFTWARE of BSD's sysexits.h
INTERRUPTED, UNREAD = 130, 141  # 128 + the number of SIGINT and of SIGPIPE, as shells have it


class Stopped(SystemExit):
    """A signal asked us to stop; ``code`` is 128 + its number."""


_received: list[int] = []  # the signals that asked us to stop: C++ code may have made another error of the exception


def _terminate(number: int, frame: Any) -> NoReturn:
    """Leave by an exception, so that what is half-written is removed on the way; once, whatever comes meanwhile."""
    signal.signal(number, signal.SIG_IGN)
    _received.append(number)
    raise Stopped(128 + number)


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Leave as Python does, and note why."""
    _received.append(number)
    raise KeyboardInterrupt


def _stop_anyway(unraisable: Any) -> None:
    """A stop that fell into a destructor, which Python reports and goes on: asked for once more, outside of it."""
    if isinstance(unraisable.exc_value, Stopped):
        number = int(unraisable.exc_value.code or 0) - 128
        signal.signal(number, _terminate)
        _send_soon(number)
    elif isinstance(unraisable.exc_value, KeyboardInterrupt):
        _send_soon(signal.SIGINT)
    else:
        sys.__unraisablehook__(unraisable)


def _send_soon(number: int) -> None:
    """Send ourselves a signal from another thread: at once, its exception would fall into this hook, and be ignored."""
    later = threading.Timer(0.05, os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()


def _catch_signals() -> None:
    """Let a stop from outside (a CI job cancelled, a terminal closed) clean up; what nohup ignores stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    _received.clear()
    sys.unraisablehook = _stop_anyway


class Face(click.Group):
    """A group whose every failure is one line on stderr and an exit code that means something."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command line and leave the process. With --json a failure is JSON on stdout too."""
        line, code, stdout = "", DONE, sys.stdout
        streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
        for stream in streams:
            with suppress(AttributeError, OSError):  # none, or not a text file of Python's own
                stream.reconfigure(errors="replace")  # a console without our signs shows a ? for them
        _catch_signals()
        try:
            stopped = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            code = stopped if isinstance(stopped, int) else DONE
        except (click.Abort, KeyboardInterrupt):
            line, code = "interrupted", INTERRUPTED
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()  # the help itself
            code = WRONG_INPUT
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "dexport"
            line, code = f"{error.format_message()} (see: {command} --help)", WRONG_INPUT
        except click.ClickException as error:
            line, code = error.format_message(), WRONG_INPUT
        except DexportError as error:
            line, code = str(error), error.exit_code
        except Stopped as stop:
            code = int(stop.code or 0)
            line = f"stopped by {signal.Signals(code - 128).name}"
        except SystemExit:
            if sys.stdout is stdout:
                raise
            sys.stdout, code = stdout, UNREAD  # click replaces it where who read our output has left
            _silence(stdout)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            line, code = f"{where}{error.strerror or error}", WRONG_INPUT
        except MemoryError:
            line, code = "there is not enough memory for this", WRONG_INPUT
        except Exception as error:
            line, code = _extra(error), WRONG_INPUT
            if not line:
                if not _received:
                    traceback.print_exc()
                line = f"this is a bug of dexport, please report it: {type(error).__name__}: {error!s:.{LONGEST}}"
                code = BUG
        if line and _received:
            number = _received[0]
            line = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            code = 128 + number
        if line:
            line = " ".join(line.split())
            if "--json" in (sys.argv[1:] if args is None else args):
                try:
                    click.echo(json.dumps({"error": line, "exit_code": code}))
                except OSError:
                    _silence(stdout)
            with suppress(OSError):
                click.echo(f"error: {line}", err=True)
        sys.exit(code)


def _silence(stream: Any) -> None:
    """Let what ``stream`` still holds go nowhere, so that the interpreter's last flush does not fail."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _extra(error: Exception) -> str:
    """Say which extra brings the package that is missing; "" for another error, and for one that none brings."""
    from runtimes.doctor import PACKAGES

    if not isinstance(error, ModuleNotFoundError):
        return ""

    for extra, packages in PACKAGES.items():
        for package in packages:
            if (error.name or "").partition(".")[0] == package.replace("-", "_"):
                return f"{package} is not installed; run: pip install 'dexport[{extra}]'"
    return ""


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """Height and width in pixels, written ``512x768``."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read the two numbers."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", str(value))
        if not found:
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, like 512x512", param, ctx)
        return int(found[1]), int(found[2])


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """One number or more with commas between, or just as many as ``exactly`` says."""

    name = "numbers"

    def __init__(self, exactly: int | None = None) -> None:
        """How many there must be; None for any number."""
        self.exactly = exactly

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float for one number, and a tuple of floats for several."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no number, nor numbers with commas between", param, ctx)
        if self.exactly and len(numbers) != self.exactly:
            self.fail(f"{value!r} must be {self.exactly} numbers with a comma between", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


class HintFile(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """A picture that steers, written ``NAME=FILE:SCALE:START,END``; all but the file may be left out."""

    name = "[NAME=]FILE[:SCALE[:INTERVAL]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name, "" if there is none, the file, and what else is said as arguments of ``dexport.Hint``."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(?:([\w-]+)=)?(.+?)(?::(-?[\d.]+)(?::([\d.]+,[\d.]+))?)?", value, re.ASCII)
        try:
            name, file, scale, interval = found.groups() if found else ("", "", None, None)
            how: dict[str, Any] = {} if scale is None else {"scale": float(scale)}
            how |= {} if interval is None else {"interval": tuple(map(float, interval.split(",")))}
        except ValueError:
            file = ""
        if not file:
            self.fail(f"{value!r} is not [NAME=]FILE[:SCALE[:START,END]], like canny=edges.png:0.8:0,0.6", param, ctx)
        return (name or "").lower(), Path(file), how


class ByStage(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """A value, or ``stage=value`` for a stage of a model with several that start from noise."""

    def __init__(self, of: click.ParamType) -> None:  # type: ignore[type-arg]  # as above
        """What kind of value."""
        self.of, self.name = of, f"[stage=]{of.name}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Return the stage's name, "" where there is none, and the value."""
        if isinstance(value, tuple):
            return value
        stage, equals, own = str(value).partition("=")
        return (stage, self.of.convert(own, param, ctx)) if equals else ("", self.of.convert(value, param, ctx))

    @staticmethod
    def together(ctx: click.Context, param: click.Parameter, values: tuple[tuple[str, Any], ...]) -> Any:
        """None for nothing given, one value without a name, or values by stage, "" for the main one."""
        found = dict(values)
        if len(found) < len(values):
            raise click.BadParameter("give it once, or once for each stage, like prior=10", ctx, param)
        return found[""] if set(found) == {""} else found or None


class TargetName(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """A target that ``Target.parse`` knows, with completion; where ``precise``, also ``target=precision``."""

    name = "target"

    def __init__(self, precise: bool = False) -> None:
        """Whether a precision may follow."""
        self.precise = precise

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the target in its shortest form."""
        target, equals, precision = value.partition("=") if self.precise else (value, "", "")
        try:
            return str(Target.parse(target)) + equals + precision
        except DexportError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer every backend with each of its devices."""
        every = [str(Target(backend, device)) for backend, devices in DEVICES.items() for device in devices]
        return [CompletionItem(name) for name in every if name.startswith(incomplete)]


class SchedulerOption(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """An option of a sampler, written ``NAME=VALUE``; which there are is the samplers' own knowledge."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return the name and what follows the first ``=``, as text."""
        if isinstance(value, tuple):
            return value
        name, equals, own = str(value).partition("=")
        if not equals or not name.strip() or not own.strip():
            self.fail(f"{value!r} is not NAME=VALUE, like timestep_spacing=trailing", param, ctx)
        return name.strip(), own

    @staticmethod
    def together(ctx: click.Context, param: click.Parameter, values: tuple[tuple[str, str], ...]) -> dict[str, str]:
        """The options by name."""
        found = dict(values)
        if len(found) < len(values):
            raise click.BadParameter("give each option once", ctx, param)
        return found


class SamplerName(click.ParamType):  # type: ignore[type-arg]  # generic only in later clicks
    """A sampler's name; which there are is the samplers' own knowledge, and theirs the error."""

    name = "sampler"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the samplers by their short names."""
        from runtimes.samplers import NAMES

        return [CompletionItem(name) for name in NAMES if name.startswith(incomplete)]
