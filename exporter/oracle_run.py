"""A run of diffusers' own pipeline, watched: what its scheduler was given at each step, its tokens and its image.

All pipelines, whatever they do inside, call ``scheduler.step(output, timestep, sample)``. What goes in there is what
our loop has too, so the two can be compared without knowing the family.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from exporter import families
from exporter.trace import quiet
from runtimes import cascade, hints, loop, samplers, subject
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import Model
from runtimes.pipeline import Pipeline
from runtimes.request import Request, scale, strength

Array = NDArray[Any]
Draw = Callable[[], Array]
STEPS, GUIDANCE = "num_inference_steps", "guidance_scale"
NONE_SAID = ("intermediate_timesteps",)  # None is not the default of these
# What a class calls the steps and the guidance of a chain of stages, where it does not begin with the chain's name.
CALLED = {"superresolution": "super_res"}
# What our bundles do not do to a prompt or a size, each by default on in diffusers (docs/exactness.md).
LEFT_OUT = {"clean_caption": False, "use_resolution_binning": False}
# Classes that are told how many tokens of T5 there are: of Flux.1 schnell half the default, by its model card.
COUNTED = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
COUNTS_FROM_0 = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")  # scales of guidance


@dataclass(frozen=True)
class Step:
    """One call of a scheduler: the timestep, the sample before and after it, and the model's output, torch's own."""

    t: float
    before: torch.Tensor
    output: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True)
class Run:
    """What a pipeline did: its steps, the token ids [B, S] that text encoders were given, and its image or video.

    latents: what it came to, in the pipeline's layout. image: float32 [B, 3, H, W] in [0, 1], or [B, F, 3, H, W]; None
    where it was not decoded. size: its height and width in pixels. unpack: latents of the pipeline's layout to
    [B, C, h, w].
    """

    steps: tuple[Step, ...]
    tokens: tuple[Array, ...]
    latents: torch.Tensor
    image: Array | None
    size: tuple[int, int]
    unpack: Callable[[torch.Tensor], torch.Tensor]

    def laid_out(self, values: torch.Tensor, shape: Sequence[int]) -> Array | None:
        """A sample or an output as our loop has it, of a ``shape`` [B, C, ...]; None for one of another size.

        Of an output that holds a learned variance too, that is left out.
        """
        if values.ndim == 3 and len(shape) == 4:
            values = self.unpack(values)
        found: Array = values.float().numpy()
        if len(found) == 2 * shape[0]:  # with and without the condition, which are the same sample
            found = found[: shape[0]]
        size = int(np.prod(shape))
        if found.size == size:
            return found.reshape(shape)
        if found.ndim == len(shape) and found.shape[1] > shape[1]:
            found = found[:, : shape[1]]
            return found if found.shape == tuple(shape) else None
        return None


def run(
    pipes: Sequence[Any], pipeline: Pipeline, request: Request, *, explicit: frozenset[str], decoded: bool = True,
    progress: Progress = silent,
) -> Run:  # fmt: skip
    """Run diffusers' pipelines on a request, with the noise that ``pipeline``, ours, draws for it.

    pipes: one, or a base and its refiner. explicit: which of "guidance" and "size" are said to them; what is not is
    left to their own defaults. decoded: whether the latents become an image; where they do not, the size is ours.
    Raises DexportError where diffusers itself fails.
    """
    steps: list[Step] = []
    tokens: list[Array] = []
    total = sum(len(table.rows) for _, runs in pipeline.tables(request) for run in runs for _, table in run)

    def step(*values: Any) -> None:
        steps.append(Step(*values))
        progress(f"diffusers: step {len(steps)}/{total}", min(len(steps) / (total + 1), 1.0))

    words = arguments(pipes[0], pipeline.model, request, explicit)
    decoded = decoded or "output_type" not in words
    if not decoded:
        words["output_type"] = "latent"
    try:
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(torch.inference_mode())
            main = cascade.main(pipeline.model.stages)[0].scheduler
            for pipe in pipes:
                stack.enter_context(_watched(pipe, main, step, tokens.append))
            stack.enter_context(_SharedNoise(pipeline, request, getattr(pipes[0], "_pack_latents", None)))
            if len(pipes) > 1:
                at = pipeline.model.stages[-1].span[0]
                words["image"] = pipes[0](**{**words, "output_type": "latent", "denoising_end": at}).images
                words |= {**arguments(pipes[1], pipeline.model, request, explicit), "image": words["image"]}
                words["denoising_start"] = at
            result = pipes[-1](**words)
    except Exception as error:  # whatever a pipeline of diffusers raises for what it was not made for
        said = next(iter(str(error).strip().splitlines()), "")
        raise DexportError(
            f"diffusers' own {type(pipes[-1]).__name__} does not run: {type(error).__name__}: {said:.300}"
        ) from error
    last = pipeline.model.stages[-1]
    image = _image(result) if decoded else None
    size = (last.sample[-2] * last.factor, last.sample[-1] * last.factor) if image is None else image.shape[-2:]
    blended = request.mask is not None and not decoded  # with what the mask leaves, after the last step too
    latents = _result(result) if blended else steps[-1].after
    return Run(tuple(steps), tuple(tokens), latents, image, (size[0], size[1]), _unpacked(pipes[-1], size))


def arguments(pipe: Any, model: Model, request: Request, explicit: frozenset[str]) -> dict[str, Any]:
    """A request in the words of a pipeline's ``__call__``."""
    known = inspect.signature(pipe.__call__).parameters
    last, count = model.stages[-1], subject.count(request)
    words: dict[str, Any] = {"output_type": "np", "batch_size": count, **LEFT_OUT}
    if request.prompts:
        words["prompt"] = list(request.prompts)
        if type(pipe).__name__ in COUNTED:
            words["max_sequence_length"] = max(tokenizer.length for tokenizer in model.tokenizers)
    if model.stages[0].labels is not None:
        words["class_labels"] = subject.numbers(model.stages[0].labels, request.labels)
    main = cascade.main(model.stages)[0]
    is_true_cfg = main.guidance.kind == "cfg" and "true_cfg_scale" in known  # which needs a negative prompt, if empty
    if request.negative_prompt or (is_true_cfg and request.prompts):
        words["negative_prompt"] = [request.negative_prompt]
    # Without a word of it, TCD's is its own default, 0.3, which a pipeline's 0 would hide.
    words["eta"] = main.scheduler.get("eta", samplers.default_of(str(main.scheduler["_class_name"]), "eta"))
    words |= _lists(main.scheduler)
    words["use_clipped_model_output"] = main.scheduler.get("use_clipped_model_output")
    for way in cascade.ways(model.stages):
        own = _of_chain(way, model, request, explicit, known, is_true_cfg, type(pipe).__name__)
        words = {**own, **words}  # what an earlier one is told stays
    height, width = (side * last.factor for side in last.sample[-2:]) if len(last.sample) > 2 else (0, 0)
    if request.image is not None:
        words |= {"image": request.image, "mask_image": request.mask}
        if not subject.shown(model):
            words["strength"] = float(strength(model, request))
    is_fixed = "height" in known and known["height"].default not in (None, height)  # whatever the checkpoint says
    if request.hints:
        words |= _control_images(model, request, known)
    if "size" in explicit or is_fixed or request.image is not None:
        words |= {"height": height, "width": width}
    if last.fps is not None:
        words["num_frames"] = last.sample[1]
    if "intermediate_timesteps" in known and words.get(STEPS) != 2:
        words["intermediate_timesteps"] = None
    return {
        name: value for name, value in words.items() if name in known and (value not in (None, []) or name in NONE_SAID)
    }


def _lists(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of timesteps and sigmas as ``set_timesteps`` takes them: with a 0 at the end, which flows add."""
    sigmas = [sigma for sigma in scheduler.get("sigmas") or () if sigma]
    if sigmas and not str(scheduler["_class_name"]).startswith("FlowMatch"):
        sigmas.append(0.0)
    return {"timesteps": scheduler.get("timesteps"), "sigmas": sigmas}


def _control_images(model: Model, request: Request, known: Mapping[str, Any]) -> dict[str, Any]:
    """The images that steer: those of networks, and those that IP-Adapters take in place of words."""
    given = hints.chosen(model, request)
    words = [hint.name for hint in hints.taken(model) if hint.resample == "bicubic"]  # as CLIP's image encoder reads
    found: dict[str, Any] = {"ip_adapter_image": [given[name].image for name in words] or None}
    images: list[Any] = [given[name].image for name in given if name not in words]
    if "adapter_conditioning_scale" in known:
        images = [[image] for image in images]  # one for each prompt
        if len(images) > 1:
            found["adapter_conditioning_scale"] = [1.0] * len(images)
    if images:
        found["control_image" if "control_image" in known else "image"] = images if len(images) > 1 else images[0]
    return found


def _of_chain(
    way: cascade.Way, model: Model, request: Request, explicit: frozenset[str], known: Mapping[str, Any],
    is_true_cfg: bool, pipe: str,
) -> dict[str, Any]:  # fmt: skip
    """The steps and the guidance of one chain of stages."""
    name, words = CALLED.get(way[0].name, way[0].name), {}
    steps = cascade.setting(model.stages, way, request.steps)
    if steps is not None:
        words[f"{name}_{STEPS}" if f"{name}_{STEPS}" in known else STEPS] = steps
    if "guidance" in explicit and way == cascade.main(model.stages):
        own = scale(model, request, way)
        assert isinstance(own, int | float)
        called = "true_cfg_scale" if is_true_cfg else f"{name}_{GUIDANCE}"
        words[called if called in known else GUIDANCE] = own - 1 if pipe in COUNTS_FROM_0 else float(own)
    return words


@contextmanager
def _watched(
    pipe: Any, options: Mapping[str, Any], step: Callable[..., None], tokens: Callable[[Array], None]
) -> Iterator[None]:
    """Hear of each step of a pipeline's schedulers, and of each call of its text encoders.

    options: of the main scheduler; what the pipeline's call does not take of them is said to the scheduler itself.
    """
    parts, takes = dict(pipe.components), inspect.signature(pipe.__call__).parameters
    lists = {name: value for name, value in _lists(options).items() if value and name not in takes}
    clipped = options.get("use_clipped_model_output")
    told = {} if clipped is None or "use_clipped_model_output" in takes else {"use_clipped_model_output": clipped}
    vae = parts.get("vae")
    schedulers = [part for part in (*parts.values(), getattr(vae, "decoder_scheduler", None)) if _steps(part)]
    hooks = []
    with ExitStack() as stack:
        for scheduler in {id(part): part for part in schedulers}.values():
            stack.enter_context(_unchanged(scheduler))
            stack.enter_context(_replaced(scheduler, "step", _heard(scheduler, step, told)))
            if lists and scheduler is parts.get("scheduler"):
                stack.enter_context(_replaced(scheduler, "set_timesteps", _listed(scheduler, lists)))
        if vae is not None and hasattr(vae, "encode"):
            stack.enter_context(_replaced(vae, "encode", _mode_of(vae.encode)))
        try:
            for part in parts.values():
                if isinstance(part, torch.nn.Module) and hasattr(part, "get_input_embeddings"):
                    hooks.append(part.register_forward_pre_hook(_told(tokens), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _steps(part: Any) -> bool:
    return hasattr(part, "set_timesteps") and hasattr(part, "step")


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """An object with one method replaced."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


@contextmanager
def _unchanged(scheduler: Any) -> Iterator[None]:
    """A scheduler as it was: some change their own options for a number of steps, and keep that for the next run."""
    before = copy.deepcopy(vars(scheduler))
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)


def _listed(scheduler: Any, lists: Mapping[str, Any]) -> Callable[..., None]:
    """A scheduler's ``set_timesteps`` with a list of ours, for a pipeline that takes none."""
    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at its parameters
    def set_timesteps(*_: Any, device: Any = None, mu: float | None = None, **__: Any) -> None:
        original(device=device, **lists, **({} if mu is None else {"mu": mu}))

    return set_timesteps


def _heard(scheduler: Any, tell: Callable[..., None], told: Mapping[str, Any]) -> Callable[..., Any]:
    original = scheduler.step
    known = inspect.signature(original).parameters
    told = {name: value for name, value in told.items() if name in known}

    @functools.wraps(original)
    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        before, output, kwargs = sample.clone(), model_output.clone(), {**kwargs, **told}
        result = original(model_output, timestep, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        tell(float(torch.as_tensor(timestep).flatten()[0]), before, output, after.clone())
        return result

    return step


def _mode_of(encode: Callable[..., Any]) -> Callable[..., Any]:
    """An autoencoder's ``encode`` whose latents are the mode of their distribution, as ours are, in place of a draw."""

    @functools.wraps(encode)
    def encoded(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        kind = getattr(result, "latent_dist", None)
        if kind is None:
            return result
        mode = kind.mode()
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda *_, **__: mode, mode=lambda: mode))

    return encoded


def _told(tokens: Callable[[Array], None]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            tokens(ids.numpy().copy())

    return hook


class _SharedNoise(TorchFunctionMode):
    """Gives ``torch.randn`` the noise that our pipeline draws for a request, by the shape that is asked for.

    Where several chains of stages draw the same shape, each has as many draws as its table takes.
    """

    def __init__(self, pipeline: Pipeline, request: Request, pack: Callable[..., torch.Tensor] | None) -> None:
        """pack: diffusers' own way from [B, C, h, w] to a pipeline's layout, where that draws its noise so."""
        super().__init__()
        self._pack = pack
        self._draws: dict[tuple[int, ...], Iterator[Array]] = {}
        count = subject.count(request)
        found: dict[tuple[int, ...], list[tuple[Draw, int]]] = {}
        for index, (shape, runs) in enumerate(pipeline.tables(request)):
            draw = loop.noise_source(cascade.seeds(request.seed, count, index), shape)
            drawn = (bool(row.x_z or row.s_z) for run in runs for _, table in run for row in table.rows)
            used = len(runs) + sum(drawn)
            found.setdefault(_key((count, *shape)), []).append((draw, used))
        for key, sources in found.items():
            *first, (last, _) = sources
            self._draws[key] = chain(*(islice(_endless(draw), used) for draw, used in first), _endless(last))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn or func is torch.randn_like:
            shape = tuple(args[0].shape if func is torch.randn_like else args[0] if len(args) == 1 else args)
            if _key(shape) in self._draws:
                return torch.from_numpy(next(self._draws[_key(shape)])).float().reshape(shape)
            if self._pack is not None and len(shape) == 3:
                for own, draws in self._draws.items():
                    if math.prod(own) == math.prod(shape):
                        channels, height, width = own[-3:]
                        values = torch.from_numpy(next(draws)).float().reshape(shape[0], channels, height, width)
                        return self._pack(values, shape[0], channels, height, width)
        return func(*args, **kwargs)


def _key(shape: Sequence[int]) -> tuple[int, ...]:
    """Sides of 1 come and go: a video of one frame is an image to us."""
    return tuple(side for side in shape if side != 1)


def _endless(draw: Draw) -> Iterator[Array]:
    while True:
        yield draw()


def _image(result: Any) -> Array:
    """A result's images [B, 3, H, W], or videos [B, F, 3, H, W], float32 in [0, 1]."""
    return np.moveaxis(np.asarray(_result(result), np.float32), -1, -3)


def _result(result: Any) -> Any:
    return result.images if hasattr(result, "images") else result.frames


def _unpacked(pipe: Any, size: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """diffusers' own way from packed latents to [B, C, h, w]."""

    def unpack(values: torch.Tensor) -> torch.Tensor:
        if not hasattr(pipe, "_unpack_latents"):
            return values
        return pipe._unpack_latents(values, *size, pipe.vae_scale_factor)  # type: ignore[no-any-return]

    return unpack


def tasks(class_name: str) -> dict[str, str]:
    """diffusers' pipeline classes for the same checkpoint: "image to image" and "inpainting", where it has them."""
    with quiet():  # it imports every pipeline, each with its remarks on what it could use
        from diffusers.pipelines import auto_pipeline as auto

    found = {}
    for task, mapping in (
        ("image to image", auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("inpainting", auto.AUTO_INPAINT_PIPELINES_MAPPING),
    ):
        kind = auto._get_task_class(mapping, class_name, throw_error_if_not_exist=False)
        if kind is not None and kind.__name__ in (*families.PIPELINES, *families.SAME):
            found[task] = kind.__name__
    return found
