"""Where a model comes from: a checkpoint, what is said of it on the way in, and the one that refines what it draws.

A base draws out of noise, and a refiner goes on from a point of the way: Podell et al., "SDXL" (2023),
https://arxiv.org/abs/2307.01952, section 2.5; Balaji et al., "eDiff-I" (2022), https://arxiv.org/abs/2211.01324. The
refiner's graphs and tokenizers have names of their own, so nothing of the two has to be alike but the latents that go
from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import checkpoint as checkpoints
from exporter import consistency, families, hints, repository, single_file, steering, tiny_decoder
from exporter.checkpoint import Checkpoint, TokenizerFiles
from exporter.families import Shape, Spec, Tokens
from runtimes import cascade, presets, samplers, subject
from runtimes.errors import DexportError, Progress, silent
from runtimes.manifest import SourceFile, Stage

if TYPE_CHECKING:
    from exporter.own import OwnModel

HANDOVER = 0.8  # of the way from noise to picture; diffusers' documentation of SDXL, where the refiner begins
PREFIX = "refiner_"
MOST_CHUNKS = 64  # of a prompt, beyond all use
LATENT = frozenset(("vae", "vqvae", "movq", "vqgan"))  # what pipelines call the autoencoder that makes their latents
# Fields of Origin that are a path beside the first one, and how it is looked for on the hub.
BESIDE: Mapping[str, Mapping[str, bool]] = {
    "config": {"weights": False}, "refiner": {}, "prior": {}, "decoder": {"component": True},
    "motion_adapter": {"component": True}, "image_encoder": {"component": True}, "vae": {"component": True},
}  # fmt: skip
ZERO_SNR = "rescale_betas_zero_snr"
# Of an autoencoder: what makes its latents those of another one.
LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class Origin:
    """A checkpoint, and what is made of it on the way in.

    path: a diffusers folder, one .safetensors file, or a model of your own. refiner: a second checkpoint, which goes on
    with what the first one draws. prior: the folder of the prior that a decoder was saved without (exporter.combined).
    decoder: what decodes in place of its autoencoder: a consistency decoder's folder (exporter.consistency), or a tiny
    autoencoder's folder or file (exporter.tiny_decoder). vae: an autoencoder in place of the checkpoint's own
    (exporter.autoencoder). config, loras, embeddings, clip_skip: of the first one, as in ``exporter.checkpoint.read``;
    controls, ip_adapters, image_encoder: what steers it by pictures, as in ``exporter.hints.add``. sampler, steps,
    guidance: the model's defaults, in place of its checkpoint's and family's; a model that was distilled to need no
    guidance says so nowhere, and is one with ``guidance`` up to 1. Of a model with several ways (runtimes.cascade) they
    are of the main one. long_prompts: how many chunks a prompt may have, each as long as the text encoder takes (75
    tokens of CLIP's). motion_adapter: the folder of one that makes a model of pictures one of videos (exporter.motion).
    frames: of each video. scheduler: options of the sampler, by name, as values or text (runtimes.samplers.options).
    preset: what of sampler, scheduler, steps and guidance is not said, by the name of a distilled model's settings
    (runtimes.presets).

    Each path may be a repository on the Hugging Face hub instead, "org/name[@revision]", or a file or folder in one
    (exporter.repository). revision: of the first one. variant: of the weights in folders and repositories, like "fp16".
    """

    path: Path | str | OwnModel
    refiner: Path | str | None = None
    config: Path | str | None = None
    loras: Sequence[Path | str] = ()
    clip_skip: int = 1
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    controls: Sequence[Path | str] = ()
    ip_adapters: Sequence[Path | str] = ()
    image_encoder: Path | str | None = None
    long_prompts: int = 1
    embeddings: Sequence[Path | str] = ()
    prior: Path | str | None = None
    decoder: Path | str | None = None
    vae: Path | str | None = None
    motion_adapter: Path | str | None = None
    frames: int | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def of(cls, checkpoint: Origin | OwnModel | Path | str) -> Origin:
        """An origin as it is; of a path or a model, that with nothing more."""
        return checkpoint if isinstance(checkpoint, Origin) else cls(checkpoint)

    @property
    def checkpoints(self) -> list[Path]:
        """The paths of the checkpoints, which nothing is written into."""
        paths = (self.path, self.refiner, self.prior, self.decoder, self.vae, self.motion_adapter)
        return [Path(path) for path in paths if isinstance(path, Path | str)]


def read(origin: Origin | OwnModel | Path | str, *, progress: Progress = silent) -> Checkpoint:
    """Read a checkpoint and the one that refines what it draws, if any; ``stages`` finds whether they fit."""
    origin = local(_with_preset(Origin.of(origin)), progress)
    if not 1 <= origin.long_prompts <= MOST_CHUNKS:
        raise DexportError(f"long prompts may have 1 to {MOST_CHUNKS} chunks, not {origin.long_prompts}")
    if isinstance(origin.path, Path | str):
        base = checkpoints.read(
            Path(origin.path), config=origin.config, prior=origin.prior, loras=origin.loras,
            embeddings=origin.embeddings, clip_skip=origin.clip_skip,
            motion_adapter=origin.motion_adapter, vae=origin.vae, variant=origin.variant, progress=progress,
        )  # fmt: skip
        base = hints.add(base, origin.controls, origin.ip_adapters, origin.image_encoder, variant=origin.variant)
        base = _as_diffusers_reads(base)
    else:
        base = _own(origin.path, origin)
    second = None
    if origin.refiner is not None:
        second = checkpoints.read(Path(origin.refiner), variant=origin.variant, progress=progress)
        second = _as_diffusers_reads(second)
    base, *others = (
        replace(part, scheduler=_chosen(part, origin), chunks=origin.long_prompts)
        for part in (base, second)
        if part is not None
    )
    base = replace(base, refiner=next(iter(others), None), steps=origin.steps, guidance=origin.guidance)
    base = replace(base, frames=origin.frames)
    if origin.decoder is not None:
        base = _with_decoder(base, Path(origin.decoder), origin.variant)
    return base


def _as_diffusers_reads(part: Checkpoint) -> Checkpoint:
    """The checkpoint with its configurations as diffusers has them.

    What diffusers cannot make, our own reading as a rule says more of: which file, and which key in it.
    """
    from exporter import oracle, trace  # with torch, which looking at a checkpoint does not need

    try:
        return oracle.as_diffusers_reads(part)
    except DexportError:
        shape = Shape(*part.family.default_shape(part), free=False)
        stages(part, shape)
        for spec in specs(part, shape).values():
            trace.build(spec)
        raise


def local(origin: Origin, progress: Progress = silent) -> Origin:
    """The origin with a path on this disk for each repository that it names, downloaded where need be."""
    if not isinstance(origin.path, Path | str):
        return origin

    def found(place: Path | str, **how: Any) -> Path:
        return repository.resolve(place, variant=origin.variant, progress=progress, **how)

    def named(text: Path | str) -> str:  # "NAME=PATH"; a folder of the cache would not do for a name
        name, equals, place = str(text).partition("=")
        if not equals or Path(str(text)).exists():
            name, place = "", str(text)
        path = found(place, component=True)
        if not name and path != Path(place):
            name = hints.Named.parse(place.partition("@")[0]).name
        return f"{name}={path}" if name else place

    def with_end(text: Path | str) -> str:  # "FILE:END"
        place, colon, end = str(text).rpartition(":")
        if not colon or Path(str(text)).exists():
            place, colon, end = str(text), "", ""
        return f"{found(place)}{colon}{end}"

    changes: dict[str, Any] = {"path": found(origin.path, revision=origin.revision), "revision": None}
    for name, how in BESIDE.items():
        place = getattr(origin, name)
        if place is not None and not (name == "config" and single_file.is_shipped(place)):
            changes[name] = found(place, **how)
    for name, read_one in (("controls", named), ("ip_adapters", named), ("loras", with_end), ("embeddings", with_end)):
        changes[name] = tuple(map(read_one, getattr(origin, name)))
    return replace(origin, **changes)


def _with_preset(origin: Origin) -> Origin:
    """The origin with its preset's settings where it has none of its own."""
    if origin.preset is None:
        return origin
    said = {name: getattr(origin, name) for name in ("sampler", "steps", "guidance", "scheduler")}
    return replace(origin, **presets.settings(origin.preset, said), preset=None)


def _chosen(part: Checkpoint, origin: Origin) -> dict[str, Any]:
    """The scheduler's config of a checkpoint, with the sampler that was asked for in place of its own.

    Latents are not bounded. Where the checkpoint's class has no option of clipping, its config is silent about it, and
    so a sampler that does clip where nothing is said is told not to.
    """
    config = dict(part.scheduler)
    if not LATENT.isdisjoint(part.components) and not samplers.knows(config.get("_class_name"), "clip_sample"):
        config.setdefault("clip_sample", False)
    for own in samplers.options.LISTS:  # which no file of diffusers' holds
        config.pop(own, None)
    chosen = samplers.choose(config, origin.sampler, origin.scheduler)
    in_one_file = not part.in_memory and part.path.is_file()
    if in_one_file and chosen.get(ZERO_SNR) and not samplers.knows(chosen["_class_name"], ZERO_SNR):
        raise DexportError(
            f"{part.path}: it says that its schedule ends in pure noise (ztsnr), which {chosen['_class_name']} cannot "
            "follow; name a sampler that does, like --sampler ddim or --sampler euler"
        )
    return chosen


def with_own_sampler(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, and its refiner, with their own sampler in place of the one that was asked for."""
    first, *_ = families.schedulers(checkpoint.family)
    own = replace(checkpoint, scheduler=checkpoint.schedulers[first])
    refiner = None if checkpoint.refiner is None else with_own_sampler(checkpoint.refiner)
    return replace(own, scheduler=_chosen(own, Origin(own.path)), refiner=refiner)


def _with_decoder(base: Checkpoint, path: Path, variant: str | None) -> Checkpoint:
    """The checkpoint with what decodes in place of its autoencoder: a folder says what it is, a file is a tiny one."""
    if path.is_dir() and checkpoints.read_json(path / "config.json").get("_class_name") == consistency.CLASS:
        base = checkpoints.add(base, consistency.COMPONENT, path, (consistency.CLASS,), variant=variant)
        consistency.check(base)
        return base
    classes = (tiny_decoder.CLASS, consistency.CLASS)
    return tiny_decoder.check(
        checkpoints.add(base, tiny_decoder.COMPONENT, path, classes, tiny_decoder.from_file, variant)
    )


def _own(model: OwnModel, origin: Origin) -> Checkpoint:
    """A model of one's own as a checkpoint; it takes nothing that is only said of files."""
    from exporter import own  # with torch, which whoever has such a model has loaded

    if not isinstance(model, own.OwnModel):
        raise DexportError(f"a checkpoint is a path, or a dexport.OwnModel, not {model!r:.60}")
    defaults = {name: getattr(origin, name) for name in ("sampler", "steps", "guidance", "scheduler")}
    if origin != Origin(model, **defaults):
        raise DexportError(
            "a model of your own takes nothing that is said of files: no refiner, LoRA, ControlNet and the like"
        )
    return own.read(model)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The graphs of a checkpoint by name, those of its refiner and of a decoder that was given among them.

    What lies between two of them is left out. Raises DexportError for options that the model does not have.
    """
    made = _specs(checkpoint, shape)
    tiny = tiny_decoder.COMPONENT in checkpoint.components
    if consistency.component(checkpoint) is None and not tiny:
        return made
    unused = _stages(checkpoint, shape)[-1].decoder
    if tiny:
        full = made[str(unused)]
        others = {name: spec for name, spec in made.items() if name != unused}
        return others | {tiny_decoder.GRAPH: tiny_decoder.spec(checkpoint, full)}
    return {name: spec for name, spec in made.items() if name != unused} | consistency.specs(checkpoint, shape)


def _specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    own = steering.specs(checkpoint, shape, checkpoint.family.specs(checkpoint, shape))
    if checkpoint.chunks > 1 and not any(spec.sizes for spec in own.values()):
        raise DexportError(f"long prompts are for models of CLIP's states; leave them out for a {checkpoint.pipeline}")
    if checkpoint.refiner is None:
        return own
    unused = {stage.decoder for stage in checkpoint.family.stages(checkpoint, shape)}
    made = {name: spec for name, spec in own.items() if name not in unused}
    second = checkpoint.refiner
    unused = {stage.encoder for stage in second.family.stages(second, shape)}
    for name, spec in second.family.specs(second, shape).items():
        if spec.kind == "text":
            spec = replace(spec, inputs=tuple(replace(t, name=f"{PREFIX}{t.name}") for t in spec.inputs))
        if name not in unused:
            made[f"{PREFIX}{name}"] = spec
    return made


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """The loops of a checkpoint and its refiner, with graphs named as in ``specs``; the defaults are those asked for.

    Raises DexportError for two checkpoints of which one cannot go on with what the other made.
    """
    every = _stages(checkpoint, shape)
    if consistency.component(checkpoint) is not None:
        if every[-1].fps is not None:
            raise DexportError("a consistency decoder draws pictures, and no videos; leave --decoder out")
        every = consistency.stages(checkpoint, shape, every)
    if tiny_decoder.COMPONENT in checkpoint.components:
        every = tiny_decoder.stages(every)
    if checkpoint.frames is not None and every[-1].fps is None:
        raise DexportError(f"{checkpoint.path}: a {checkpoint.pipeline} draws pictures; leave --frames out")
    asked = cascade.main(every)
    several = asked != cascade.ways(every)[0]
    return tuple(_with_defaults(stage, checkpoint, several) if stage in asked else stage for stage in every)


def _stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    own = steering.stages(checkpoint, checkpoint.family.stages(checkpoint, shape))
    if checkpoint.refiner is None:
        return own
    second = checkpoint.refiner
    if len(own) != 1 or own[0].strength is not None:
        raise DexportError(f"{checkpoint.path}: a {checkpoint.pipeline} does not draw from noise; give the base first")
    for part in (checkpoint, second):
        spec = part.family.specs(part, shape)["denoiser"]
        if any(tensor.name == "mask" for tensor in spec.inputs):
            raise DexportError(f"{part.path}: an inpainting model neither is refined nor refines; leave --refiner out")
    (first,), (last,) = own, second.family.stages(second, shape)
    _check(checkpoint, second, first, last)
    return (
        replace(first, decoder=None, span=(0.0, HANDOVER)),
        replace(
            last,
            name="refiner",
            denoiser=f"{PREFIX}{last.denoiser}",
            text=last.text and f"{PREFIX}{last.text}",
            decoder=last.decoder and f"{PREFIX}{last.decoder}",
            encoder=None,
            steps=first.steps,
            strength=None,
            span=(HANDOVER, 1.0),
        ),
    )


def _with_defaults(stage: Stage, asked: Checkpoint, several: bool) -> Stage:
    steps = asked.steps or samplers.listed(stage.scheduler)
    if steps is not None:
        stage = replace(stage, steps=steps)
    if asked.guidance is None:
        return stage
    if stage.guidance.kind == "none" and asked.guidance > 1:
        raise DexportError("this model was made to draw without guidance; leave --guidance out")
    # Of several ways that start from noise the main one is known by its guidance, and stays the main one.
    kind = "none" if stage.guidance.kind == "cfg" and asked.guidance <= 1 and not several else stage.guidance.kind
    return replace(stage, guidance=replace(stage.guidance, kind=kind, scale=float(asked.guidance)))


def owner(checkpoint: Checkpoint, graph: str) -> Checkpoint:
    """The checkpoint whose weights a graph of ``specs`` has."""
    if checkpoint.refiner is not None and graph.startswith(PREFIX):
        return checkpoint.refiner
    return checkpoint


def token_inputs(checkpoint: Checkpoint) -> dict[str, tuple[TokenizerFiles, Tokens, tuple[str, ...]]]:
    """The tokenizers by their folder in a bundle: their files, what the text graph takes, and words to add."""
    found = {}
    for part, prefix, ending in ((checkpoint, "", ""), (checkpoint.refiner, PREFIX, "_refiner")):
        if part is None:
            continue
        for name, tokens in part.family.token_inputs(part).items():
            # "tokenizer_2_refiner", "tokenizer_prior": a bundle's folder of a tokenizer begins with that word
            whose, _, number = name.partition("tokenizer")
            place = f"tokenizer{number}{f'_{whose}'.rstrip('_')}{ending}"
            found[place] = (part.tokenizers[name], replace(tokens, input=f"{prefix}{tokens.input}"), part.words)
    return found


def source(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    """The files that an export depends on; the refiner's in a folder of that name."""
    own = checkpoint.source()
    if checkpoint.refiner is None:
        return own
    return own + tuple(replace(file, path=f"refiner/{file.path}") for file in checkpoint.refiner.source())


def _check(base: Checkpoint, refiner: Checkpoint, first: Stage, last: Stage) -> None:
    """The two must speak of the same latents and of the same noise."""
    if (first.sample, first.factor) != (last.sample, last.factor):
        raise DexportError(f"{refiner.path}: its latents are {last.sample}, those of {base.path} {first.sample}")
    if not subject.alike(first, last):
        raise DexportError(f"{refiner.path}: it does not take the same prompts or classes as {base.path}")
    for option in LATENTS:
        pair = [part.components["vae"].config.get(option) for part in (base, refiner) if "vae" in part.components]
        if len(pair) == 2 and pair[0] != pair[1]:
            raise DexportError(
                f"{refiner.path}: {option} of its autoencoder is {pair[1]!r:.60}, that of {base.path} "
                f"{pair[0]!r:.60}; a refiner goes on with the base's latents"
            )
    names = [stage.scheduler["_class_name"] for stage in (first, last)]
    if names[0] != names[1]:
        raise DexportError(
            f"{refiner.path}: its scheduler is {names[1]}, that of {base.path} {names[0]}; name one for both with "
            "--sampler"
        )
