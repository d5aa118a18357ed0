"""Stable Diffusion XL, its Turbo and its refiner: two CLIP text encoders, and a UNet that is told sizes.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023),
https://arxiv.org/abs/2307.01952
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts
from runtimes.errors import DexportError
from runtimes.manifest import Stage, Start, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "stable-diffusion-xl"
COMPONENTS = {
    "text_encoder": ("CLIPTextModel", None),  # the refiner has only the second one
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": (*CLIP_TOKENIZERS, None),
    "tokenizer_2": CLIP_TOKENIZERS,
}
GUIDANCE, INPAINTING_GUIDANCE = 5.0, 7.5  # diffusers' defaults
STEPS = 20  # as for Stable Diffusion
REWORKS = "StableDiffusionXLImg2ImgPipeline"
STRENGTH = 0.3  # diffusers' default from image to image
MASKED = 0.9999  # and with a mask: so the start is the image's last noise, and not noise alone
SCORES = (
    6.0,
    2.5,
)  # the aesthetic scores that a refiner is asked for with the prompt and with the negative one; likewise
SIZES = ["image_height", "image_width"]
CORNER = [0, 0]  # where the picture was cut out in training: not at all
# UNet options that ask for conditioning which a Stable Diffusion XL pipeline does not give.
FOREIGN = ("class_embed_type", "encoder_hid_dim_type")

default_shape = parts.default_shape
rename = parts.rename


def text(modules: Any, *tokens: Any) -> tuple[Any, Any]:
    """[B, S] token ids for each encoder to their joined penultimate states and the pooled one: [B, S, D], [B, P]."""
    import torch

    second = modules.text_encoder_2(input_ids=tokens[-1], output_hidden_states=True)
    states = [second.hidden_states[-2]]
    if len(tokens) > 1:
        states.insert(0, modules.text_encoder(input_ids=tokens[0], output_hidden_states=True).hidden_states[-2])
    return torch.cat(states, dim=-1), second.text_embeds


def denoiser(
    modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any,
    guidance: Any = None,
) -> Any:  # fmt: skip
    """[B, 4, h, w], [B], [B, S, D], [B, P], [B, sizes], and [B] if distilled, to the predicted noise: [B, 4, h, w]."""
    known = None if guidance is None else parts.guidance_embedding(modules.unet, guidance)
    return modules.unet(
        sample, timestep, encoder_hidden_states, timestep_cond=known,
        added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids}, return_dict=False,
    )[0]  # fmt: skip


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for UNets that need more, and sizes that have no whole latents."""
    drawn, config = parts.canvas(checkpoint, shape), checkpoint.components["unet"].config
    encoders = {name: checkpoint.components[name].config for name in _encoders(checkpoint)}
    pooled = parts.whole("text_encoder_2", encoders["text_encoder_2"], "projection_dim", 512)
    sizes = len(_time_ids(checkpoint, SCORES[0]))
    _check(config, pooled, sizes)
    hole = parts.painting(checkpoint, drawn)
    tokens = tuple(parts.tokens(checkpoint, name, input_) for name, input_ in _encoders(checkpoint).items())
    if len({one.shape[1] for one in tokens}) > 1:
        raise DexportError(
            f"{checkpoint.path}: model_max_length is {tokens[0].shape[1]} in tokenizer/tokenizer_config.json and "
            f"{tokens[1].shape[1]} in that of tokenizer_2, and the states of both are joined; set both to the smaller"
        )
    width = sum(parts.whole(name, own, "hidden_size", 512) for name, own in encoders.items())
    states = Tensor("encoder_hidden_states", "float32", (*tokens[-1].shape, width))
    embeds = Tensor("text_embeds", "float32", ("batch", pooled))
    told = Tensor("time_ids", "float32", ("batch", sizes))
    timestep = Tensor("timestep", "float32", ("batch",))
    output = Tensor("output", "float32", drawn.sample.shape)
    inputs = (drawn.sample, *hole, timestep, states, embeds, told, *parts.further_inputs(config))
    forward = parts.painter(denoiser) if hole else denoiser
    builders = {"text_encoder": parts.build_text, "text_encoder_2": parts.build_projected_text}
    build_text = {name: lambda name=name, own=own: builders[name](own) for name, own in encoders.items()}
    build_unet = {"unet": lambda: parts.build_unet(config)}
    unet = Spec("denoiser", build_unet, forward, inputs, (output,), drawn.odd_sizes)
    return {
        "text": Spec("text", build_text, text, tokens, (states, embeds), {}),
        "denoiser": parts.long_prompts(checkpoint, unet, states),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance; a pipeline from image to image only reworks pictures."""
    zeros = checkpoint.index.get("force_zeros_for_empty_prompt", True)
    scale = INPAINTING_GUIDANCE if "Inpaint" in checkpoint.pipeline else GUIDANCE
    guidance = parts.guidance(checkpoint.components["unet"].config, scale)
    guidance = replace(guidance, empty="zeros" if zeros else "text")
    sizes, negative = ({"time_ids": _time_ids(checkpoint, score)} for score in SCORES)
    return (
        parts.canvas(checkpoint, shape).stage(
            checkpoint, guidance, STEPS, inputs=sizes, negative=negative if negative != sizes else {},
            states=parts.STATES, strength=STRENGTH if checkpoint.pipeline == REWORKS else None,
            image_to_image=Start(strength=STRENGTH), inpaint=Start(strength=MASKED),
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The first tokenizer's ids go to ``tokens``, the second one's to ``tokens_2``."""
    inputs = {}
    for component, name in _encoders(checkpoint).items():
        _, length = parts.tokens(checkpoint, component, name).shape
        inputs[component.replace("text_encoder", "tokenizer")] = Tokens(name, int(length))
    return inputs


def _encoders(checkpoint: Checkpoint) -> dict[str, str]:
    """The text encoders that there are, each with its input of the text graph."""
    inputs = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}
    return {name: input_ for name, input_ in inputs.items() if name in checkpoint.components}


def _time_ids(checkpoint: Checkpoint, score: float) -> list[Any]:
    """What the UNet is told: original size, corner, and the target size or, if it is a refiner, an aesthetic score."""
    last = [score] if checkpoint.index.get("requires_aesthetics_score", False) else SIZES
    return [*SIZES, *CORNER, *last]


def _check(config: Mapping[str, Any], pooled: int, sizes: int) -> None:
    """Raise DexportError for a UNet that is none of Stable Diffusion XL's."""
    if config.get("addition_embed_type") != "text_time":
        raise DexportError(
            f"unet/config.json: addition_embed_type={config.get('addition_embed_type')!r} is not Stable Diffusion XL"
        )
    for option in FOREIGN:
        if config.get(option) is not None:
            raise DexportError(f"unet/config.json: {option}={config[option]!r} is not Stable Diffusion XL")
    width = parts.whole("unet", config, "addition_time_embed_dim", 256) * sizes + pooled
    if config.get("projection_class_embeddings_input_dim") != width:
        raise DexportError(
            f"unet/config.json: projection_class_embeddings_input_dim="
            f"{config.get('projection_class_embeddings_input_dim')!r:.60} where {sizes} sizes and the pooled text make "
            f"{width}; check requires_aesthetics_score in model_index.json"
        )
