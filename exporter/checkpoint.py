"""Read a checkpoint: which classes it names, their configs, and where each weight lies. Loads no weight.

A checkpoint is a diffusers folder, or one .safetensors file (``exporter.single_file``) with a folder that has all but
the weights. Nothing in either is trusted: classes come from our own list (never an import of what a file says), weights
only from .safetensors that pass every check of their headers, and no pickle is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import (
    autoencoder,
    combined,
    families,
    foreign,
    lora,
    motion,
    repository,
    single_file,
    textual_inversion,
    tiny_decoder,
)  # fmt: skip
from exporter import clip_skip as clip_skips
from exporter.repository import PICKLES, STEMS
from runtimes import samplers, strict_json
from runtimes.bundle import hash_file
from runtimes.errors import DexportError, Progress, silent, with_article
from runtimes.manifest import Adapter, SourceFile
from runtimes.safetensors import Entry, Stored, check_finite, gguf, read_header

if TYPE_CHECKING:
    from exporter import tokenizer

GGUF = ".gguf"
# A component of another library is code that comes with the checkpoint; the last ones are modules of diffusers.
LIBRARIES = ("diffusers", "transformers", "latent_diffusion", "stable_cascade", "unclip", "wuerstchen")
# What is given beside a checkpoint in a folder of its own, by the class that its config.json names.
BESIDE = {
    "ControlNetModel": "--control", "T2IAdapter": "--control", "CLIPVisionModelWithProjection": "--image-encoder",
    "MotionAdapter": "--motion-adapter", "ConsistencyDecoderVAE": "--decoder", "AutoencoderTiny": "--decoder",
    "AutoencoderKL": "--vae",
}  # fmt: skip
BY_DECODER = ("ConsistencyDecoderVAE", "AutoencoderTiny")  # what --decoder takes, and --vae does not
ReadFile = Callable[[Path, Mapping[str, Entry]], tuple[Mapping[str, Any], Mapping[str, Stored]]]
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "added_tokens.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its class, its config.json, and its tensors by diffusers' names of any version.

    ``path`` is where its weights come from, for messages: its folder, or the file that holds the whole checkpoint.
    ``unused``: tensors beside them that its class does not use.
    """

    name: str
    class_name: str
    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Stored]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer of a pipeline: its class, and the folder of its files."""

    class_name: str
    path: Path

    @cached_property
    def made(self) -> tokenizer.Made:
        """The tokenizer, which transformers makes when it is first asked for; DexportError for damaged files."""
        from exporter import tokenizer

        return tokenizer.read(self.path, self.class_name)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked.

    ``path`` is the folder or file, for messages. ``tokenizers`` are by component; ``files`` those that an
    export depends on, by the path that a manifest gives them; ``adapters`` what is merged into the weights. ``index``:
    what model_index.json says, of which only what is not asked for here has further use. ``scheduler`` is that of the
    main stage; ``schedulers`` are all by component, where a family has several. ``refiner``: what goes on with the
    pictures that this one draws; ``steps`` and ``guidance``: defaults in place of the family's; ``chunks``: how many
    times as long as its text encoder takes a prompt may be (exporter.ensemble); ``words``: what its tokenizers have
    beyond their files (exporter.textual_inversion); ``hints``: the components that steer by a picture (exporter.hints).
    ``frames``: those of a video, None for the family's own. ``unused``: tensors of a single file that are of no
    component.
    """

    path: Path
    pipeline: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, TokenizerFiles]
    files: Mapping[str, Path]
    adapters: tuple[Adapter, ...] = ()
    schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    refiner: Checkpoint | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    hints: tuple[str, ...] = ()
    chunks: int = 1
    words: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it, a line each: which tensors of its files were left out."""
        own = [foreign.said(f"{self.path.name}: a {self.pipeline}", self.unused)] if self.unused else []
        own += [
            foreign.said(f"{part.name}: a {part.class_name}", part.unused)
            for part in self.components.values()
            if part.unused
        ]
        return (*own, *(f"refiner: {note}" for note in (self.refiner.notes if self.refiner else ())))

    @property
    def family(self) -> families.Family:
        """The family that the pipeline's class belongs to."""
        return families.find(self.pipeline)

    @property
    def in_memory(self) -> bool:
        """Whether the weights lie in no file."""
        return False

    def source(self) -> tuple[SourceFile, ...]:
        """Size, sha256 and repository of every file that an export depends on; reads them all."""
        return tuple(
            SourceFile(path, file.stat().st_size, hash_file(file), repository.of(file))
            for path, file in sorted(self.files.items())
        )


def read(
    path: Path,
    *,
    config: Path | str | None = None,
    prior: Path | str | None = None,
    loras: Sequence[Path | str] = (),
    embeddings: Sequence[Path | str] = (),
    clip_skip: int = 1,
    motion_adapter: Path | str | None = None,
    vae: Path | str | None = None,
    variant: str | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> Checkpoint:
    """Read a diffusers folder or a single file and check it; with ``check``, look through all weights for NaN too.

    ``config`` is for a single file: the name of a configuration in ``exporter/configs``, or a diffusers folder whose
    weights are not looked at; by default the kind is read from the file. ``prior``: the folder of the prior that a
    decoder was saved without (exporter.combined). ``loras``: files to merge, each "FILE" or "FILE:SCALE";
    ``embeddings``: likewise, "FILE" or "FILE:WORD". ``clip_skip``: which layer's states of the text encoder are used,
    counted from the last, 1. ``motion_adapter``: the folder of one to join to the UNet (exporter.motion). ``vae``: an
    autoencoder in place of the checkpoint's own (exporter.autoencoder). ``variant``: of the weights in a folder, like
    "fp16", where a component has it. Raises DexportError for what is missing, damaged, unsupported, or only there as a
    pickle.
    """
    path = Path(path)
    header = read_header(path) if path.is_file() and path.suffix == ".safetensors" else None
    if header is None and config is not None:
        raise DexportError(f"{path}: a configuration (--config) is for a single .safetensors file; leave it out")
    if header is not None:
        foreign.check_plain(path, header)
    if header is not None and variant is not None:
        raise DexportError(f"{path}: a variant is of a folder's weights, and this is one file; leave --variant out")
    folder = path if header is None else single_file.configuration(path, header, config)
    index, place = _read_index(folder), combined.Place(folder, None if prior is None else Path(prior))
    if place.prior is not None:
        index = combined.join(folder, index, place.prior, _read_index(place.prior))
    combined.check_whole(folder, index)
    if not isinstance(index.get("_class_name"), str):
        raise DexportError(f"{folder}: model_index.json names no pipeline class; copy or download it again")
    pipeline = str(index["_class_name"])
    pipeline = families.SAME.get(pipeline, pipeline)
    family = families.find(pipeline)
    names = families.schedulers(family)
    classes, configs, tokenizers = {}, {}, {}
    used = {"model_index.json", *(f"{name}/scheduler_config.json" for name in names)}
    for name, allowed in family.COMPONENTS.items():
        if (None in allowed and index.get(name) in (None, [None, None])) or (name == autoencoder.NAME and vae):
            continue
        classes[name] = _class_of(folder, index, name)
        if classes[name] not in allowed:
            known = " or ".join(filter(None, allowed))
            raise DexportError(f"{folder}: {name} is a {classes[name]}; a {pipeline} is exported with {known}")
        if classes[name] in families.TOKENIZERS:
            tokenizers[name] = TokenizerFiles(classes[name], place / name)
            used |= {f"{name}/{file}" for file in TOKENIZER_FILES if (place / name / file).is_file()}
        else:
            configs[name] = read_json(place / name / "config.json")
            if header is None:
                foreign.check_config(place / name / "config.json", configs[name])
            if classes[name] == tiny_decoder.CLASS:
                configs[name] = tiny_decoder.completed(configs[name])
            used.add(f"{name}/config.json")
    files = {name: place / name for name in used}
    schedulers = {
        name: _read_scheduler(place / name / "scheduler_config.json", _class_of(folder, index, name)) for name in names
    }
    scheduler = schedulers[names[0]]
    weights: Mapping[str, Mapping[str, Stored]]
    if header is None:
        weights = {name: read_weights(place / name, name, files, variant) for name in configs}
        if variant is not None and not any(repository.is_variant(name, variant) for name in files):
            raise repository.no_variant(path, variant, [file.name for file in path.glob("*/*")])
    else:
        weights = single_file.convert(path, header, configs, without=autoencoder.NAME if vae else None)
        scheduler = {**scheduler, **single_file.scheduler_options(header)}
        files[path.name] = path
        if folder.parent == single_file.CONFIGS:
            files |= {f"{name}/merges.txt": single_file.CONFIGS / "merges.txt" for name in tokenizers}
    components = {
        name: component(name, classes[name], path if header else place / name, configs[name], weights[name])
        for name in configs
    }
    if check:
        for index_, part in enumerate(components.values()):
            progress(f"{part.name}: checking weights", index_ / len(components))
            check_finite(part.entries.values())
    found = Checkpoint(
        path, pipeline, components, scheduler, tokenizers, files, schedulers=schedulers, index=index,
        unused=single_file.unused(header or {}),
    )  # fmt: skip
    if vae is not None:
        found = _with_autoencoder(found, Path(vae), place / autoencoder.NAME / "config.json", variant)
    if motion_adapter is not None:
        found = add(motion.animated(found), motion.ADAPTER, Path(motion_adapter), (motion.CLASS,), variant=variant)
    found = motion.join(found)
    return clip_skips.skip(textual_inversion.merge(lora.merge(found, loras), embeddings), clip_skip)


def component(
    name: str, class_name: str, path: Path, config: Mapping[str, Any], entries: Mapping[str, Stored]
) -> Component:
    """A component with the weights of its class, and apart from them what that does not use."""
    used, unused = foreign.split(class_name, entries)
    return Component(name, class_name, path, config, used, unused)


def add(
    checkpoint: Checkpoint, name: str, path: Path, classes: Sequence[str], read_file: ReadFile | None = None,
    variant: str | None = None,
) -> Checkpoint:  # fmt: skip
    """The checkpoint with one more component, of one of ``classes``, from a folder of its own.

    read_file: gives the config.json and the tensors of one .safetensors file, where that may stand for a folder. Raises
    DexportError for what is not there, and for another class.
    """
    files = dict(checkpoint.files)
    if read_file is not None and path.is_file():
        if path.suffix in PICKLES:
            raise _pickle(path)
        config, weights = read_file(path, read_header(path))
        files[f"{name}/{path.name}"] = path
    elif not path.is_dir():
        raise DexportError(f"{path}: no such folder{' or file' * (read_file is not None)}")
    else:
        config = read_json(path / "config.json")
        if config.get("_class_name") not in classes:
            wanted = " or ".join(map(with_article, classes))
            raise DexportError(f"{path}: its class is {config.get('_class_name')!r:.60}; it must be {wanted}")
        files[f"{name}/config.json"] = path / "config.json"
        weights = read_weights(path, name, files, variant)
    check_finite(weights.values())
    part = component(name, str(config["_class_name"]), path, config, weights)
    return replace(checkpoint, components={**checkpoint.components, name: part}, files=files)


def _with_autoencoder(checkpoint: Checkpoint, path: Path, own: Path, variant: str | None) -> Checkpoint:
    """The checkpoint with the autoencoder at ``path``; ``own``: where the config.json of its own one would lie."""
    allowed = checkpoint.family.COMPONENTS.get(autoencoder.NAME)
    if allowed is None:
        raise DexportError(f"{checkpoint.path}: a {checkpoint.pipeline} has no autoencoder to replace; leave --vae out")
    found = autoencoder.find_config(own, checkpoint.pipeline)
    config = None if found is None else read_json(found)
    classes = [name for name in allowed if name not in (None, *BY_DECODER)]

    def read_file(file: Path, header: Mapping[str, Entry]) -> tuple[Mapping[str, Any], Mapping[str, Stored]]:
        return autoencoder.from_file(file, header, config)

    checkpoint = add(checkpoint, autoencoder.NAME, path, [str(name) for name in classes], read_file, variant)
    if path.is_file() and found is not None:
        checkpoint = replace(checkpoint, files={**checkpoint.files, "vae/config.json": found})
    autoencoder.check(
        checkpoint, config if found == own else None
    )  # others of the same pipeline may have other latents
    return checkpoint


def _read_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json, or say what the path is instead of a diffusers folder."""
    if folder.is_file():
        if folder.suffix in PICKLES:
            raise _pickle(folder)
        if folder.suffix == GGUF:
            raise gguf(folder)
        raise DexportError(
            f"{folder}: a file; a checkpoint is a diffusers folder with model_index.json, or one .safetensors file"
        )
    if not folder.is_dir():
        raise DexportError(f"{folder}: no such folder")
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise _pickle(path)
    if (folder / "config.json").is_file():
        if (folder.parent / "model_index.json").is_file():
            raise DexportError(f"{folder}: one component of a checkpoint; give the whole: {folder.parent}")
        for name in classes_of(read_json(folder / "config.json")):
            if name in BESIDE:
                raise DexportError(
                    f"{folder}: {with_article(name)}; give it beside its checkpoint, with {BESIDE[name]}"
                )
    raise DexportError(f"{folder}: not a diffusers checkpoint: it has no model_index.json")


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names: diffusers' of it, transformers' several."""
    several = config.get("architectures")
    named = [config.get("_class_name"), *(several if isinstance(several, list) else [])]
    return [name for name in named if isinstance(name, str)]


def _pickle(path: Path) -> DexportError:
    """The refusal of a pickle, with the way to convert it."""
    if path.suffix == ".bin":
        how = "DiffusionPipeline.from_pretrained(IN, use_safetensors=False)"
    else:
        how = "StableDiffusionPipeline.from_single_file(IN)"
    return DexportError(
        f"{path}: a pickle, and opening a pickle runs whatever program is inside; where you trust it, convert it to "
        f"safetensors with diffusers: {how}.save_pretrained(OUT)"
    )


def _class_of(folder: Path, index: Mapping[str, Any], name: str) -> str:
    """The class that model_index.json names for a component: ``"unet": ["diffusers", "UNet2DConditionModel"]``."""
    pair = index.get(name)
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
        advice = "; give one with --vae" if name == autoencoder.NAME else "; the checkpoint is not whole"
        raise DexportError(f"{folder}: model_index.json names no {name!r}{advice}")
    if pair[0] not in LIBRARIES:
        raise DexportError(
            f"{folder}: {name} is a {pair[1]!r:.60} of {pair[0]!r:.60}; only classes of {' and '.join(LIBRARIES[:2])} "
            "are exported, since others would run a program that comes with the checkpoint"
        )
    return pair[1]


def _read_scheduler(path: Path, class_name: str) -> dict[str, Any]:
    """Read scheduler_config.json; the class is the one that model_index.json names, as in diffusers."""
    return finite_config(path, {**read_json(path, finite=False), "_class_name": class_name})


def finite_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config without the infinities that diffusers writes for what is not limited.

    ``path`` is where it is from. JSON has no infinity; where it is the default anyway, or no option of the class, it
    says nothing.
    """
    limited = dict(config)
    for name, value in config.items():
        if all(math.isfinite(number) for number in _numbers(value)):
            continue
        kind = str(config["_class_name"])
        if samplers.knows(kind, name) and value != samplers.default_of(kind, name):
            raise DexportError(f"{path}: {name}={value!r:.60} is not a finite number; set it to one or leave it out")
        del limited[name]
    return limited


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a configuration; DexportError for one that is missing or no JSON object."""
    if not path.is_file():
        if (path.parent / "model_index.json").is_file():
            raise DexportError(f"{path.parent}: a whole checkpoint; give the folder of the one component that is meant")
        raise DexportError(f"{path}: missing; the checkpoint is not whole")
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8"), finite=finite)
    except ValueError as error:
        raise DexportError(f"{path}: not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise DexportError(f"{path}: not a JSON object; copy or download it again")
    return value


def read_weights(
    folder: Path, component: str, files: dict[str, Path], variant: str | None = None
) -> Mapping[str, Stored]:
    """Return a component's tensors by name; add the files that they come from (an index included) to ``files``.

    Raises DexportError for what is missing, damaged or quantized, and for a pickle.
    """
    entries = _read_weights(folder, component, files, variant)
    foreign.check_plain(folder, entries)
    return entries


def _read_weights(folder: Path, component: str, files: dict[str, Path], variant: str | None) -> Mapping[str, Stored]:
    for name in repository.weight_files({path.name for path in folder.glob("*") if path.is_file()}, variant)[:1]:
        if name.endswith(".json"):
            return _read_shards(folder / name, component, files)
        files[f"{component}/{name}"] = folder / name
        return read_header(folder / name)
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLES:
            raise _pickle(path)
        if path.suffix == GGUF:
            raise gguf(path)
    raise DexportError(f"{folder}: no weights: expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _read_shards(index: Path, component: str, files: dict[str, Path]) -> Mapping[str, Stored]:
    """Read the shards that an index lists; index and headers must agree on where each tensor is."""
    places = read_json(index).get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values())):
        raise DexportError(f"{index}: no weight_map; copy or download it again")
    entries: dict[str, Stored] = {}
    files[f"{component}/{index.name}"] = index
    for name in sorted(set(places.values())):
        file = index.parent / name
        if Path(name).name != name or file.suffix != ".safetensors":
            raise DexportError(f"{index}: {name!r} is not the name of a .safetensors file beside it")
        if not file.is_file():
            raise DexportError(f"{file}: missing, though {index.name} lists it; copy or download it")
        for key, entry in read_header(file).items():
            if places.get(key) != name:
                raise DexportError(f"{file}: tensor {key!r} is not listed for this file in {index.name}")
            entries[key] = entry
        files[f"{component}/{name}"] = file
    if missing := sorted(set(places) - set(entries)):
        raise DexportError(f"{index}: tensor {missing[0]!r} is not in {places[missing[0]]}; copy or download it again")
    return entries
