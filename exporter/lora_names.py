"""The names that trainers give to a LoRA's tensors, brought to PEFT's: "transformer.<module>.lora_A.weight".

What diffusers' pipelines convert is left to them, with handles in place of the tensors (``exporter.handles``). They
differ in what they do to an alpha: some multiply by it, some give it back, some forget it. So it is taken out before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from runtimes.errors import DexportError, first_of
from runtimes.safetensors import Entry, Stored

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # as diffusers prefixes names
FACTOR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
DOWN = re.compile(r"(.*)\.(?:lora_down|lora_A|lora_A\.default|lora\.down|lora_linear_layer\.down)\.weight")
# DoRA's length of each row of a weight: kohya's, PEFT's.
LENGTHS = re.compile(r"(.*)\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)")
KOHYA = re.compile(r"(.*)\.lora_down\.weight")  # with an alpha beside it
OWN = re.compile(r"^(?:diffusion_model\.|lora_unet_)")  # before a module of the main model
# kohya's and ComfyUI's names of text encoders beside a transformer: CLIP, the larger CLIP, T5.
TEXT = re.compile(r"(?:lora_te([123]?)_|text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.)(?:text_model[._])?(.*)")
TEXTS = {"": 1, "1": 1, "clip_l": 1, "2": 2, "clip_g": 2, "3": 3, "t5xxl": 3}
# Black Forest Labs' modules with PEFT's factors; diffusers converts some only where a file has all of a model's layers.
FLUX = re.compile(
    r"(?:diffusion_model\.)?((?:(?:double|single)_blocks|(?:img|txt|time|vector|guidance)_in|final_layer)\b.*)"
    r"\.lora_([AB])\.weight"
)
# Stability's modules of SD 3 with dots as underscores, which diffusers does not convert, and diffusers' own. A fused
# one is for several.
SD_3 = (
    (r"x_block_(attn2?)_qkv", r"{}.to_q {}.to_k {}.to_v"),
    (r"context_block_(attn)_qkv", r"{}.add_q_proj {}.add_k_proj {}.add_v_proj"),
    (r"x_block_(attn2?)_proj", r"{}.to_out.0"),
    (r"context_block_(attn)_proj", r"{}.to_add_out"),
    (r"x_block_mlp_fc1", r"ff.net.0.proj"),
    (r"x_block_mlp_fc2", r"ff.net.2"),
    (r"context_block_mlp_fc1", r"ff_context.net.0.proj"),
    (r"context_block_mlp_fc2", r"ff_context.net.2"),
    (r"x_block_adaLN_modulation_1", r"norm1.linear"),
    (r"context_block_adaLN_modulation_1", r"norm1_context.linear"),
)
SD_3_REST = {
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
SHOWN = 120  # characters of what a converter of diffusers says


@dataclass(frozen=True)
class Factors:
    """The factors of a file by (target, "A" or "B"); by the names that "A" has in the file alpha / rank, and DoRA's
    lengths.
    """

    found: Mapping[tuple[str, str], Stored]
    scales: Mapping[str, float]
    lengths: Mapping[str, Stored]


def flat(name: str) -> str:
    """The name with its dots as underscores, as kohya writes it, which no converter brings back with certainty.

    The level "text_model" of CLIP, which transformers dropped from some classes, is left out.
    """
    return name.replace(".text_model.", ".").replace(".", "_")


def convert(file: Path, entries: Mapping[str, Entry], checkpoint: Checkpoint) -> Factors:
    """Find the factors of a LoRA for a checkpoint; DexportError for what is none, and tensors that have no use."""
    import torch

    from exporter.handles import handle, stored
    from exporter.trace import quiet

    downs = {match[1]: entry for name, entry in entries.items() if (match := DOWN.fullmatch(name))}
    scales, lengths = _scales(file, entries, downs), _lengths(file, entries, downs)
    entries = {name: entry for name, entry in entries.items() if not LENGTHS.fullmatch(name)}
    state: dict[str, Any] = {}
    done: dict[str, Any] = {}  # needs no converter
    for name, entry in entries.items():
        if name.endswith(".alpha"):
            continue
        given = _rename(name, checkpoint)
        if given.partition(".")[0] in COMPONENTS[1:]:
            done[given] = handle(entry)
            continue
        state[given] = handle(entry)
        if match := KOHYA.fullmatch(given):
            state[f"{match[1]}.alpha"] = torch.tensor(float(_rank(entry)))  # a factor 1
    try:
        with quiet():
            named = _to_peft({**(_pipelines(state, checkpoint) if state else {}), **done}, checkpoint)
    except Exception as error:  # diffusers' converters fail in their own ways over names that they do not expect
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise DexportError(
            f"{file}: not a LoRA that can be read, or one for another model than a {checkpoint.pipeline} "
            f"({said[:SHOWN]}{'...' * (len(said) > SHOWN)})"
        ) from error
    factors: dict[tuple[str, str], Stored] = {}
    strange = []
    for name, value in named.items():
        if match := FACTOR.fullmatch(name):
            factors[match[1], match[2]] = stored(value)
        elif not name.endswith(".alpha"):
            strange.append(name)
    if not strange:  # converters leave out what they do not know; zeros add nothing
        used = {factor.name for factor in factors.values()}
        rest = [entry for name, entry in entries.items() if name not in used and not name.endswith(".alpha")]
        strange = [entry.name for entry in rest if entry.load().any()]
    if strange or not factors:
        what = f"{first_of(sorted(strange))} belongs to no LoRA" if strange else "it holds no LoRA"
        raise DexportError(
            f"{file}: {what}; only LoRA, LoCon and DoRA, in kohya's, diffusers' or PEFT's names, are merged"
        )
    return Factors(factors, scales, lengths)


def _lengths(file: Path, entries: Mapping[str, Entry], downs: Mapping[str, Entry]) -> dict[str, Stored]:
    """DoRA's lengths by the name of the factor that they stand beside."""
    lengths: dict[str, Stored] = {}
    for name, entry in entries.items():
        if match := LENGTHS.fullmatch(name):
            if match[1] not in downs:
                raise DexportError(f"{file}: {name!r} stands beside no factors; the file is not whole")
            lengths[downs[match[1]].name] = entry
    return lengths


def _scales(file: Path, entries: Mapping[str, Entry], downs: Mapping[str, Entry]) -> dict[str, float]:
    """alpha / rank by the name of the factor that an alpha stands beside."""
    scales = {}
    for name, entry in entries.items():
        if not name.endswith(".alpha"):
            continue
        down, values = downs.get(name.removesuffix(".alpha")), entry.load().reshape(-1)
        if down is None or len(values) != 1:
            raise DexportError(f"{file}: {name!r} is no number beside factors; the file is not whole")
        scales[down.name] = float(values[0]) / _rank(down)
    return scales


def _rank(entry: Entry) -> int:
    return max(entry.shape[0] if entry.shape else 0, 1)


def _rename(name: str, checkpoint: Checkpoint) -> str:
    """The name that a converter is given: one that it knows, or one under its component, which needs no converter."""
    name = name.removeprefix("base_model.model.")
    if "transformer" not in checkpoint.components:
        return name
    if match := TEXT.fullmatch(name):
        number = TEXTS[match[1] or match[2] or ""]
        if number == 3 and "text_encoder_3" not in checkpoint.family.COMPONENTS:
            number = 2  # Flux's T5
        return f"text_encoder{'' if number == 1 else f'_{number}'}.{match[3]}"
    if checkpoint.pipeline == "FluxPipeline" and (match := FLUX.fullmatch(name)):
        return f"diffusion_model.{match[1]}.lora_{'down' if match[2] == 'A' else 'up'}.weight"
    return re.sub("^lora_transformer_", "transformer.", name)


def _pipelines(state: dict[str, Any], checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the checkpoint's pipeline in diffusers makes of the names; Stable Diffusion's, where it makes nothing."""
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    if checkpoint.pipeline == "StableDiffusion3Pipeline":
        state = _sd_3(state, checkpoint)
    unet = checkpoint.components.get("unet")
    plain = StableDiffusionLoraLoaderMixin if unet else None
    converter = getattr(getattr(diffusers, checkpoint.pipeline, plain), "lora_state_dict", None)
    converter = converter or getattr(plain, "lora_state_dict", None)
    if converter is None:
        return state
    options = {"unet_config": SimpleNamespace(**{"layers_per_block": 2, **unet.config})} if unet else {}
    made: Any = converter(state, **options)
    named: Mapping[str, Any] = made[0] if isinstance(made, tuple) else made  # alphas beside it
    return named


def _sd_3(state: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Stability's names, as kohya's sd-scripts and ComfyUI write them, to diffusers'."""
    from diffusers.loaders.single_file_utils import swap_scale_shift

    last = checkpoint.components["transformer"].config.get("num_layers", 18) - 1
    made: dict[str, Any] = {}
    for name, value in state.items():
        module, dot, end = OWN.sub("", name).partition(".lora_")
        targets = _sd_3_modules(module.replace(".", "_"))
        if not dot or not targets:
            made[name] = value
            continue
        for index, target in enumerate(targets):
            part = value
            if end in ("up.weight", "B.weight"):
                part = value.chunk(len(targets))[index] if len(targets) > 1 else value
                if target in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"):
                    part = swap_scale_shift(part, dim=0)
            made[f"transformer.{target}.lora_{end}"] = part
    return made


def _sd_3_modules(module: str) -> list[str]:
    """diffusers' modules of one of Stability's; none for what is no such name."""
    if match := re.fullmatch(r"joint_blocks_(\d+)_(.*)", module):
        for pattern, targets in SD_3:
            if inner := re.fullmatch(pattern, match[2]):
                attention = inner[1] if inner.groups() else ""
                return [f"transformer_blocks.{match[1]}.{target.format(attention)}" for target in targets.split()]
    return [SD_3_REST[module]] if module in SD_3_REST else []


def _to_peft(state: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Bring diffusers' names of any time to PEFT's; one without a component is of the UNet or the transformer."""
    from diffusers.utils import state_dict_utils as names

    main = "transformer" if "transformer" in checkpoint.components else "unet"
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        component, _, rest = name.partition(".")
        if component not in COMPONENTS:
            component, rest = main, OWN.sub("", name)
        rest = rest.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        parts.setdefault(component, {})[rest] = value
    made: dict[str, Any] = {}
    for component, part in parts.items():
        text = names.DIFFUSERS_OLD_TO_PEFT | names.DIFFUSERS_TO_PEFT
        mapping = text if component.startswith("text_encoder") else names.UNET_TO_DIFFUSERS
        made |= {f"{component}.{key}": value for key, value in names.convert_state_dict(part, mapping).items()}
    return made
