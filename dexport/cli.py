"""The ``dexport`` command. Each command reads its words, makes one call into the library and prints what came back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import dexport
from dexport import console, tables
from dexport import output as outputs
from dexport.group import FAILED_GATE, ByStage, Face, HintFile, Numbers, SamplerName, Shape, TargetName
from dexport.options import (
    FOLDER,
    calibration_steps_option,
    compile_options,
    config_option,
    json_option,
    origin_options,
    overwrite_option,
    picture_options,
    preset_option,
    prior_option,
    prompts_option,
    quantization_options,
    scheduler_option,
    threads_option,
    variant_option,
)
from runtimes.errors import DexportError

# For completion alone; what a target can do, and why not, is its compiler's.
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "w8", "w4")


@click.group(cls=Face, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dexport.__version__, prog_name="dexport")
def main() -> None:
    """Turn a trained diffusion checkpoint into a bundle that a device can run.

    A bundle is a folder for one target and precision, proven against the original model.

    \b
    Example:
      dexport build checkpoint --target openvino --precision bf16 -o bundle
      dexport run bundle --prompt "red apple" -o apple.png

    Exit codes: 0 done, 1 failed a gate or a budget, or nothing to prove, 2 wrong use or input, 70 a bug of ours,
    128 + N stopped by signal N.
    """


@main.command()
@origin_options
@click.option(
    "--target", "targets", type=TargetName(precise=True), multiple=True, required=True,
    help="Backend or backend:device, like openvino or tensorrt:sm89; with =PRECISION, in that one alone. "
    "May be given several times.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, default=("fp32",), show_default=True,
    shell_complete=lambda ctx, param, word: [name for name in PRECISIONS if name.startswith(word)],
    help="Precision: fp32, bf16, fp16, int8, fp8; w8 and w4 narrow the weights alone. May be given several times.",
)  # fmt: skip
@click.option("-o", "--output", type=FOLDER, required=True, help="The bundle; with several, a folder of them.")
@picture_options
@quantization_options
@compile_options
@overwrite_option
@click.option("--keep-hub", type=FOLDER, help="Keep the exported ONNX hub here.")
@json_option
def build(
    origin: dexport.Origin,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    output: Path,
    picture: dict[str, Any],
    quantization: dexport.Quantization | None,
    compiling: dict[str, Any],
    overwrite: bool,
    keep_hub: Path | None,
    as_json: bool,
) -> None:
    """Make proven bundles of a CHECKPOINT.

    It is exported to ONNX, compiled for each target and precision, and compared with the torch model. CHECKPOINT is a
    diffusers folder, one .safetensors file, or either on the Hugging Face hub: org/name[/FILE][@REVISION].

    With one target and precision OUTPUT is the bundle; with several, the bundles are OUTPUT/TARGET-PRECISION.
    A bundle that misses its accuracy band or its budget is not written, and the exit code is 1.

    int8 and fp8 are calibrated on PROMPTS, the last quarter of them kept to judge by; blocks that cost too much
    quality for the budget stay in floating point. Where a device computes in fp16, they show what is beyond it.

    \b
    Example:
      dexport build checkpoint --target onnxruntime --target openvino=bf16 -o bundles
      dexport build checkpoint --target openvino --precision int8 --prompts prompts.txt --budget psnr=36 -o bundle
      dexport build sdxl-turbo.safetensors --preset sdxl-turbo --target openvino=bf16 -o bundle
    """
    with console.working() as progress:
        built = dexport.build(
            origin, output, targets=targets, precisions=precisions, **picture, **compiling, overwrite=overwrite,
            keep_hub=keep_hub, quantization=quantization, progress=progress,
        )  # fmt: skip
    tables.notes(built[0].notes)
    if as_json:
        console.print_json({"bundles": built})
    else:
        tables.bundles(built)


@main.command()
@origin_options
@click.option("-o", "--output", type=FOLDER, required=True, help="The hub's folder.")
@picture_options
@overwrite_option
@json_option
def export(origin: dexport.Origin, output: Path, picture: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    """Export a CHECKPOINT to an ONNX hub.

    A hub is a folder with one fp32 graph for each part of the model; every backend reads the same one.

    \b
    Example:
      dexport export checkpoint --shape 512x512 -o hub
    """
    with console.working() as progress:
        model = dexport.export(origin, output, **picture, overwrite=overwrite, progress=progress)
    tables.notes(model.notes)
    if as_json:
        console.print_json({"output": output, "family": model.family, "graphs": model.graphs})
    else:
        tables.graphs(f"{output}: {model.pipeline}", model.graphs)


@main.command()
@click.argument("hub", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The file of statistics, *.safetensors.")
@prompts_option
@calibration_steps_option
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@json_option
def calibrate(
    hub: Path, output: Path, prompts: Path | None, calibration_steps: int | None, overwrite: bool, as_json: bool
) -> None:
    """Observe a HUB's denoiser on real prompts.

    The statistics serve `build` and `compile` with --statistics, for any target, budget and observer. The table says
    which timesteps and prompts the ranges were reached at.

    \b
    Example:
      dexport calibrate hub --prompts prompts.txt -o statistics.safetensors
    """
    with console.working() as progress:
        found = dexport.calibrate(
            hub, output, prompts=prompts, steps=calibration_steps, overwrite=overwrite, progress=progress
        )
    if as_json:
        console.print_json({"output": output, "settings": found.settings, "coverage": tables.covered(found)})
    else:
        tables.coverage(str(output), found)


@main.command("compile")
@click.argument("hub", type=FOLDER)
@click.option(
    "--target", type=TargetName(precise=True), required=True,
    help="Backend or backend:device; with =PRECISION, in that one.",
)  # fmt: skip
@click.option("--precision", default="fp32", show_default=True, help="Precision: fp32, bf16, fp16, int8, fp8, w8, w4.")
@click.option("-o", "--output", type=FOLDER, required=True, help="The bundle.")
@quantization_options
@compile_options
@overwrite_option
@json_option
def compile_(
    hub: Path,
    target: str,
    precision: str,
    output: Path,
    quantization: dexport.Quantization | None,
    compiling: dict[str, Any],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compile a HUB to a bundle.

    Without the checkpoint there is nothing to compare with: the proof is what `build` adds. int8 is judged by the
    hub's own pictures.

    \b
    Example:
      dexport compile hub --target tensorrt:sm89 --precision fp16 -o bundle
    """
    with console.working() as progress:
        manifest = dexport.compile(
            hub, output, target=target, precision=precision, **compiling, overwrite=overwrite,
            quantization=quantization, progress=progress,
        )  # fmt: skip
    if as_json:
        made = {"target": manifest.target, "precision": manifest.precision, "graphs": manifest.model.graphs}
        made["accuracy"] = manifest.accuracy
        console.print_json({"output": output} | made)
    else:
        title = f"{output}: {manifest.target} {manifest.precision}, not proven"
        tables.graphs(title, manifest.model.graphs)
        if "quantization" in manifest.accuracy:
            click.echo(tables.quantization(manifest.accuracy["quantization"]))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--prompt", "prompts", multiple=True, help="What to draw. May be given several times.")
@click.option(
    "--prompts", "prompt_file", type=click.File(encoding="utf-8-sig"), help="A UTF-8 file with one prompt a line."
)
@click.option("--negative-prompt", default="", help="What not to draw.")
@click.option(
    "--prompt-weights/--no-prompt-weights", default=True, show_default=True,
    help="Whether brackets weigh words, as in (apple:1.3); else they are text.",
)  # fmt: skip
@click.option("--class", "labels", multiple=True, help="Class of a model that has some: name or number. Likewise.")
@click.option(
    "--steps", type=ByStage(click.IntRange(1)), multiple=True, callback=ByStage.together,
    help="Steps of the main stage (the last one guided); prior=10 is of another, where a model has several.",
)  # fmt: skip
@click.option(
    "--guidance", type=ByStage(Numbers()), multiple=True, callback=ByStage.together,
    help="How strongly the prompt steers; 1 is not at all, and twice as fast. Several, like 9,5,1, are spread over the "
    "steps. By stage as the steps.",
)  # fmt: skip
@click.option(
    "--guidance-interval",
    type=Numbers(2),
    default=(0.0, 1.0),
    help="The part of the steps that is guided, like 0.2,0.8.",
)
@click.option(
    "--guidance-rescale", type=click.FloatRange(0, 1), default=0.0, help="How far the contrast that guidance adds goes."
)
@click.option(
    "--image", "image_file", type=FOLDER,
    help="Start from this picture instead of noise; what a model for superresolution makes larger.",
)  # fmt: skip
@click.option("--mask", "mask_file", type=FOLDER, help="Paint into --image only where this picture is white.")
@click.option(
    "--strength", type=click.FloatRange(0, 1, min_open=True),
    help="How much of --image may change. [default: the model's own, as in diffusers: 0.3 to 1]",
)  # fmt: skip
@click.option(
    "--hint", "hint_files", type=HintFile(), multiple=True,
    help="A picture that steers: a ControlNet's, an adapter's. NAME may be left out where there is one; SCALE "
    "is how strongly, INTERVAL the part of the steps, like edges.png:0.8:0,0.6. May be given several times.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Image i has SEED + i.")
@click.option(
    "-n", "--images", type=click.IntRange(1), default=1, show_default=True, help="Images for each prompt or class."
)
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Frames a second of a video.")
@click.option("--sampler", type=SamplerName(), help="Another sampler than the checkpoint's, of the main stage.")
@scheduler_option
@preset_option
@click.option("--size", type=Shape(), help="Size of the images, where the bundle is of dynamic shape.")
@click.option(
    "--guidance-batch", type=click.Choice(["batched", "sequential"]), default="batched", show_default=True,
    help="With and without prompt in one call, or in two that need less memory.",
)  # fmt: skip
@threads_option
@click.option("--cache", type=FOLDER, help="Folder for what the runtime compiles when it loads the bundle.")
@click.option(
    "-o", "--output", type=FOLDER,
    help="A .png, of a video a .gif, .mp4 or animated .png (several are numbered), or a folder, which takes a video's "
    "frames; files of the same name are replaced.  [default: image.png or video.gif]",
)  # fmt: skip
@json_option
def run(
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_file: Any,
    image_file: Path | None,
    mask_file: Path | None,
    hint_files: tuple[tuple[str, Path, dict[str, Any]], ...],
    threads: int | None,
    cache: Path | None,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Draw with a BUNDLE: prompts, classes, or, with a model that takes neither, what it was trained on.

    A model of videos draws one in each image's place.

    \b
    Example:
      dexport run bundle --prompt "red apple" --prompt "green apple" --steps 20 --seed 7 -o apples
      dexport run bundle --class "golden retriever" --class 207 -n 4 -o dogs
      dexport run animatediff --prompt "a corgi walking" --fps 12 -o corgi.gif
      dexport run bundle --prompt "a cottage" --hint canny=edges.png:0.8 -o cottage.png
    """
    try:
        lines = [line.strip() for line in prompt_file] if prompt_file else []
    except UnicodeDecodeError as error:
        hint = "--prompts"
        raise click.BadParameter(
            f"{prompt_file.name}: not a text in UTF-8 ({error.reason})", param_hint=hint
        ) from error
    from runtimes.image import open_image

    every = [*prompts, *filter(None, lines)]
    count = max(len(every), len(settings["labels"]), 1)
    settings["image"] = open_image(image_file) if image_file else None
    settings["mask"] = open_image(mask_file) if mask_file else None
    if len({name for name, _, _ in hint_files}) < len(hint_files):
        raise click.UsageError("two pictures of --hint have the same name")
    settings["hints"] = {name: dexport.Hint(open_image(file), **how) for name, file, how in hint_files}
    with console.working() as progress:
        pipeline = dexport.load(bundle, threads=threads, cache=cache)
        files = outputs.files(output, count * settings["images"], videos=pipeline.fps is not None)
        outputs.check(files, pipeline.fps and (settings["fps"] or pipeline.fps))
        result = pipeline(every, progress=progress, **settings)
        outputs.save(result, files)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        console.print_json(outputs.listed(result, files))
    else:
        for file in files:
            click.echo(file)


@main.command()
@click.argument("name", type=SamplerName())
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of the sampler.")
@click.option("--of", "source", type=FOLDER, help="Take the schedule of this checkpoint, hub, bundle or .json.")
@scheduler_option
@click.option("--plot", type=FOLDER, help="Draw noise and timesteps against the steps into this .png, .svg or .pdf.")
@json_option
def sampler(
    name: str, steps: int, source: Path | None, scheduler: dict[str, str], plot: Path | None, as_json: bool
) -> None:
    """Show the table of the sampler NAME.

    NAME is a short name, like dpmpp_2m_karras or "DPM++ 2M Karras", or a class of diffusers. Each row is a call of
    the model: at which timestep, how noisy the sample is there, and what becomes of it. X is the sample, S a saved one,
    M the model's output, H0 to H3 a history, Z fresh noise.

    \b
    Example:
      dexport sampler euler_karras --steps 10 --plot euler.png
    """
    with console.working():
        found = dexport.sampler(name, steps=steps, source=source, scheduler=scheduler)
        if plot:
            dexport.plot(found, plot)
    if as_json:
        console.print_json(found)
    else:
        tables.rows(found)


@main.command()
@click.argument("bundle", type=FOLDER)
@threads_option
@json_option
@click.pass_context
def verify(context: click.Context, bundle: Path, threads: int | None, as_json: bool) -> None:
    """Check a BUNDLE on this machine.

    First every file's hash, then each graph's outputs against those of the torch model that the bundle holds. The exit
    code is 1 if one is outside its accuracy band, or if the bundle holds none to compare with.

    \b
    Example:
      dexport verify bundle && echo as built
    """
    with console.working() as progress:
        checks = dexport.verify(bundle, threads=threads, progress=progress)
    passed = all(check.passed for check in checks) if checks else None
    if as_json:
        every = [{**asdict(check), "passed": check.passed} for check in checks]
        console.print_json({"passed": passed, "checks": every})
    else:
        tables.checks(checks)
    if passed is None:
        click.echo(
            "every hash is right, but nothing is proven: the bundle was compiled from a hub and has no golden outputs "
            "to compare with; make one with: dexport build",
            err=True,
        )
    if not passed:
        context.exit(FAILED_GATE)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each graph.")
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Images made together.")
@threads_option
@json_option
def bench(bundle: Path, repeats: int, images: int, threads: int | None, as_json: bool) -> None:
    """Time a BUNDLE on this machine.

    Each graph alone, a step of the sampler and a whole image; medians.

    \b
    Example:
      dexport bench bundle --images 4 --json
    """
    with console.working() as progress:
        times = dexport.bench(bundle, repeats=repeats, threads=threads, images=images, progress=progress)
    if as_json:
        console.print_json(times)
    else:
        tables.times(times)


@main.command()
@click.argument("path", type=FOLDER)
@config_option
@prior_option
@variant_option
@json_option
def inspect(path: Path, config: str | None, prior: Path | None, variant: str | None, as_json: bool) -> None:
    """Describe a checkpoint, hub or bundle.

    What PATH holds, its sizes, tensors and parameters. Loads no weights and checks no hashes.

    \b
    Example:
      dexport inspect bundle --json
    """
    with console.working():
        found = dexport.inspect(path, config=config, prior=prior, variant=variant)
    if as_json:
        console.print_json(found)
    else:
        tables.outline(found)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run.

    Its runtimes with their versions, devices and precisions, and what to install for more.

    \b
    Example:
      dexport doctor
    """
    with console.working():
        found = dexport.doctor()
    if as_json:
        console.print_json(found)
    else:
        tables.machine(found)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    Example:
      dexport completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise DexportError(f"click knows no completion for {shell}")
    click.echo(found(main, {}, "dexport", "_DEXPORT_COMPLETE").source())
