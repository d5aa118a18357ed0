"""One .safetensors file with a whole Stable Diffusion, in the names of its training code (CompVis, Stability AI).

diffusers' own converters say which tensor of the file becomes which of a component, and are run on handles that have
no bytes (``exporter.handles``). What such a file leaves out lies in ``exporter/configs``: for each kind a diffusers
folder without weights, and CLIP's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runtimes.errors import DexportError, first_of
from runtimes.safetensors import Entry, Stored

CONFIGS = Path(__file__).parent / "configs"
KINDS = {
    "v1": "stable-diffusion-1", "v2": "stable-diffusion-2", "xl_base": "stable-diffusion-xl",
    "inpainting": "stable-diffusion-1-inpainting", "inpainting_v2": "stable-diffusion-2-inpainting",
    "xl_inpaint": "stable-diffusion-xl-inpainting",
}  # fmt: skip
"""diffusers' word for a kind of checkpoint to the folder in ``CONFIGS``."""
UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
CLIP = {"text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")}
OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
FIRST = f"{UNET}input_blocks.0.0.weight"
# Left by training, or buffers that the modules make anew. Of Stable Diffusion 2's text encoder diffusers leaves out
# the last layer and the projection, as the model does.
JUNK = re.compile(
    r"model_ema\..*|(model|cond_stage_model|first_stage_model)\.(decay|num_updates)|(first_stage_model\.)?loss\..*"
    r"|.*\.(position_ids|logit_scale|logit_bias|attn_mask)|global_step|epoch|scale_factor|v_pred|ztsnr"
    r"|[a-z0-9_]*alphas_cumprod(_prev)?|betas|posterior_[a-z0-9_]*|lvlb_weights|logvar"
    r"|((model\.)?model_sampling\.|(model_)?denoiser\.)?(log_)?sigmas|embedding_manager\..*"
    r"|first_stage_model\.(quantize|model_ema)\..*"
    # The other half of CLIP, as ComfyUI saves it or as it came: of the first encoder its projection too.
    r"|(cond_stage_model|conditioner\.embedders\.[01])\.((clip_[lgh]|model|transformer)\.)*"
    r"(visual|vision_model|visual_projection)\..*"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.((clip_[lh]|transformer)\.)*text_projection(\.weight)?"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)"
)
SAYING = ("v_pred", "ztsnr")  # of them, what ``scheduler_options`` reads
NEEDED = {
    "xl_refiner": "SDXL's refiner; give its diffusers folder, with --refiner beside its base",
    "upscale": "Stable Diffusion's x4 upscaler, which has no family here",
    "instruct-pix2pix": "InstructPix2Pix, which edits an image that it is shown, and has no family here",
    "playground-v2-5": "Playground v2.5, whose schedule and latents are its own; give its diffusers folder",
    "controlnet": "a ControlNet in one file; convert it to a folder of diffusers "
    "(ControlNetModel.from_single_file), and give that beside its checkpoint, with --control",
    "animatediff": "a motion adapter in one file; give its diffusers folder beside its checkpoint, with "
    "--motion-adapter",
    "autoencoder-dc": "an autoencoder (DC-AE) alone",
}
"""What a file of one of diffusers' kinds is, by how the kind's word begins, and what to do with it."""
PARTS = (
    (r"(.*[._])?(lora_|hada_|lokr_|oft_)|.*\.(lora_[AB]|lora|lora_down)\.", "a LoRA or another adapter; give it "
     "beside its checkpoint, with --lora"),
    (r"emb_params|string_to_param|clip_[gl]$", "a textual-inversion embedding; give it beside its checkpoint, with "
     "--embedding"),
    (r"control_model\.|input_hint_block\.|controlnet_", "a ControlNet in one file; convert it to a folder of diffusers "
     "(ControlNetModel.from_single_file), and give that beside its checkpoint, with --control"),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter; give it beside its checkpoint, with --ip-adapter"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)", "an autoencoder (VAE) alone; give it beside "
     "its checkpoint, with --vae"),
    (r"(down_blocks|up_blocks|mid_block|time_embedding|transformer_blocks|single_transformer_blocks)\.",
     "one component of a diffusers folder; give the folder"),
    (r"text_model\.|token_embedding\.", "a text encoder alone"),
)  # fmt: skip
"""What else a .safetensors file may be, by a name that it has."""


def configuration(file: Path, entries: Mapping[str, Entry], chosen: Path | str | None) -> Path:
    """Return the folder with the configurations of a single file: one of ``CONFIGS`` by name, or another.

    Without ``chosen`` the kind is read from the names. Raises DexportError for what is no Stable Diffusion, saying
    what it is where that can be seen, and where only the user can know the kind.
    """
    if chosen is not None:
        folder = CONFIGS / chosen if is_shipped(chosen) else Path(chosen)
        if not folder.is_dir():
            raise DexportError(
                f"{folder}: no such folder, and no name of a configuration; there are {', '.join(_shipped())}"
            )
        return folder
    kind = _kind(entries)
    if kind not in KINDS:
        raise DexportError(f"{file}: {_other(kind)}")
    if FIRST not in entries:
        raise DexportError(f"{file}: {_what(entries)}; a checkpoint in one file holds {FIRST!r}")
    if kind == "v2":
        raise DexportError(
            f"{file}: a Stable Diffusion 2, and no file says whether it predicts noise or velocity; give --config "
            "stable-diffusion-2 for a model of 768 pixels (velocity), or stable-diffusion-2-base for one of 512 "
            "(noise), as SD-Turbo is"
        )
    return CONFIGS / KINDS[kind]


def is_shipped(config: Path | str) -> bool:
    """Whether this is the name of one of ``CONFIGS``."""
    return str(config) in _shipped()


def _shipped() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _what(entries: Mapping[str, Entry]) -> str:
    """Say what a file is that holds no UNet in its training code's names, and that diffusers knows no kind of."""
    for pattern, words in PARTS:
        if any(re.match(pattern, name) for name in entries):
            return words
    return "not a Stable Diffusion checkpoint"


def _other(kind: str) -> str:
    """What a file is of a kind that diffusers knows and that is not read here."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS as PUBLISHED

    for start, words in NEEDED.items():
        if kind.startswith(start):
            return words
    place = PUBLISHED.get(kind, {}).get("pretrained_model_name_or_path")
    return (
        f"a model of the kind {kind!r}{f', like {place}' if place else ''}; one file is read of Stable Diffusion and "
        "SDXL alone: give the diffusers folder of the whole model"
    )


def _kind(entries: Mapping[str, Entry]) -> str:
    """What diffusers takes the checkpoint for; "v1" where it knows nothing better."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    from exporter.handles import handle

    try:
        return str(infer_diffusers_model_type({name: handle(entry) for name, entry in entries.items()}))
    except Exception:  # it looks at shapes and values that a file made by hand may not have
        return "v1"


def scheduler_options(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What a file says of its schedule: fine-tuned models carry empty tensors named v_pred and ztsnr."""
    options: dict[str, Any] = {}
    if "v_pred" in entries:
        options["prediction_type"] = "v_prediction"
    if "ztsnr" in entries:
        options["rescale_betas_zero_snr"] = True
    return options


def unused(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """The tensors of a file that are of no part of the model; without buffers that the modules make anew."""
    return tuple(
        name for name in entries if JUNK.fullmatch(name) and name not in SAYING and not name.endswith("position_ids")
    )


def convert(
    file: Path, entries: Mapping[str, Entry], configs: Mapping[str, Mapping[str, Any]], *, without: str | None = None
) -> dict[str, dict[str, Stored]]:
    """Return the tensors of each component under diffusers' names; ``configs`` are its config.json by component.

    ``without``: a component that is not wanted, be it there or not ("vae").

    Nothing is read but the header: a tensor that is cut from another is a view of it. Raises DexportError for a
    component that the file lacks, and for tensors that no component takes.
    """
    from exporter.handles import handle, stored
    from exporter.trace import quiet

    handles = {name: handle(entry) for name, entry in entries.items() if not JUNK.fullmatch(name)}
    made: dict[str, dict[str, Stored]] = {}
    used = {name for name in entries if JUNK.fullmatch(name)}
    if without == "vae":
        used |= set(_under(AUTOENCODER, entries))
    for component, config in configs.items():
        convert_part = _converter(component, entries)
        if convert_part is None:
            advice = "give one with --vae" if component == "vae" else "it is a part of a checkpoint"
            raise DexportError(f"{file}: holds no {component}, which its pipeline needs; {advice}")
        try:
            with quiet():
                found = convert_part(handles, config)
        except Exception as error:  # diffusers' converters fail in their own ways over names that they do not expect
            raise DexportError(
                f"{file}: its {component} is not what its configuration says ({type(error).__name__}: {error})"
            ) from error
        made[component] = {name: stored(value) for name, value in found.items() if not JUNK.fullmatch(name)}
        used |= {value.entry.name for value in found.values()}
    if unused := sorted(set(entries) - used):
        raise DexportError(
            f"{file}: no part of a Stable Diffusion takes {first_of(unused)}; the file holds more than a checkpoint, "
            "or is of another kind"
        )
    return made


def _converter(component: str, entries: Mapping[str, Entry]) -> Callable[[Any, Any], dict[str, Any]] | None:
    """diffusers' converter for a component of this file; None where the file has nothing of it."""
    from diffusers.loaders import single_file_utils as diffusers

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in entries)

    if component == "unet" and has(UNET):
        return lambda handles, config: diffusers.convert_ldm_unet_checkpoint(handles, config)
    if component == "vae" and has(AUTOENCODER):
        # Only these, since it takes any name with "up.0" in it for the autoencoder's.
        return lambda handles, config: diffusers.convert_ldm_vae_checkpoint(_under(AUTOENCODER, handles), config)
    if any(has(prefix) for prefix in CLIP.get(component, ())):
        return lambda handles, config: diffusers.convert_ldm_clip_checkpoint(handles)
    prefix = OPEN_CLIP.get(component)
    if prefix is not None and has(prefix):
        # It asks the module for nothing but this, and only where the file has no projection.
        return lambda handles, config: diffusers.convert_open_clip_checkpoint(
            SimpleNamespace(config=SimpleNamespace(**config)), handles, prefix=prefix
        )
    return None


def _under(prefix: str, handles: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in handles.items() if name.startswith(prefix)}
