"""Why a pipeline class of diffusers is not exported: what a refusal says, and docs/families.md."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why, the names it is true of (a regular expression, without "Pipeline"), and whether a class that is exported is
    of use in place of those: it has the same checkpoint, or one that holds it.
    """

    why: str
    names: str
    others_help: bool = False


YET = Reason("not written yet", ".*", True)
REASONS = (
    Reason(
        "blocks whose parts lie in other repositories, not a checkpoint",
        r".*Modular|Diffusion",
    ),
    Reason(
        "of diffusers' own ONNX or Flax export, not of torch",
        r"Onnx.*|StableDiffusionOnnx",
    ),
    Reason(
        "it draws tokens of a codebook or a language, not a continuous sample",
        r"VQDiffusion|Amused.*|DiffusionGemma|LLaDA2",
    ),
    Reason(
        "sound: a bundle has no way out for it yet",
        r"AceStep|Audio.*|DanceDiffusion|MusicLDM|Spectrogram.*|StableAudio.*|LongCatAudio.*",
    ),
    Reason(
        "shapes in space and proteins, not pictures",
        r"ShapE.*|RFD4.*",
    ),
    Reason(
        "video beyond AnimateDiff",
        r"Allegro|AnimateDiff.+|AnyFlow.*|ChronoEdit|CogVideo.*|ConsisID|Cosmos.*|EasyAnimate.*|Helios.*|Hunyuan.*Video.*"
        r"|HunyuanSkyreels.*|I2VGenXL|Latte|LTX.*|LucyEdit|Mochi|MotifVideo.*|PIA|Sana.*Video|SanaWM|SkyReels.*"
        r"|StableVideoDiffusion|TextToVideo.*|VideoToVideo.*|Wan.*|Kandinsky5.2V|Kandinsky6.*",
    ),
    Reason(
        "it takes gradients, or turns a picture back into noise, while it draws",
        r".*AttendAndExcite|.*DiffEdit|.*Pix2PixZero|.*ModelEditing|CycleDiffusion|.*Paradigms",
        True,
    ),
    Reason(
        "guidance inside of attention, or over parts of a picture; the same checkpoint is exported as the plain class, "
        "where that is",
        r".*PAG.*|.*SAG|SemanticStableDiffusion|.*Panorama|.*GLIGEN.*",
        True,
    ),
    Reason(
        "pictures that are edited join the tokens of the prompt",
        r"QwenImageEdit.*|QwenImageLayered.*|OmniGen|FluxKontext.*|Flux2.*|JoyImageEdit.*|LongCatImageEdit|VisualCloze.*"
        r"|DreamLite.*|ZImageOmni|FluxPriorRedux|BriaFiboEdit|GlmImage|Kandinsky5I2I|PaintByExample|BlipDiffusion.*"
        r"|UniDiffuser|VersatileDiffusion.*",
    ),
    Reason(
        "the denoiser takes a picture as further channels, in a way of its own",
        r".*InstructPix2Pix|.*Depth2Img|.*Upscale|FluxFill|FluxControl(Img2Img|Inpaint)?|CogView4Control|Marigold.*"
        r"|.*ImageVariation|.*LDM3D|KandinskyV22Inpaint.*|KandinskyInpaint.*|.*ControlNetInpaint.*",
    ),
    Reason(
        "a ControlNet of another kind or another architecture than Stable Diffusion's and SDXL's",
        r".*Control[Nn]et.*",
        True,
    ),
    Reason(
        "a stage by itself; the two are exported together (`--prior`)",
        r"KandinskyV22(Prior)?|(StableCascade|Wuerstchen)(Prior|Decoder)",
        True,
    ),
)


def reason(pipeline: str) -> Reason:
    """Why a pipeline class is not exported; one that nobody knows is not written yet."""
    short = pipeline.removesuffix("Pipeline")
    return next((one for one in REASONS if re.fullmatch(one.names, short)), YET)
