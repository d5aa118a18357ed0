"""A repository of the Hugging Face hub in place of a path: ``org/name[@revision]``, or a file or folder inside of it.

The files of a checkpoint are chosen as diffusers chooses them (``DiffusionPipeline.download``): the components that
model_index.json names, the configurations of each, and one set of its weights, never a pickle; here without the safety
checker, which is no part of a bundle. They lie in the hub's cache, so that nothing is fetched twice, and HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub, which does the work.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import combined, families
from runtimes.errors import DexportError, Progress, first_of, silent

PART = r"[A-Za-z0-9][\w.-]*"
PLACE = re.compile(rf"({PART}/{PART})((?:/[^/@]+)*)(?:@([^@\s]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
FILES = (".safetensors", ".json", ".txt", *PICKLES)  # no name of a repository ends so
INDEX = "model_index.json"
LEFT_OUT = ("safety_checker", "feature_extractor")
BESIDE_WEIGHTS = (".json", ".txt", ".model")  # configurations, vocabularies, sentencepiece's models
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names of a weight file
VARIANTS = ("fp32", "bf16", "fp16")  # where there is no plain file: the most exact one first


@dataclass(frozen=True)
class Repository:
    """A place on the hub: ``inside`` is a file or folder in the repository, "" for the whole."""

    name: str
    inside: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f"/{self.inside}" if self.inside else "") + (f"@{self.revision}" if self.revision else "")

    @classmethod
    def parse(cls, text: str) -> Repository | None:
        """Read ``org/name[/inside][@revision]``; None for what can be no repository."""
        found = PLACE.fullmatch(text)
        if found is None or ".." in text or "--" in found[1]:
            return None
        if not found[2] and found[1].endswith(FILES):
            return None
        return cls(found[1], found[2].removeprefix("/"), found[3])


def of(file: Path) -> str | None:
    """``org/name@commit`` of a file that lies in a cache of the hub; None for any other."""
    parts = file.absolute().parts
    for place, part in enumerate(parts):
        if part.startswith("models--") and parts[place + 1 : place + 2] == ("snapshots",) and len(parts) > place + 3:
            name = part.removeprefix("models--").replace("--", "/")
            commit = parts[place + 2]
            return f"{name}@{commit}" if PLACE.fullmatch(name) and COMMIT.fullmatch(commit) else None
    return None


def resolve(
    place: Path | str, *, revision: str | None = None, variant: str | None = None, component: bool = False,
    weights: bool = True, progress: Progress = silent,
) -> Path:  # fmt: skip
    """The path itself where there is something, else where the files lie of the repository that it names.

    revision: of the repository, as after an ``@``. variant: of its weights. component: it is one, and no whole
    checkpoint. weights: whether they are needed. A place that can be neither is left to whoever reads it. Raises
    DexportError for a revision of what has none, and for all that can go wrong with a download.
    """
    path, text = Path(place), str(place)
    found = Repository.parse(text)
    if path.exists() or found is None:
        if revision is not None:
            what = "it is on this disk" if path.exists() else "it is not one"
            raise DexportError(f"{text}: a revision is of a repository on the hub, and {what}; leave --revision out")
        _check_cache(path)
        return path
    if found.revision is not None and Path(text.rpartition("@")[0]).exists():
        raise DexportError(
            f"{text}: {text.rpartition('@')[0]} is on this disk, and has no revisions; leave @{found.revision} out for "
            "it, or run this elsewhere for the repository on the hub"
        )
    if revision is not None:
        if found.revision not in (None, revision):
            raise DexportError(f"{text}: two revisions, {found.revision} and --revision {revision}; give one of them")
        found = Repository(found.name, found.inside, revision)
    return fetch(found, variant=variant, component=component, weights=weights, progress=progress)


def _check_cache(path: Path) -> None:
    """Raise DexportError for the folder of a repository in the hub's cache, with the one that is meant."""
    if not ((path / "snapshots").is_dir() and ((path / "refs").is_dir() or (path / "blobs").is_dir())):
        return
    commits = sorted(folder.name for folder in (path / "snapshots").iterdir() if folder.is_dir())
    main = path / "refs" / "main"
    if main.is_file() and (commit := main.read_text(encoding="utf-8", errors="replace").strip()) in commits:
        commits = [commit]
    hint = f"give {path / 'snapshots' / commits[0]}" if commits else "it holds no snapshot yet; download it again"
    others = f" or another of its {len(commits)} commits" if len(commits) > 1 else ""
    raise DexportError(f"{path}: a repository in the hub's cache, which keeps one folder a commit; {hint}{others}")


def fetch(
    place: Repository, *, variant: str | None = None, component: bool = False, weights: bool = True,
    progress: Progress = silent,
) -> Path:  # fmt: skip
    """Download what is needed of a repository, if the cache has it not, and return the folder or file."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise DexportError(
            f"{place}: no such file or folder here; a repository of this name on the hub needs: pip install "
            "'dexport[hub]'"
        ) from error
    if place.inside.endswith(PICKLES):
        raise DexportError(
            f"{place}: a pickle, and opening a pickle runs whatever program is inside; it is not fetched"
        )
    with _explained(place, variant):
        progress(f"{place}: looking at its files", 0.0)
        names = _names(place)

        def download(chosen: Collection[str], commit: str | None = None) -> Path:
            return Path(
                huggingface_hub.snapshot_download(
                    place.name, revision=commit or place.revision,
                    allow_patterns=[glob.escape(name) for name in chosen],
                    tqdm_class=_bar(f"{place}: downloading", progress), max_workers=4,
                )
            )  # fmt: skip

        if place.inside in names:
            return download([place.inside]) / place.inside
        inside = f"{place.inside}/" if place.inside else ""
        below = {name.removeprefix(inside) for name in names if name.startswith(inside)}
        if not below:
            raise DexportError(f"{place}: the repository holds no {place.inside!r}; it holds {first_of(sorted(names))}")
        index: dict[str, Any] = {}
        commit = None
        if INDEX in below and not component:
            snapshot = download([inside + INDEX])
            commit = snapshot.name  # a branch may move on between the two downloads
            index = json.loads((snapshot / inside / INDEX).read_text(encoding="utf-8"))
        chosen = choose(str(place), below, index, variant=variant, component=component, weights=weights)
        return download([inside + name for name in chosen], commit) / inside


def _names(place: Repository) -> set[str]:
    """The names of a repository's files; without a network, as the cache has kept them."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled

    try:
        found = huggingface_hub.HfApi().model_info(place.name, revision=place.revision)
    except OfflineModeIsEnabled:
        try:
            tree = huggingface_hub.get_cached_repo_tree(place.name, revision=place.revision)
            return {file.path for file in tree}
        except CachedRepoTreeNotFoundError:  # what an older client downloaded
            folder = Path(huggingface_hub.snapshot_download(place.name, revision=place.revision, local_files_only=True))
            return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {file.rfilename for file in found.siblings or ()}


def choose(
    place: str, names: Collection[str], index: dict[str, Any], *, variant: str | None = None, component: bool = False,
    weights: bool = True,
) -> list[str]:  # fmt: skip
    """The files that are needed out of ``names``, those of a checkpoint with this model_index.json, or of a component.

    Raises DexportError for a pipeline that is not exported, and for weights that are missing, pickles, or of no such
    variant.
    """
    if not index:
        if "config.json" not in names:
            what = "a whole checkpoint; name the folder of the one component in it" if INDEX in names else (
                f"no checkpoint: it has no {'config.json' if component else INDEX}; to take one file of it, name that, "
                f"like {place.partition('@')[0]}/{_example(names)}"
            )  # fmt: skip
            raise DexportError(f"{place}: {what}")
        parts = {"": names}
        weights = weights and component  # of what is no checkpoint the configuration is enough, to say what it is
    else:
        _check_class(index)
        left = index.get("_ignore_files", [])
        kept = [name for name in names if name not in left] if isinstance(left, list) else names
        parts = {
            part: {name.removeprefix(f"{part}/") for name in kept if name.startswith(f"{part}/")}
            for part, pair in index.items()
            if isinstance(pair, list) and pair and pair[0] is not None and part not in LEFT_OUT
        }
    chosen, found = [INDEX] if index else [], False
    for part, files in parts.items():
        inside = f"{part}/" if part else ""
        chosen += [inside + name for name in files if _is_configuration(name)]
        if weights and "config.json" in files:
            own = weight_files(files, variant)
            if not own:
                raise _no_weights(place, part, files)
            found = found or any(is_variant(name, variant) for name in own)
            chosen += [inside + name for name in own]
    if weights and variant is not None and not found:
        raise no_variant(place, variant, [name for files in parts.values() for name in files])
    return sorted(set(chosen))


def _check_class(index: dict[str, Any]) -> None:
    """Refuse a pipeline that is not exported before gigabytes are fetched."""
    name = str(index.get("_class_name"))
    if name not in {*combined.COMBINED, *(prior for prior, _ in combined.COMBINED.values())}:
        families.find(families.SAME.get(name, name))


def _is_configuration(name: str) -> bool:
    return "/" not in name and name.endswith(BESIDE_WEIGHTS) and ".index." not in name


def weight_files(names: Collection[str], variant: str | None = None) -> list[str]:
    """The weights of a component out of the names in its folder: one file, or an index with its shards; [] for none.

    variant: preferred where it is there, as by diffusers; else the plain files, then those of ``VARIANTS``, then any.
    """
    others = sorted(
        name.removeprefix(f"{stem}.").removesuffix(".safetensors")
        for stem in STEMS
        for name in names
        if re.fullmatch(rf"{stem}\.(?!.*-\d+-of-\d+).+\.safetensors", name)
    )
    for own in (*([variant] if variant else []), "", *VARIANTS, *others):
        dotted = f".{own}" if own else ""
        for stem in STEMS:
            if f"{stem}{dotted}.safetensors" in names:
                return [f"{stem}{dotted}.safetensors"]
            index = f"{stem}.safetensors.index{dotted}.json"
            if index in names:
                # "stem.fp16-00001-of-00002.safetensors", and as diffusers once wrote it "stem-00001-of-00002.fp16..."
                shard = re.compile(
                    rf"{stem}({re.escape(dotted)}-\d+-of-\d+|-\d+-of-\d+{re.escape(dotted)})\.safetensors"
                )
                return [index, *sorted(name for name in names if shard.fullmatch(name))]
    return []


def is_variant(name: str, variant: str | None) -> bool:
    """Whether a file of weights is of a variant, by its name."""
    return variant is not None and re.search(rf"\.{re.escape(variant)}(\.|-\d)", name) is not None


def no_variant(place: Path | str, variant: str, names: Collection[str]) -> DexportError:
    """The refusal of a variant that no component has, with those that there are."""
    every = {found[1] for name in names if (found := re.search(r"(?:model|index)\.(\w+)(?:-\d+-of-\d+)?\.\w+$", name))}
    known = sorted(every - {"safetensors", "index", "bin"})
    there = f"there is {' and '.join(known)}" if known else "there is none"
    return DexportError(
        f"{place}: no weights of the variant {variant!r}; {there}; leave --variant out for the plain files"
    )


def _no_weights(place: str, part: str, files: Collection[str]) -> DexportError:
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    what = f"{part or 'it'} has no .safetensors weights"
    if pickles:
        what += f", only {pickles[0]}, a pickle, which is not opened; look for another revision, or convert it"
    return DexportError(f"{place}: {what}")


def _example(names: Collection[str]) -> str:
    return next((name for name in sorted(names) if name.endswith(".safetensors")), "FILE.safetensors")


def _bar(what: str, progress: Progress) -> Any:
    """A class of bars that tells ``progress`` how far the bytes are, and draws none."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[type-arg, misc]  # it has no types
        def __init__(self, *args: Any, **options: Any) -> None:
            self._bytes = options.get("unit") == "B"
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.done = float(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.done += n or 0
            if self._bytes and self.total:
                progress(what, min(self.done / self.total, 1.0))
            return None

    return Bar


def command(place: Repository, variant: str | None) -> str:
    """What downloads a place into the hub's cache, on a machine with a network and the same cache."""
    revision = f" --revision {place.revision}" if place.revision else ""
    if place.inside.endswith(".safetensors"):
        return f"hf download {place.name} {place.inside}{revision}"
    wanted = ("*.json", "*.txt", "*.model", f"*.{variant}.safetensors" if variant else "*.safetensors")
    below = f"{place.inside}/" if place.inside else ""
    return f"hf download {place.name}{revision} " + " ".join(f'--include "{below}{name}"' for name in wanted)


@contextlib.contextmanager
def _explained(place: Repository, variant: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except DexportError:
        raise
    except json.JSONDecodeError as error:
        raise DexportError(f"{place}: {INDEX} is not valid JSON ({error}); download it again") from error
    except Exception as error:
        words = _words(error, place, variant)
        if words is None:
            raise
        raise DexportError(f"{place}: {words}") from error


def _words(error: Exception, place: Repository, variant: str | None) -> str | None:
    """What an error of a download means and what to do; None for one that is none of those."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, errors.GatedRepoError):
        return f"gated; accept its licence at {endpoint}/{place.name}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such file or folder here, and no such repository on {endpoint}, or a private one; check the name, and "
            "set HF_TOKEN for one that is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {place.revision!r}; leave it out for the newest"
    if isinstance(error, errors.HFValidationError):
        return "no such file or folder here, and no name that a repository on the hub can have"
    missing = isinstance(error, errors.LocalEntryNotFoundError)  # so called after a fault of the network too
    if isinstance(error, errors.OfflineModeIsEnabled) or (missing and constants.HF_HUB_OFFLINE):
        return (
            f"HF_HUB_OFFLINE is set, and its copy in {cache} is missing or not whole; with a network, download it: "
            f"{command(place, variant)}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return f"the hub refuses it ({status}); set HF_TOKEN to a token that may read it"
        return f"the hub answers with an error ({status or error}); try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of {cache} is full; make room, or set HF_HOME to another"
    if missing or isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
        cause = type(error.__cause__ if missing and error.__cause__ else error).__name__
        return (
            f"no such file or folder here, and {endpoint} cannot be reached ({cause}); HF_HUB_OFFLINE=1 takes what its "
            f"cache has, and with a network this downloads it: {command(place, variant)}"
        )
    return " ".join(str(error).split())[:300] if isinstance(error, OSError) else None
