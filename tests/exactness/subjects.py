"""A small checkpoint of every pipeline class that is exported, and what its images are made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from exporter.families import SAME
from tests.families import small, small_cascades, small_flow, small_hints, small_ldm, small_transformers, small_video

Make = Callable[[Path], Any]
# In the order of Stable Diffusion XL's UNet, which the features of its T2I-Adapters are for.
XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A small checkpoint: its pipeline class, how to make it, the size of its images where its own is too large.

    task: what is compared, one of ``TASKS``.
    """

    pipeline: str
    make: Make
    shape: tuple[int, int] | None = None
    task: str = ""


FROM_IMAGE, INPAINTING = "image to image", "inpainting"
TASKS = ("", FROM_IMAGE, INPAINTING)  # none: what the class draws of a prompt, a class or noise; also by a picture


def _steered(kind: str, argument: str, network: Callable[[Any], Any], base: Make) -> Make:
    """A pipeline of a base's parts and a network that steers its UNet, as its class saves it."""

    def make(folder: Path) -> None:
        plain = folder.with_name(f"{folder.name}-plain")
        base(plain)
        pipe = diffusers.DiffusionPipeline.from_pretrained(plain, safety_checker=None, feature_extractor=None)
        expected, options = getattr(diffusers, kind)._get_signature_keys(getattr(diffusers, kind))
        parts = {name: part for name, part in pipe.components.items() if name in expected}
        said = {"requires_safety_checker": False} if "requires_safety_checker" in options else {}
        getattr(diffusers, kind)(**parts, **said, **{argument: network(pipe.unet)}).save_pretrained(folder)
        shutil.rmtree(plain)

    return make


def _xl(folder: Path, *, means: bool) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**small.SCHEDULE)
    kind = diffusers.StableDiffusionXLPipeline
    small.stable_diffusion_xl(folder, kind, scheduler, blocks=XL_BLOCKS, means=means)


def _sd_3_without_shift(folder: Path) -> None:
    """With the 16 channels that diffusers' inpainting needs, and without the shift that it leaves out as it decodes."""
    small_flow.sd_3(folder, channels=16)
    _change(folder / "vae" / "config.json", shift_factor=0.0)


def _change(file: Path, **options: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def _control(unet: Any) -> Any:
    return small_hints.control(unet, 1)


_controlnet = _steered("StableDiffusionControlNetPipeline", "controlnet", _control, small_cascades.stable_diffusion)
_adapter = _steered(
    "StableDiffusionAdapterPipeline", "adapter", lambda unet: small_hints.features(3), small_cascades.stable_diffusion
)
_xl_controlnet = _steered("StableDiffusionXLControlNetPipeline", "controlnet", _control, partial(_xl, means=True))
_xl_controlnet_without_mean = _steered(
    "StableDiffusionXLControlNetPipeline", "controlnet", _control, partial(_xl, means=False)
)
_xl_adapter = _steered(
    "StableDiffusionXLAdapterPipeline", "adapter",
    lambda unet: small_hints.features(3, "full_adapter_xl", downscale_factor=4), partial(_xl, means=False),
)  # fmt: skip

SUBJECTS_OF_THEIR_OWN: tuple[Subject, ...] = (
    Subject("DDPMPipeline", small.write_ddpm),
    Subject("PNDMPipeline", small.write_pndm),
    Subject("DDIMPipeline", small.write_grey),
    Subject("ConsistencyModelPipeline", small.write_consistency),
    Subject("LDMPipeline", small.write_ldm),
    Subject("LDMSuperResolutionPipeline", small.write_superresolution),
    Subject("LDMTextToImagePipeline", small_ldm.ldm_text),
    Subject("DiTPipeline", small.write_dit),
    Subject("StableDiffusionPipeline", small_cascades.stable_diffusion),
    Subject("StableDiffusionInpaintPipeline", small.inpainting),
    Subject("StableDiffusionControlNetPipeline", _controlnet),
    Subject("StableDiffusionAdapterPipeline", _adapter),
    Subject("LatentConsistencyModelPipeline", small.latent_consistency),
    Subject("StableDiffusionXLPipeline", small.sdxl),
    Subject("StableDiffusionXLImg2ImgPipeline", small.refiner, task=FROM_IMAGE),
    Subject("StableDiffusionXLInpaintPipeline", small.sdxl_inpainting),
    Subject("StableDiffusionXLControlNetPipeline", _xl_controlnet),
    Subject("StableDiffusionXLAdapterPipeline", _xl_adapter),
    Subject("StableDiffusion3Pipeline", small_flow.sd_3),
    Subject("FluxPipeline", small_flow.flux, (32, 48)),
    Subject("QwenImagePipeline", small_flow.qwen_image, (32, 48)),
    Subject("ZImagePipeline", small_flow.z_image, (32, 48)),
    Subject("PixArtAlphaPipeline", small_transformers.pixart_alpha, (16, 24)),
    Subject("PixArtSigmaPipeline", small_transformers.pixart_sigma),
    Subject("SanaPipeline", small_transformers.sana, (32, 64)),
    Subject("SanaSprintPipeline", small_transformers.sana_sprint, (32, 32)),
    Subject("AuraFlowPipeline", small_transformers.aura_flow, (16, 24)),
    Subject("Lumina2Pipeline", small_transformers.lumina2, (32, 48)),
    Subject("KandinskyV22CombinedPipeline", small_cascades.kandinsky),
    Subject("UnCLIPPipeline", small_cascades.unclip),
    Subject("StableCascadeCombinedPipeline", small_cascades.stable_cascade),
    Subject("WuerstchenCombinedPipeline", small_cascades.wuerstchen),
    Subject("AnimateDiffPipeline", small_video.saved),
    Subject("AnimateDiffSDXLPipeline", small_video.saved_xl),
)
# Of a class whose checkpoints have the parts of another: how else they are made, where diffusers' class needs it.
MADE: dict[str, Make] = {
    "StableDiffusionXLControlNetInpaintPipeline": _xl_controlnet_without_mean,
    "StableDiffusion3InpaintPipeline": _sd_3_without_shift,
}


def _named(pipeline: str, make: Make) -> Make:
    """A checkpoint that names another class, which has the same parts."""

    def write(folder: Path) -> None:
        make(folder)
        _change(folder / "model_index.json", _class_name=pipeline)

    return write


def _same(pipeline: str) -> Subject:
    """The subject of a class that takes an image, or an image and a mask, for the parts of another one."""
    plain = next(one for one in SUBJECTS_OF_THEIR_OWN if one.pipeline == SAME[pipeline])
    task = INPAINTING if "Inpaint" in pipeline else FROM_IMAGE
    make = _named(pipeline, MADE.get(pipeline, plain.make))
    return Subject(pipeline, make, plain.shape, task)


SUBJECTS = (*SUBJECTS_OF_THEIR_OWN, *map(_same, SAME))
