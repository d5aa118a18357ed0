"""Options that several commands share; those that belong together reach a command as one value."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import dexport
from dexport.group import SamplerName, SchedulerOption, Shape
from runtimes.presets import PRESETS

if TYPE_CHECKING:
    from exporter.ensemble import Origin
    from exporter.quantized import Quantization

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)  # whether it exists, and what it must be, is the library's own check


def together(name: str, make: Callable[..., Any], *options: Callable[[Any], Any]) -> Callable[[F], Any]:
    """A decorator for a command: ``options``, whose values are the arguments of ``make``, become its one ``name``."""
    words = _names(options)

    def decorate(command: F) -> Any:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            own = {word: given.pop(word) for word in words}
            return command(**{name: make(**own)}, **given)

        return functools.reduce(lambda made, option: option(made), reversed(options), call)

    return decorate


def _names(options: Sequence[Callable[[Any], Any]]) -> list[str]:
    """What a command gets their values as."""

    def command() -> None: ...

    for option in options:
        option(command)
    return [option.name for option in command.__click_params__]  # type: ignore[attr-defined]  # where click keeps them


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for machines.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if dexport made it.")
threads_option = click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; all cores if not given.")
config_option = click.option(
    "--config", metavar="NAME|FOLDER",
    help="What a single .safetensors file is, where the file does not say: a name, like stable-diffusion-2-base, or a "
    "diffusers folder, whose weights are left aside.",
)  # fmt: skip
prompts_option = click.option(
    "--prompts", type=FOLDER, help="A UTF-8 file with one prompt a line, like those the model is for. Ours if none."
)
calibration_steps_option = click.option(
    "--calibration-steps", type=click.IntRange(1), help="Steps of the sampler; the model's own by default."
)


scheduler_option = click.option(
    "--scheduler", multiple=True, type=SchedulerOption(), callback=SchedulerOption.together,
    help="An option of the sampler, like timestep_spacing=trailing, or timesteps=999,749,499,249; a wrong name is told "
    "those that there are. May be given several times.",
)  # fmt: skip
preset_option = click.option(
    "--preset", type=click.Choice(list(PRESETS), case_sensitive=False), metavar="NAME",
    help="Sampler, its options, steps and guidance that a distilled model or LoRA was published with, where they are "
    f"not given: {', '.join(PRESETS)}.",
)  # fmt: skip


variant_option = click.option(
    "--variant", metavar="NAME", help="Which weights of folders and repositories are taken, like fp16, where they are."
)


def _origin(checkpoint: Path, **said: Any) -> Origin:
    return dexport.Origin(checkpoint, **said)


prior_option = click.option(
    "--prior", type=FOLDER, help="The prior of a checkpoint that is a decoder alone, like Kandinsky 2.2's."
)

origin_options = together(
    "origin", _origin,
    click.argument("checkpoint", type=FOLDER),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of a CHECKPOINT on the hub."),
    variant_option,
    config_option,
    click.option(
        "--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
        help="Merge a LoRA into the weights, like style.safetensors:0.8. May be given several times.",
    ),
    click.option(
        "--embedding", "embeddings", multiple=True, metavar="FILE[:WORD]",
        help="Add a word of textual inversion, like style.safetensors:<style>. May be given several times.",
    ),
    click.option(
        "--clip-skip", type=click.IntRange(1), default=1, show_default=True,
        help="Layer of the text encoder whose states are used, counted from the last; many fine-tuned models want 2.",
    ),
    click.option(
        "--refiner", type=FOLDER, help="A second checkpoint, which goes on with what the first one draws, like SDXL's."
    ),
    prior_option,
    click.option(
        "--vae", type=FOLDER, metavar="FOLDER|FILE",
        help="An autoencoder in place of the checkpoint's own, or of the one that it lacks.",
    ),
    click.option(
        "--decoder", type=FOLDER, metavar="FOLDER|FILE",
        help="What decodes in place of the autoencoder: a tiny one (TAESD), or a consistency decoder's folder.",
    ),
    click.option(
        "--motion-adapter", type=FOLDER, help="AnimateDiff's, for a Stable Diffusion 1.x or XL that then draws videos."
    ),
    click.option("--frames", type=click.IntRange(1), help="Frames of each video; the model's own number by default."),
    click.option(
        "--sampler", type=SamplerName(), help="Sampler of the main stage, the last one guided; by default its own."
    ),
    scheduler_option,
    preset_option,
    click.option("--steps", type=click.IntRange(1), help="Steps of the main stage where `run` is asked for none."),
    click.option(
        "--guidance", type=click.FloatRange(0, 1000),
        help="Scale of guidance of the main stage, likewise; up to 1 for a model that was distilled to draw without.",
    ),
    click.option(
        "--control", "controls", multiple=True, metavar="[NAME=]FOLDER",
        help="A ControlNet or a T2I-Adapter, steered by the picture NAME of `run --hint`. May be given several times.",
    ),
    click.option(
        "--ip-adapter", "ip_adapters", multiple=True, metavar="[NAME=]FILE",
        help="An IP-Adapter, likewise: its picture stands for words. Needs --image-encoder.",
    ),
    click.option("--image-encoder", type=FOLDER, help="CLIP's image encoder, which an IP-Adapter was trained with."),
    click.option(
        "--long-prompts", type=click.IntRange(1), default=1, show_default=True,
        help="How many times as long as its text encoder takes a prompt may be; what is beyond is cut off.",
    ),
)  # fmt: skip
"""``origin``: the checkpoint, and all that is said of it."""


def _picture(shape: tuple[int, int] | None, dynamic_shape: bool) -> dict[str, Any]:
    if shape and dynamic_shape:
        raise click.UsageError("--shape and --dynamic-shape exclude each other")
    return {"shape": shape, "dynamic_shape": dynamic_shape}


picture_options = together(
    "picture", _picture,
    click.option("--shape", type=Shape(), help="Size of the images in pixels; the checkpoint's own by default."),
    click.option("--dynamic-shape", is_flag=True, help="Leave height and width free; slower on most devices."),
)  # fmt: skip
"""``picture``: arguments of the library that fix or free its size."""


def _quantization(
    budget: str | None, prompts: Path | None, calibration_steps: int | None, statistics: Path | None, observer: str
) -> Quantization | None:
    if (budget, prompts, calibration_steps, statistics, observer) == (None, None, None, None, "mse"):
        return None
    given = {} if budget is None else {"budget": budget}
    return dexport.Quantization(
        **given, prompts=prompts, statistics=statistics, steps=calibration_steps, observer=observer.strip().lower()
    )


quantization_options = together(
    "quantization", _quantization,
    click.option(
        "--budget", help="For int8 and fp8: the least quality, as psnr=DB of the pictures' median. [default: psnr=30]"
    ),
    prompts_option,
    calibration_steps_option,
    click.option(
        "--statistics", type=FOLDER, help="File of an earlier calibration: used if it is there, else written."
    ),
    click.option(
        "--observer", default="mse", show_default=True,
        help="What chooses the range of an activation: mse, percentile, entropy or min-max.",
    ),
)  # fmt: skip
"""``quantization``: what was asked for, or None if nothing was."""


def default_cache() -> Path:
    """The compile cache where none is named: DEXPORT_CACHE, else ``dexport`` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DEXPORT_CACHE") or base / "dexport")


def _compiling(max_batch: int, cache: Path | None, no_cache: bool) -> dict[str, Any]:
    if cache and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other")
    return {"max_batch": max_batch, "cache": None if no_cache else cache or default_cache()}


compile_options = together(
    "compiling", _compiling,
    click.option(
        "--max-batch", type=click.IntRange(1, 4096), default=2, show_default=True,
        help="Largest batch of one call, for engines that must know; guidance takes two for each image.",
    ),
    click.option(
        "--cache", type=FOLDER,
        help="Folder for compiled graphs, safe to delete at any time. [default: $DEXPORT_CACHE or ~/.cache/dexport]",
    ),
    click.option("--no-cache", is_flag=True, help="Compile anew and keep nothing."),
)  # fmt: skip
"""``compiling``: arguments of the library that say how graphs are compiled."""
