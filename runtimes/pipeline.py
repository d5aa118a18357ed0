"""From a request to pictures: text, denoising loop, decoder. It knows stages and tensors, no family and no runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memoize
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtimes import (
    bundle,
    cascade,
    conditioning,
    guidance,
    hints,
    inpaint,
    loop,
    presets,
    samplers,
    subject,
    timetable,
    video,
    wording,
)  # fmt: skip
from runtimes.errors import DexportError, Progress, silent
from runtimes.image import to_array, to_images, upright
from runtimes.manifest import Manifest, Model, Stage
from runtimes.prompts import Prompts
from runtimes.request import Request, check, scale, start_rule, strength, unused
from runtimes.request import steps as count_steps
from runtimes.session import Session, require, run_batched
from runtimes.target import Target
from runtimes.video import Video

Array = NDArray[Any]

LONGEST_SIDE = 16384  # pixels; beyond it is a slip of the keyboard


@dataclass(frozen=True)
class Result:
    """Pictures, or videos if the model draws those, with the settings that made each, and warnings to show."""

    images: list[Image.Image]
    settings: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)


class Pipeline:
    """A model whose graphs are opened by ``open_graph(name)`` when they are first needed."""

    def __init__(self, model: Model, folder: Path, open_graph: Callable[[str], Session]) -> None:
        """Take the model's description, the folder of its tokenizer files, and what opens a graph by its name."""
        self.model = model
        self.manifest: Manifest | None = None
        self._open = open_graph
        self.prompts = Prompts(model, folder, open_graph)
        self._main = cascade.main(model.stages)[0]

    @property
    def fps(self) -> float | None:
        """Frames a second of the videos that the model draws; None for one that draws pictures."""
        return self.model.stages[-1].fps

    @classmethod
    def load(
        cls, folder: Path | str, *, threads: int | None = None, cache: Path | None = None, check: bool = True
    ) -> Pipeline:
        """Open a bundle: check its files (unless ``check`` is off), then leave each graph to its first use.

        ``threads``: for the runtime, None for all cores. ``cache``: a folder for what the runtime compiles at load.
        """
        folder = Path(folder)
        if cache is not None and cache.exists() and not cache.is_dir():
            raise DexportError(f"{cache}: the cache must be a folder; name another")
        manifest = bundle.load_manifest(folder, check=check)
        target = Target.parse(manifest.target)
        backend = require(target.backend)
        graphs = manifest.model.graphs

        @memoize
        def open_graph(name: str) -> Session:
            return backend.open(folder / graphs[name].file, graphs[name], target.device, threads, cache)

        pipeline = cls(manifest.model, folder, open_graph)
        pipeline.manifest = manifest
        return pipeline

    def __call__(
        self, prompt: str | Sequence[str] = (), *, preset: str | None = None, progress: Progress = silent,
        **settings: Any,
    ) -> Result:  # fmt: skip
        """Draw; ``settings`` are the fields of ``Request``, ``preset`` a name of those that are not given."""
        if preset is not None:
            settings = presets.settings(preset, settings)
        given: Any = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
            raise DexportError(f"a prompt must be a text, or a list of them, not {prompt!r:.80}")
        request = Request(list(given), **settings)
        if self._main.strength is not None and request.image is None:
            raise DexportError("this model reworks pictures and draws none from noise; give one with --image")
        for step in self.generate(request):
            progress(f"step {step.index + 1}/{step.total}", (step.index + 1) / step.total)
        progress("decoding", 1.0)
        drawn = self.decode(step.sample, request)
        warnings = unused(self.model, request)
        if request.prompts:
            asked = {"prompt": request.prompts, "negative prompt": [request.negative_prompt]}
            steps = self._steps(request, self._main)
            warnings += self.prompts.warnings(asked, steps, weighted=request.prompt_weights)
        settings_ = [{**self._settings(request, i), "size": list(drawn.shape[-2:])} for i in range(len(drawn))]
        if self.fps is None:
            return Result(to_images(drawn), settings_, warnings)
        fps = request.fps or self.fps
        settings_ = [{**one, "frames": drawn.shape[1], "fps": fps} for one in settings_]
        return Result([], settings_, warnings, [Video(to_images(one), fps) for one in drawn])

    def generate(
        self, request: Request, noise: Callable[[], Array] | Sequence[Callable[[], Array]] | None = None
    ) -> Iterator[loop.Step]:
        """Yield each step of the loop; the last one's ``sample`` is what ``decode`` takes.

        ``noise``: draws of [B, C, h, w] standard normals, the start first; by default from the request's seeds. Of a
        model with several ways (runtimes.cascade) a source for each.
        """
        check(self.model, request)
        ways, count, tables = cascade.ways(self.model.stages), subject.count(request), self.tables(request)
        sources = [noise] if callable(noise) else noise
        done, total = 0, sum(len(table.rows) for _, runs in tables for run in runs for _, table in run)
        given: dict[str, cascade.Given] = {}
        for index, (way, (shape, runs)) in enumerate(zip(ways, tables, strict=True)):
            results: list[dict[str, Array]] = []
            seeds = cascade.seeds(request.seed, count, index)
            draw = sources[index] if sources else loop.noise_source(seeds, shape)
            for one, run in zip(cascade.requests(request, way), runs, strict=True):
                for step in self._draw(one, run, (count, *shape), draw, given):
                    yield replace(step, index=done, total=total)
                    done += 1
                if way[-1].gives is not None:
                    results.append(self._made(way[-1], step.sample))
            given |= cascade.given(way[-1], results)

    def tables(self, request: Request) -> list[tuple[tuple[int, ...], list[list[tuple[Stage, samplers.Table]]]]]:
        """For each way of the model (runtimes.cascade), the shape of its samples and its runs.

        A run is the stages that make it, each with its table; there are two where a way draws for the negative prompt
        too.
        """
        return [
            (self.sample_shape(request, way[0]), [self._runs(one, way) for one in cascade.requests(request, way)])
            for way in cascade.ways(self.model.stages)
        ]

    def _draw(
        self, request: Request, runs: list[tuple[Stage, samplers.Table]], shape: tuple[int, ...],
        draw: Callable[[], Array], given: Mapping[str, cascade.Given],
    ) -> Iterator[loop.Step]:  # fmt: skip
        """The steps of one way, whose samples have a ``shape``, one stage after the other."""
        start, known = draw(), None
        if start.shape != shape:
            raise DexportError(f"the start noise has shape {list(start.shape)}, not {list(shape)}")
        begun = self._begun(request) if runs[0][0] in cascade.main(self.model.stages) else None
        mask = None if begun is None else self._kept_mask(request)
        of_picture = request.mask is None or strength(self.model, request) < 1  # else only what the mask leaves is
        if begun is not None and (of_picture or mask is not None):
            (stage, table), *others = runs
            signal, noisy = table.mix
            image = self.encode(to_array(begun, self._pixels(request)))
            if mask is not None:
                known = (np.broadcast_to(image, start.shape), mask, start)
            if of_picture:
                start = signal * image + noisy * start
                runs = [(stage, replace(table, init_scale=1.0)), *others]
        for stage, table in runs:
            for step in loop.sample(table, start, self._denoiser(stage, request, table, given), draw, known):
                yield step
            start = step.sample

    def _begun(self, request: Request) -> Image.Image | None:
        """The picture that the loop starts from; a model that is shown the request's starts from noise."""
        return None if subject.shown(self.model) else request.image

    def _kept_mask(self, request: Request) -> Array | None:
        """What of the sample the loop puts back after each step; nothing where the denoiser itself is told the mask."""
        if request.mask is None or subject.paints(self.model):
            return None
        return inpaint.kept(upright(request.mask, request.image), self._pixels(request), self._main.factor)

    def _runs(self, request: Request, way: cascade.Way) -> list[tuple[Stage, samplers.Table]]:
        """The stages of a way with their tables; they share the steps, and guidance's scales run over all of them.

        A stage that ends before the step which a picture starts at has nothing to do, and is left out.
        """
        stages: list[Stage] = []
        tables: list[samplers.Table] = []
        asked = way == cascade.main(self.model.stages)
        begun = asked and self._begun(request) is not None
        shape, steps, made = self.sample_shape(request, way[0]), count_steps(self.model, request, way), 0
        for stage in way:
            config = dict(stage.scheduler)
            if asked:
                config = samplers.pick(config, request.sampler, request.scheduler, image=begun)
            begin, share = 0, 1.0
            if begun:
                how = start_rule(self.model, request)
                begin, share = timetable.start(how, config, steps, strength(self.model, request))
            if begin >= stage.span[1] * steps:
                continue
            stages.append(stage)
            made = made or steps - begin
            table = timetable.compile_stage(stage, steps, shape, scheduler=config, begin=begin, strength=share)
            tables.append(replace(table, init_scale=1.0) if tables else table)  # what follows takes a sample as it is
        rows = tuple(row for table in tables for row in table.rows)
        rows = wording.plan(rows, wording.requests(request, way[0], steps)[1][:made])
        if request.mask is not None and asked and not subject.paints(self.model):
            rows = inpaint.keep(rows)
        steered = [bool(stage.hints) for stage, table in zip(stages, tables, strict=True) for _ in table.rows]
        if any(steered):
            rows = hints.plan(rows, self.model, request, steered)
        interval = request.guidance_interval if asked else (0.0, 1.0)
        planned = guidance.plan(samplers.Table(rows, 1.0), scale(self.model, request, way), interval)
        guided = iter(planned.rows)
        return [
            (stage, replace(table, rows=tuple(islice(guided, len(table.rows)))))
            for stage, table in zip(stages, tables, strict=True)
        ]

    def _steps(self, request: Request, stage: Stage) -> int:
        """The steps of a stage's way: those asked for, or its own."""
        way = next(way for way in cascade.ways(self.model.stages) if stage in way)
        return count_steps(self.model, request, way)

    def decode(self, sample: Array, request: Request | None = None) -> Array:
        """Turn the loop's last sample into images, float32 [B, 3, H, W] in [0, 1], or videos, [B, F, 3, H, W]."""
        name = self.model.stages[-1].decoder
        latents = np.ascontiguousarray(sample, np.float32)

        def picture(latents: Array) -> Array:
            return latents if name is None else run_batched(self._open(name), {"sample": latents})["image"]

        return _finite(picture(latents) if self.fps is None else video.decode(picture, latents))

    def encode(self, images: Array) -> Array:
        """Turn images, float [B, 3, H, W] in [0, 1], into samples as the loop takes them."""
        name = self._main.encoder
        if name is None:
            raise DexportError("this bundle has no encoder")
        return run_batched(self._open(name), {"image": np.ascontiguousarray(images, np.float32)})["sample"]

    def _made(self, stage: Stage, sample: Array) -> dict[str, Array]:
        """What a stage gives to later ones, by name: its last sample, or what its decoder makes of it."""
        latents = np.ascontiguousarray(sample, np.float32)
        if stage.decoder is None:
            return {str(stage.gives): latents}
        outputs = run_batched(self._open(stage.decoder), {"sample": latents})
        return {name: _finite(value) for name, value in outputs.items()}

    def sample_shape(self, request: Request, stage: Stage | None = None) -> tuple[int, ...]:
        """The shape of one sample, [C, h, w], [C, F, h, w] or [D], that the request asks of a stage, or of the last."""
        last, size, multiple = self.model.stages[-1], request.size, cascade.multiple(self.model)
        stage, fixed = stage or last, None
        if not cascade.is_free(self.model, last):
            fixed = last.sample[-2] * last.factor, last.sample[-1] * last.factor
        if size is None and fixed is None and request.image is not None and subject.shown(self.model):
            height, width = subject.fitting(request.image, last.multiple)
            size = (height * last.factor, width * last.factor)
        if size is None:
            return stage.sample
        if max(size) > LONGEST_SIDE:
            raise DexportError(f"a side of {max(size)} pixels is too long; it may have {LONGEST_SIDE}")
        if fixed and fixed != tuple(size):
            raise DexportError(
                f"this bundle makes images of {fixed[0]}x{fixed[1]} pixels; build one with --dynamic-shape for others"
            )
        if any(side <= 0 or side % multiple for side in size):
            raise DexportError(f"a size must be a multiple of {multiple} pixels; {size} is not")
        if not cascade.is_free(self.model, stage):
            return stage.sample
        return (*stage.sample[:-2], size[0] // stage.factor, size[1] // stage.factor)

    def _pixels(self, request: Request) -> tuple[int, int]:
        """Height and width of the images."""
        factor = self.model.stages[-1].factor
        height, width = self.sample_shape(request)[-2:]
        return height * factor, width * factor

    def _denoiser(
        self, stage: Stage, request: Request, table: samplers.Table, given: Mapping[str, cascade.Given]
    ) -> Callable[[Array, float, samplers.Row], Array]:
        """The model as the loop calls it: with the prompt's conditioning, and guided where the row says so.

        given: what ways before this one made.
        """
        is_guided = stage.guidance.kind == "cfg" and any(row.guidance > 1 for row in table.rows)
        rescale = request.guidance_rescale if stage in cascade.main(self.model.stages) else 0.0
        shown, unshown = hints.encode(
            self.model, stage, request, self._open, self._pixels(request), subject.count(request)
        )
        told, worded = self._told(request), wording.requests(request, stage, self._steps(request, stage))[0]
        inputs = {}  # by the number of the wording: with the prompt, without it, and both
        for number in sorted({row.wording for row in table.rows}):
            own = worded[number]
            chunks = self._chunks(stage, own, is_guided)
            with_prompt = {**self._conditioning(stage, own, chunks, given), **told, **shown}
            without, both = with_prompt, with_prompt
            if is_guided:
                without = {**self._conditioning(stage, own, chunks, given, without=True), **told, **unshown}
                both = {name: np.concatenate([without[name], with_prompt[name]]) for name in with_prompt}
            inputs[number] = with_prompt, without, both
        session = self._open(stage.denoiser)  # after the text graph, which may be closed by now

        def call(sample: Array, t: float, row: samplers.Row, further: Mapping[str, Array]) -> Array:
            timestep = np.full(len(sample), t, np.float32)
            steered = hints.scales(self.model, stage, row, len(sample))
            return run_batched(session, {"sample": sample, "timestep": timestep, **further, **steered})["output"]

        def model(sample: Array, t: float, row: samplers.Row) -> Array:
            with_prompt, without, both = inputs[row.wording]
            if stage.guidance.kind == "embedded":
                told = {"guidance": np.full(len(sample), row.guidance, np.float32)}
                return call(sample, t, row, {**with_prompt, **told})
            if not is_guided or row.guidance <= 1:
                return call(sample, t, row, with_prompt)
            if request.guidance_batch == "batched":
                without_out, with_out = np.split(call(np.concatenate([sample, sample]), t, row, both), 2)
            else:
                without_out, with_out = call(sample, t, row, without), call(sample, t, row, with_prompt)
            channels = sample.shape[1]  # what follows them is a learned variance, which is the prompt's own
            guided = guidance.guide(
                without_out[:, :channels], with_out[:, :channels], row.guidance, rescale,
                patch=stage.patch if stage.guidance.normalize == "tokens" else None,
                rows=stage.guidance.normalize == "rows",
            )  # fmt: skip
            return np.concatenate([guided, with_out[:, channels:]], axis=1)

        return model

    def _told(self, request: Request) -> dict[str, Array]:
        """The inputs ``mask`` and ``masked_sample`` of a denoiser that was trained to paint into a picture."""
        if request.image is None or request.mask is None or not subject.paints(self.model):
            return {}
        image, mask = to_array(request.image, self._pixels(request)), upright(request.mask, request.image)
        return inpaint.conditioning(image, mask, self._main.factor, subject.count(request), self.encode)

    def _chunks(self, stage: Stage, request: Request, is_guided: bool) -> int:
        """The chunks of the longest prompt; all others get as many, since the denoiser takes them together."""
        if stage.text is None:
            return 1
        prompts = [*request.prompts, *([request.negative_prompt] if is_guided else [])]
        return self.prompts.tokenize(stage, prompts, weighted=request.prompt_weights).chunks

    def _conditioning(
        self, stage: Stage, request: Request, chunks: int, given: Mapping[str, cascade.Given], *, without: bool = False
    ) -> dict[str, Array]:
        """The denoiser's inputs beside sample and timestep, a row for each picture.

        chunks: of each prompt. without: of the negative prompt, or of no class, in place of what the request asks for.
        """
        graph, sides = self.model.graphs[stage.denoiser], self.sample_shape(request, stage)[-2:]
        return {
            **self._encoded(stage, request, chunks, without),
            **conditioning.constants(stage, graph, self._pixels(request), subject.count(request), negative=without),
            **subject.conditioning(stage, graph, request, sides, without=without),
            **cascade.conditioning(graph, given, without=without),
        }

    def _encoded(self, stage: Stage, request: Request, chunks: int, without: bool) -> dict[str, Array]:
        """What the stage's text graph makes of the prompts, or of the negative prompt, a row for each picture.

        Two stages may share a text graph, and each takes what its denoiser has an input for.
        """
        count, taken = subject.count(request), {tensor.name for tensor in self.model.graphs[stage.denoiser].inputs}
        prompts = [request.negative_prompt] if without else request.prompts
        if stage.text is not None and without and stage.guidance.empty == "zeros" and not request.negative_prompt:
            rows, prompts = self.prompts.zeros(stage, 1, chunks), [""]
        else:
            rows = self.prompts.encode(stage, prompts, weighted=request.prompt_weights, chunks=chunks, negative=without)
        return {name: np.repeat(rows[name], count // max(len(prompts), 1), axis=0) for name in rows if name in taken}

    def _settings(self, request: Request, index: int) -> dict[str, Any]:
        """What makes picture ``index`` again, for its metadata."""
        stages = self.model.stages
        steps = {way[0].name: count_steps(self.model, request, way) for way in cascade.ways(stages)}
        scales = {way[0].name: _plain(scale(self.model, request, way)) for way in cascade.ways(stages)}
        settings: dict[str, Any] = {
            **subject.settings(self.model, request, index),
            **({"negative_prompt": request.negative_prompt} if request.prompts else {}),
            **({"prompt_weights": False} if request.prompts and not request.prompt_weights else {}),
            "seed": request.seed + index,
            "steps": steps if len(steps) > 1 else steps[self._main.name],
            "guidance": scales if len(scales) > 1 else scales[self._main.name],
            "sampler": request.sampler or self._main.scheduler["_class_name"],
        }
        if request.scheduler:
            settings["scheduler"] = dict(request.scheduler)
        for name, default in (("guidance_interval", [0.0, 1.0]), ("guidance_rescale", 0.0)):
            if (value := _plain(getattr(request, name))) != default:
                settings[name] = value
        if self._begun(request) is not None:
            settings["strength"] = _plain(strength(self.model, request))
        settings |= hints.settings(self.model, request)
        if self.manifest is not None:
            settings |= {"target": self.manifest.target, "precision": self.manifest.precision}
        return settings


def _finite(values: Array) -> Array:
    """What a decoder gave, if it is numbers."""
    if not np.isfinite(values).all():
        raise DexportError(
            "the decoder gave values that are not finite: its precision overflows; build the bundle with "
            "--precision fp32 or bf16"
        )
    return values


def _plain(numbers: Any) -> Any:
    """A float or a list of them, which JSON knows, for whatever holds numbers."""
    return np.asarray(numbers, np.float64).tolist()
