"""diffusers' own pipeline of a checkpoint: how its configurations are to be read, and what a bundle has to follow.

The pipeline class loads tokenizers, schedulers and configurations by its own rules, and repairs them in its own
constructor; nothing here knows what it repairs. Only the weights are lent: a module of the pipeline has parameters
without bytes, and each is read from the checkpoint's file, and widened, whenever its module asks for it. So a pipeline
of any size fits beside everything else.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from exporter import consistency, families, ip_adapter, tiny_decoder, tokenizer
from exporter.checkpoint import LIBRARIES, Checkpoint, Component, TokenizerFiles, finite_config
from exporter.combined import COMBINED, PREFIX
from exporter.reference import lend
from exporter.trace import Unfilled, quiet
from exporter.weights import parameter_shapes, tied
from runtimes import samplers
from runtimes.errors import DexportError
from runtimes.safetensors import Stored

# Classes that take latents_mean in on one side of the autoencoder alone, or on none.
WITHOUT_MEAN = (
    "StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLAdapterPipeline", "AnimateDiffSDXLPipeline",
)  # fmt: skip
# A network's class to the word in the name of its pipeline, and what that pipeline calls it.
STEERING = {"ControlNetModel": ("ControlNet", "controlnet"), "T2IAdapter": ("Adapter", "adapter")}
# Components that decode in place of the autoencoder, as users of diffusers give them: pipe.vae = ...
DECODERS = {consistency.COMPONENT, tiny_decoder.COMPONENT}
# Options of ours that are arguments of a pipeline's call or of a scheduler's methods there (exporter.oracle_run).
SAID = (*samplers.options.LISTS, "eta", "use_clipped_model_output", "tau")
WITHOUT_SHARED_NOISE = ("DPMSolverSDEScheduler",)  # whose noise is a path of its own (torchsde)
UNSET = "_use_default_values"  # a live config's list of the options that its file did not have


def as_diffusers_reads(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its configurations as diffusers' pipeline has them once it is made.

    Schedulers are of the class that the pipeline gave them, with the options that it ended up with; of a component's
    config only what the pipeline changed is taken. Raises DexportError where diffusers cannot make the pipeline.
    """
    if checkpoint.in_memory:
        return checkpoint
    pipe = construct(checkpoint)
    components = dict(checkpoint.components)
    for name, part in components.items():
        module = pipe.components.get(name)
        if hasattr(module, "config_as_loaded"):
            changed = _plain(_differing(dict(module.config), module.config_as_loaded))
            components[name] = replace(part, config={**part.config, **changed})
    schedulers = {name: _scheduler(checkpoint, name, pipe.components[name]) for name in checkpoint.schedulers}
    main = families.schedulers(checkpoint.family)[0]
    said = _differing(checkpoint.scheduler, checkpoint.schedulers[main])  # by a single file, or for a motion adapter
    return replace(checkpoint, components=components, schedulers=schedulers, scheduler={**schedulers[main], **said})


def _scheduler(checkpoint: Checkpoint, name: str, live: Any) -> dict[str, Any]:
    """A live scheduler's class and the options that its file or the pipeline's constructor set.

    What is the class's default is left out, so that another sampler takes its own, as with diffusers' ``from_config``.
    """
    config = dict(live.config)
    unset = config.pop(UNSET, ())
    defaults = {key: item.default for key, item in inspect.signature(type(live).__init__).parameters.items()}
    config = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and not (key in unset and value == defaults.get(key))
    }
    config["_class_name"] = type(live).__name__
    return finite_config(checkpoint.path / name / "scheduler_config.json", _plain(config))


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As a JSON file would have it: lists for tuples, and numbers for arrays of them."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=lambda item: item.tolist()))
    return plain


def construct(checkpoint: Checkpoint, class_name: str | None = None) -> Any:
    """diffusers' pipeline of a checkpoint, in fp32 on the CPU, with parameters that have no values: see ``lend``.

    class_name: another pipeline class than the checkpoint's, made of the same parts. Raises DexportError where
    diffusers cannot make it.
    """
    import diffusers

    name = class_name or _own_class(checkpoint)
    try:
        with quiet(), Unfilled():
            if name in {both for _, both in COMBINED.values()} and _prior_folder(checkpoint) is not None:
                pipe = _of_two(checkpoint, name)
            else:
                pipe = _of_folder(getattr(diffusers, name), checkpoint, _folder(checkpoint))
    except DexportError:
        raise
    except Exception as error:  # each class fails in its own way over a file that it was not made for
        raise DexportError(f"{checkpoint.path}: diffusers' {name} cannot be made of it: {_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipelines(checkpoint: Checkpoint) -> tuple[list[Any], str]:
    """diffusers' own pipelines of what a checkpoint became on the way in: one, or a base and its refiner.

    None, and why, where diffusers has no class for it.
    """
    if checkpoint.in_memory:
        return [], "a model of your own, of which diffusers has no class"
    found: list[Any] = []
    for part in (checkpoint, checkpoint.refiner):
        if part is not None:
            pipe = _steered(part) if part.hints else construct(part, part.pipeline)
            if pipe is None:
                return [], "diffusers has no class for what steers it together"
            if fault := known_fault(part, type(pipe).__name__):
                return [], fault
            for scheduler, wanted in {**part.schedulers, families.schedulers(part.family)[0]: part.scheduler}.items():
                _set_scheduler(part, pipe, scheduler, wanted)
            found.append(pipe)
    for name in DECODERS & checkpoint.components.keys():
        with quiet(), Unfilled():
            other = checkpoint.components[name]
            decoder = hollow(checkpoint, other, other.path)
        _encode_by(decoder, found[-1].vae)
        found[-1].register_modules(vae=decoder)
    return found, ""


def _encode_by(decoder: Any, vae: Any) -> None:
    """Let the latents that a decoder counts by its own scale be encoded by an autoencoder, which has another one."""
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))

    def encode(image: torch.Tensor, *_: Any, **__: Any) -> Any:
        latents = (vae.encode(image).latent_dist.mode() - shift) * scale
        if mean is not None:
            first, second = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
            latents = (latents / scale - first) * scale / second
        own_shift = getattr(decoder.config, "shift_factor", None) or 0.0
        return SimpleNamespace(latents=latents / decoder.config.scaling_factor + own_shift)

    decoder.encode = encode


def unfollowed(checkpoint: Checkpoint) -> str:
    """Why diffusers' pipeline cannot go the way of the sampler that was asked for; "" where it can."""
    if checkpoint.in_memory:
        return ""
    kind, name = checkpoint.pipeline, str(checkpoint.scheduler["_class_name"])
    if name in WITHOUT_SHARED_NOISE:
        return f"{name} draws from a noise of its own"
    takes = inspect.signature(_class(kind).__call__).parameters
    given = inspect.signature(_scheduler_class(name).set_timesteps).parameters
    if "sigmas" in takes and "timesteps" not in takes and "sigmas" not in given:
        return f"{kind} gives sigmas to its scheduler, and {name} takes none"
    if kind.startswith("LatentConsistencyModel") and name == "TCDScheduler":
        return f"{kind} gives its scheduler no eta, which {name} needs"
    return ""


def _steered(checkpoint: Checkpoint) -> Any:
    """The pipeline class for a checkpoint with the networks that steer it; None where diffusers has none for them all.

    diffusers has classes for ControlNets, for T2I-Adapters, and for IP-Adapters alone or with ControlNets.
    """
    import diffusers

    parts = [checkpoint.components[name] for name in checkpoint.hints]
    adapters = [part for part in parts if part.class_name == ip_adapter.CLASS]
    networks = [part for part in parts if part not in adapters]
    kinds = {part.class_name for part in networks}
    if kinds - {"ControlNetModel"} and (len(kinds) > 1 or adapters):
        return None
    plain = checkpoint.pipeline.replace("ControlNet", "").replace("Adapter", "")
    pipe = construct(checkpoint, plain)
    encoder = checkpoint.components.get(ip_adapter.IMAGE_ENCODER)
    with quiet(), Unfilled():
        made = [hollow(checkpoint, part, part.path) for part in networks]
        if encoder is not None:
            pipe.register_modules(image_encoder=hollow(checkpoint, encoder, encoder.path))
        if networks:
            what, argument = STEERING[next(iter(kinds))]
            kind = getattr(diffusers, plain.replace("Pipeline", f"{what}Pipeline"))
            pipe = _assembled(kind, pipe, **{argument: made if len(made) > 1 else made[0]})
    if adapters:
        with quiet():
            folders, names = [str(part.path.parent) for part in adapters], [part.path.name for part in adapters]
            pipe.load_ip_adapter(folders, [""] * len(names), names, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def known_fault(checkpoint: Checkpoint, class_name: str) -> str:
    """Where diffusers' own class is known to be wrong, and so is no oracle: why; else ""."""
    vae = checkpoint.components.get("vae")
    if class_name in WITHOUT_MEAN and vae is not None and vae.config.get("latents_mean") is not None:
        return f"{class_name} leaves out the mean of its autoencoder's latents, which others take in"
    return ""


def _set_scheduler(checkpoint: Checkpoint, pipe: Any, name: str, wanted: Mapping[str, Any]) -> None:
    """Give a pipeline the scheduler that was asked for, as its users do: with ``from_config`` of its own."""
    live = pipe.components[name]
    own = _scheduler(checkpoint, name, live)
    if dict(wanted) == own:
        return
    changes = {key: value for key, value in _differing(wanted, own).items() if key not in (*SAID, "_class_name")}
    base = {key: value for key, value in live.config.items() if key in wanted or key not in own}
    made = _scheduler_class(str(wanted["_class_name"])).from_config(base, **changes)
    if wanted.get("tau") is not None:
        made.tau_func = lambda t: wanted["tau"]
    for owner in (pipe, *(getattr(pipe, inner) for inner in ("prior_pipe", "decoder_pipe") if hasattr(pipe, inner))):
        for key, part in owner.components.items():
            if part is live:
                owner.register_modules(**{key: made})


def with_class(pipe: Any, name: str) -> Any:
    """A pipeline's parts in another class of diffusers'."""
    import diffusers

    kind = getattr(diffusers, name)
    own = pipe.scheduler._internal_dict  # which a constructor repairs, even where it was asked for so
    with quiet():
        made = _assembled(kind, pipe)
    pipe.scheduler._internal_dict = own
    made.set_progress_bar_config(disable=True)
    return made


def _assembled(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another class with the parts and options of ``pipe``, and further ones."""
    expected, optional = kind._get_signature_keys(kind)
    options = {name: pipe.config[name] for name in optional if name in pipe.config}
    return kind(**{**{name: pipe.components.get(name) for name in expected}, **options, **parts})


def _own_class(checkpoint: Checkpoint) -> str:
    """The pipeline class of the checkpoint's own file, or what it became on the way in."""
    named = str(checkpoint.index.get("_class_name"))
    return named if families.SAME.get(named, named) == checkpoint.pipeline else checkpoint.pipeline


def _folder(checkpoint: Checkpoint) -> Path:
    """The folder with the checkpoint's configurations: its own, or that of a single file's kind."""
    return checkpoint.files["model_index.json"].parent


def _prior_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder of a prior that was saved by itself."""
    named = {name: file for name, file in checkpoint.files.items() if name.startswith(PREFIX)}
    folder = next(iter(named.values())).parents[1] if named else _folder(checkpoint)
    return None if folder == _folder(checkpoint) else folder


def _of_folder(kind: Any, checkpoint: Checkpoint, folder: Path, prefix: str = "") -> Any:
    """A pipeline that its class loads from a folder, but for the weights.

    prefix: of the checkpoint's names for the folder's components. Neither what the pipeline does not compute with (a
    safety checker) nor anything that we have not read ourselves is loaded: files name classes, and not all are to be
    trusted.
    """
    expected, optional = kind._get_signature_keys(kind)
    passed: dict[str, Any] = dict.fromkeys(expected)
    for name in expected:
        own = f"{prefix}{name}"
        if own in checkpoint.components and own != ip_adapter.IMAGE_ENCODER:  # which lies beside the checkpoint
            passed[name] = hollow(checkpoint, checkpoint.components[own], folder / name)
        elif own in checkpoint.schedulers:
            kind_of = _scheduler_class(_named(checkpoint, own))
            passed[name] = kind_of.from_pretrained(folder / name, local_files_only=True)
        elif own in checkpoint.tokenizers:
            passed[name] = _tokenizer(checkpoint, checkpoint.tokenizers[own])
    if "requires_safety_checker" in optional:
        passed["requires_safety_checker"] = False
    if all(_is_known(value) for value in checkpoint.index.values()):
        return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **passed)
    options = {name: checkpoint.index[name] for name in optional if name in checkpoint.index}
    return kind(**{**options, **passed})


def _is_known(value: Any) -> bool:
    """Whether diffusers still loads what a line of model_index.json names; of some classes it does no longer."""
    from diffusers import pipelines

    named = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return not named or value[0] in LIBRARIES[:2] or hasattr(pipelines, value[0])


def _named(checkpoint: Checkpoint, component: str) -> str:
    """The class that model_index.json names."""
    return str(checkpoint.index[component][1])


def _of_two(checkpoint: Checkpoint, name: str) -> Any:
    """The combined pipeline of a decoder's folder and its prior's, each loaded by its own class."""
    import diffusers

    decoder, prior = next((one, two) for one, (two, both) in COMBINED.items() if both == name)
    folder = _prior_folder(checkpoint)
    assert folder is not None
    first = _of_folder(getattr(diffusers, prior), checkpoint, folder, PREFIX)
    second = _of_folder(getattr(diffusers, decoder), checkpoint, _folder(checkpoint))
    parts = {**second.components, **{f"{PREFIX}{key}": part for key, part in first.components.items()}}
    return getattr(diffusers, name)(**parts)


def hollow(checkpoint: Checkpoint, part: Component, folder: Path) -> Any:
    """A component as its class makes it of its config.json, in fp32, with parameters that are lent.

    What was said of the checkpoint on the way in (a learned word, a layer left out) changes its config here too.
    """
    kind = _class(part.class_name)
    if hasattr(kind, "load_config"):
        is_own = part.path in (folder, checkpoint.path) and _is_own(part, folder)
        raw = dict(kind.load_config(folder)) if is_own else dict(part.config)
        module = kind.from_config({**raw, **_differing(part.config, raw)})
        module.config_as_loaded = dict(module.config)
    else:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        for key, value in _differing(part.config, raw).items():
            setattr(config, key, value)
        module = kind(config)
    module = module.to(torch.float32).eval().requires_grad_(False)
    lend(module, _weights(checkpoint, part, module))
    return module


def _is_own(part: Component, folder: Path) -> bool:
    """Whether a component is what its folder holds, and not one that was put together of several."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("_class_name") == part.class_name


def _differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a config has that another has not, or not so."""
    return {key: value for key, value in config.items() if key not in other or other[key] != value}


def _class(name: str) -> Any:
    """A class of the allowed libraries: diffusers', transformers', or one beside a pipeline of diffusers."""
    for library in ("diffusers", "transformers"):
        module = importlib.import_module(library)
        if hasattr(module, name):
            return getattr(module, name)
    from diffusers import pipelines

    for library in LIBRARIES:
        beside = getattr(pipelines, library, None) or getattr(pipelines.deprecated, library, None)
        if hasattr(beside, name):
            return getattr(beside, name)
    raise DexportError(f"the installed diffusers has no class {name}; install another version of it")


def _scheduler_class(name: str) -> Any:
    """A scheduler's class; files name it, and what another class loads is not to be trusted."""
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    if needed := getattr(kind, "_backends", None):  # what stands in diffusers for a class of packages that are missing
        raise DexportError(f"diffusers' {name} needs {' and '.join(needed)}; install them, or give another scheduler")
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise DexportError(f"model_index.json names {name!r:.60} as a scheduler, and diffusers has none of that name")
    return kind


def _tokenizer(checkpoint: Checkpoint, files: TokenizerFiles) -> Any:
    made = tokenizer.load(files.path, files.class_name)
    if checkpoint.words:
        made.add_tokens(list(checkpoint.words))
    return made


def _weights(checkpoint: Checkpoint, part: Component, module: torch.nn.Module) -> dict[str, Stored]:
    """The stored tensor of each parameter and buffer, by its name in the module.

    A class may have more around what we compute with (the head of a language model): it has values nowhere, and what
    is not alike by our reading shows in what the pipeline gives.
    """
    renamed = {checkpoint.family.rename(part.name, name): entry for name, entry in part.entries.items()}
    renamed |= {name: entry for name, entry in part.entries.items() if name not in renamed}
    found: dict[str, Stored] = {}
    shapes = parameter_shapes(module) | {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    for name, shape in shapes.items():
        ways = (".".join(name.split(".")[level:]) for level in range(name.count(".") + 1))
        entry = next((renamed[way] for way in ways if way in renamed and renamed[way].shape == shape), None)
        if entry is not None:
            found[name] = entry
    for name, twin in tied(module).items():
        if name not in found and twin in found:
            found[name] = found[twin]
        elif twin not in found and name in found:
            found[twin] = found[name]
    return found


def _line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    said: Iterable[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {next(iter(said), '')}"[:300]
