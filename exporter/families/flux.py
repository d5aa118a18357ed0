"""Flux.1 dev and schnell: CLIP's pooled state, T5's states, and a transformer over packed latents.

Black Forest Labs (2024), https://github.com/black-forest-labs/flux; "FLUX.1 Kontext", https://arxiv.org/abs/2506.15742,
section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, T5_TOKENIZERS, Shape, Spec, Tokens, parts, patches, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "flux"
COMPONENTS = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": T5_TOKENIZERS,
}
SIDE = 128  # latents along a side of the default picture, as in FluxPipeline
PATCH = 2
AXES = (16, 56, 56)  # FluxTransformer2DModel's default: channels of a head for an unused axis, rows and columns
# Of dev, which was distilled to know the scale of guidance, and of schnell: by their model cards.
DEV = {"scale": 3.5, "steps": 28, "length": 512}
SCHNELL = {"scale": 1.0, "steps": 4, "length": 256}

rename = parts.rename


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels that FluxPipeline draws."""
    side = SIDE * parts.pixels_per_latent(checkpoint)
    return side, side


def text(modules: Any, tokens: Any, tokens_2: Any) -> tuple[Any, Any]:
    """[B, S] ids for both encoders to T5's states and CLIP's pooled one: [B, S, D], [B, P]."""
    pooled = modules.text_encoder(input_ids=tokens).pooler_output
    return modules.text_encoder_2(input_ids=tokens_2).last_hidden_state, pooled


def denoiser(
    modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, pooled: Any, guidance: Any = None
) -> Any:
    """[B, C, h, w], [B], [B, S, D], [B, P], and [B] if distilled, to the velocity: [B, C, h, w]."""
    import torch

    height, width = sample.shape[2] // PATCH, sample.shape[3] // PATCH
    places = torch.nn.functional.pad(
        patches.grid(torch.arange(height), torch.arange(width)), (1, 0)
    )  # the first axis is not used
    tokens = modules.transformer(
        hidden_states=patches.pack(sample, PATCH), timestep=timestep / 1000, guidance=guidance,
        encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled, img_ids=places,
        txt_ids=places.new_zeros(encoder_hidden_states.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip
    return patches.unpack(tokens, height, width, PATCH)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for parts that do not fit, and for sizes that have no whole tokens."""
    drawn, config = parts.canvas(checkpoint, shape), checkpoint.components["transformer"].config
    _check(checkpoint, drawn, shape)
    first, second = (checkpoint.components[name].config for name in ("text_encoder", "text_encoder_2"))
    tokens = parts.tokens(checkpoint, "text_encoder", "tokens")
    tokens_2 = Tensor("tokens_2", "int64", ("batch", _kind(checkpoint)["length"]))
    states = Tensor(
        "encoder_hidden_states", "float32", (*tokens_2.shape, _whole(checkpoint, "joint_attention_dim", 4096))
    )
    pooled = Tensor("pooled_projections", "float32", ("batch", _whole(checkpoint, "pooled_projection_dim", 768)))
    told = (Tensor("guidance", "float32", ("batch",)),) if config.get("guidance_embeds") else ()
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states, pooled, *told)
    build_text = {
        "text_encoder": lambda: parts.build_text(first),
        "text_encoder_2": lambda: text_encoders.build_t5(second),
    }
    build = {"transformer": lambda: build_transformer(config)}
    output = Tensor("output", "float32", drawn.sample.shape)
    return {
        "text": Spec("text", build_text, text, (tokens, tokens_2), (states, pooled), {}),
        "denoiser": Spec("denoiser", build, denoiser, inputs, (output,), drawn.latent_sizes),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop; dev is told the scale of guidance, schnell knows none."""
    drawn, kind = parts.canvas(checkpoint, shape), _kind(checkpoint)
    guidance = Guidance("embedded" if kind is DEV else "none", kind["scale"])
    steps = int(kind["steps"])
    return (drawn.stage(checkpoint, guidance, steps, multiple=PATCH, patch=PATCH, sigmas="even", **parts.FLOW),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """CLIP's tokenizer fills up to its own limit; T5's gives as many ids as the model was trained with."""
    _, length = parts.tokens(checkpoint, "text_encoder", "tokens").shape
    return {
        "tokenizer": Tokens("tokens", int(length)),
        "tokenizer_2": Tokens("tokens_2", int(_kind(checkpoint)["length"])),
    }


def _kind(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return DEV if checkpoint.components["transformer"].config.get("guidance_embeds") else SCHNELL


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def _check(checkpoint: Checkpoint, drawn: parts.Canvas, shape: Shape) -> None:
    """Raise DexportError for components that do not fit together."""
    parts.check_patches(shape, drawn.factor * PATCH, drawn.factor * PATCH * patches.SIDE)
    parts.check_transformer(checkpoint.components["transformer"].config, drawn.channels, PATCH)
    config = checkpoint.components["transformer"].config
    parts.check_axes(config, "axes_dims_rope", AXES, _whole(checkpoint, "attention_head_dim", 128))
    if _whole(checkpoint, "patch_size", 1) != 1:
        raise DexportError("transformer/config.json: patch_size is not 1; Flux's latents are packed before")
    first, second = (checkpoint.components[name].config for name in ("text_encoder", "text_encoder_2"))
    parts.check_width(checkpoint, "pooled_projection_dim", 768, parts.whole("text_encoder", first, "hidden_size", 512))
    parts.check_width(checkpoint, "joint_attention_dim", 4096, text_encoders.width("text_encoder_2", second))


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A transformer of this config.json whose rotations are tables; text stands at position 0."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_config(dict(config))
    transformer.pos_embed = patches.rotations(
        config.get("axes_dims_rope") or AXES, [range(side) for side in (1, patches.SIDE, patches.SIDE)]
    )
    return transformer
