"""Small changes to the files of a checkpoint that diffusers' loaders and constructors treat in ways of their own.

What a checkpoint was saved with years ago, what a training script left out, what two files say against each other: each
is one change to one JSON file of a small checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], None]

# Other values of an option that has a few.
VALUES: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "interpolation_type": ("linear", "log_linear"),
    "variance_type": ("fixed_small", "fixed_large", "learned_range"),
    "act_fn": ("silu", "gelu"),
    "hidden_act": ("quick_gelu", "gelu"),
    "time_shift_type": ("exponential", "linear"),
    "padding_side": ("right", "left"),
}
# Schedulers that a model_index.json may name over a config of another one.
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SIZES = ("steps_offset", "sample_size", "model_max_length", "max_position_embeddings")
# What a file is of, by how its name starts; all others are of components.
KINDS = {
    "model_index": "model_index.json", "scheduler_config": "scheduler", "tokenizer_config": "tokenizer",
    "special_tokens_map": "tokenizer", "added_tokens": "tokenizer", "vocab": "tokenizer",
}  # fmt: skip
OLD = "0.4.0"  # of diffusers: before most of what constructors repair
# Options that old files have, or that are added by hand, by the kind of file.
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "scheduler_config.json": {"clip_sample": True, "steps_offset": 0, "skip_prk_steps": False, "set_alpha_to_one": True,
                              "predict_epsilon": True, "an_unknown_option": 1, "use_karras_sigmas": True},
    "model_index.json": {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
                         "requires_safety_checker": True, "an_unknown_option": 1},
    "config.json": {"an_unknown_option": 1},
    "tokenizer_config.json": {"add_prefix_space": True, "do_lower_case": False, "padding_side": "left"},
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change: its kind, for the table; its name; the file, relative to the checkpoint; and what it does to that."""

    kind: str
    name: str
    file: str
    change: Change

    def apply(self, folder: Path) -> None:
        """Change the file in a copy of the checkpoint."""
        path = folder / self.file
        content = json.loads(path.read_text(encoding="utf-8"))
        self.change(content)
        path.write_text(json.dumps(content), encoding="utf-8")


def mutations(folder: Path) -> Iterator[Mutation]:
    """All the changes to a checkpoint's files."""
    for path in sorted(folder.rglob("*.json")):
        file = path.relative_to(folder).as_posix()
        if path.name not in ("tokenizer.json", "vocab.json") and not path.name.endswith(".index.json"):
            yield from _of_file(file, json.loads(path.read_text(encoding="utf-8")))
    yield from _of_classes(folder)


def _of_file(file: str, content: dict[str, Any]) -> Iterator[Mutation]:
    of = next((kind for start, kind in KINDS.items() if Path(file).name.startswith(start)), "component")
    for key, value in content.items():
        if isinstance(value, list) and of == "model_index.json":
            continue  # a component
        yield Mutation(f"{of}: an option left out", f"{file}: without {key}", file, _without(key))
        for other in _others(key, value):
            yield Mutation(f"{of}: another value", f"{file}: {key}={other!r}", file, _with(key, other))
    for key, value in EXTRA.get(Path(file).name, {}).items():
        if content.get(key) != value:
            yield Mutation(f"{of}: an option added", f"{file}: {key}={value!r}", file, _with(key, value))
    if "_diffusers_version" in content:
        yield Mutation(f"{of}: saved long ago", f"{file}: version {OLD}", file, _with("_diffusers_version", OLD))


def _others(key: str, value: Any) -> Iterator[Any]:
    """Other values of an option, which may give another image and must not be overlooked."""
    if key in VALUES:
        yield from (other for other in VALUES[key] if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, float) and value:
        yield value * 0.9
    elif key in SIZES and isinstance(value, int):
        yield from (value // 2, value + 1)


def _of_classes(folder: Path) -> Iterator[Mutation]:
    """model_index.json and scheduler_config.json that name different schedulers."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if name.endswith("scheduler") and isinstance(value, list):
            known = FLOW_SCHEDULERS if "Flow" in value[1] else SCHEDULERS
            for other in known:
                if other != value[1]:
                    what = f"model_index.json: {name} is a {other}"
                    yield Mutation("two classes of scheduler", what, "model_index.json", _with(name, [value[0], other]))
                    what = f"{name}/scheduler_config.json: _class_name={other}"
                    file = f"{name}/scheduler_config.json"
                    yield Mutation("two classes of scheduler", what, file, _with("_class_name", other))


def _without(key: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        del content[key]

    return change


def _with(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        content[key] = value

    return change
