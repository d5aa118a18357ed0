"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5 that may be left out; a transformer over latents.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024),
https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, T5_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "stable-diffusion-3"
COMPONENTS = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel", None),
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": CLIP_TOKENIZERS,
    "tokenizer_3": (*T5_TOKENIZERS, None),
}
GUIDANCE, STEPS = 7.0, 28  # StableDiffusion3Pipeline's defaults
T5_LENGTH = 256  # likewise; of zeros where there is no T5
CLIPS = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}
T5 = "text_encoder_3"


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels that the checkpoint was made for."""
    side = _whole(checkpoint, "sample_size", 128) * parts.pixels_per_latent(checkpoint)
    return side, side


def text(modules: Any, *tokens: Any) -> tuple[Any, Any]:
    """[B, S] ids for each encoder to their penultimate states, one after the other, and the pooled: [B, S, D], [B, P].

    CLIP's two are joined along the width and filled up with zeros to T5's, which the transformer takes.
    """
    import torch

    one, two = (
        encoder(input_ids=ids, output_hidden_states=True)
        for encoder, ids in zip((modules.text_encoder, modules.text_encoder_2), tokens, strict=False)
    )
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    if len(tokens) > len(CLIPS):
        further = modules.text_encoder_3(input_ids=tokens[-1]).last_hidden_state
    else:
        further = states.new_zeros(states.shape[0], T5_LENGTH, modules.text_encoder.joint_width)
    states = torch.nn.functional.pad(states, (0, further.shape[-1] - states.shape[-1]))
    return torch.cat([states, further], dim=1), torch.cat([one.text_embeds, two.text_embeds], dim=-1)


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, pooled: Any) -> Any:
    """[B, C, h, w], [B], [B, S, D], [B, P] to the velocity: [B, C, h, w]."""
    return modules.transformer(
        hidden_states=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled, return_dict=False,
    )[0]  # fmt: skip


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for parts that do not fit, and for sizes that the model cannot draw."""
    drawn, config = parts.canvas(checkpoint, shape), checkpoint.components["transformer"].config
    clips = {name: checkpoint.components[name].config for name in CLIPS}
    width, pooled = _check(checkpoint, drawn, shape)
    tokens = list(_tokens(checkpoint).values())
    build_text: dict[str, Callable[[], Any]] = {name: partial(_build_clip, own, width) for name, own in clips.items()}
    length = sum(int(one.shape[1]) for one in tokens) // len(tokens) + T5_LENGTH
    if T5 in checkpoint.components:
        tokens.append(Tensor("tokens_3", "int64", ("batch", T5_LENGTH)))
        build_text[T5] = lambda: text_encoders.build_t5(checkpoint.components[T5].config)
    states = Tensor("encoder_hidden_states", "float32", ("batch", length, width))
    embeds = Tensor("pooled_projections", "float32", ("batch", pooled))
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states, embeds)
    output = Tensor("output", "float32", drawn.sample.shape)
    build = {"transformer": lambda: build_transformer(config)}
    return {
        "text": Spec("text", build_text, text, tuple(tokens), (states, embeds), {}),
        "denoiser": Spec("denoiser", build, denoiser, inputs, (output,), drawn.latent_sizes),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance."""
    drawn, patch = parts.canvas(checkpoint, shape), _whole(checkpoint, "patch_size", 2)
    return (drawn.stage(checkpoint, Guidance("cfg", GUIDANCE), STEPS, multiple=patch, patch=patch, **parts.FLOW),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """CLIP's tokenizers give as many ids as the first of them says; T5's gives 256."""
    found = {tokenizer: Tokens(one.name, int(one.shape[1])) for tokenizer, one in _tokens(checkpoint).items()}
    if T5 in checkpoint.components:
        found["tokenizer_3"] = Tokens("tokens_3", T5_LENGTH)
    return found


def _tokens(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The ids that CLIP's encoders take, by tokenizer: of both as many as the first one's says, as in the pipeline."""
    return {
        component.replace("text_encoder", "tokenizer"): parts.tokens(checkpoint, component, name, "tokenizer")
        for component, name in CLIPS.items()
    }


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids, which are no weights."""
    if name.endswith("embeddings.position_ids"):
        return None
    return parts.rename_attention(name) if component == "vae" else name


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def _check(checkpoint: Checkpoint, drawn: parts.Canvas, shape: Shape) -> tuple[int, int]:
    """The widths of the states and of the pooled text; DexportError for components that do not fit together."""
    config, patch = checkpoint.components["transformer"].config, _whole(checkpoint, "patch_size", 2)
    parts.check_patches(
        shape, drawn.factor * patch, drawn.factor * patch * _whole(checkpoint, "pos_embed_max_size", 96)
    )
    parts.check_transformer(config, drawn.channels)
    width, pooled = _whole(checkpoint, "joint_attention_dim", 4096), _whole(checkpoint, "pooled_projection_dim", 2048)
    clips = {name: checkpoint.components[name].config for name in CLIPS}
    given = sum(parts.whole(name, own, "projection_dim", 512) for name, own in clips.items())
    parts.check_width(checkpoint, "pooled_projection_dim", 2048, given)
    own = sum(parts.whole(name, own, "hidden_size", 512) for name, own in clips.items())
    if own > width:
        raise DexportError(f"transformer/config.json: joint_attention_dim={width}; the text encoders give {own}")
    if T5 not in checkpoint.components:
        return width, pooled
    if "tokenizer_3" not in checkpoint.tokenizers:
        raise DexportError(f"{checkpoint.path}: there is a text_encoder_3 and no tokenizer_3; copy or download it")
    parts.check_width(
        checkpoint, "joint_attention_dim", 4096, text_encoders.width(T5, checkpoint.components[T5].config)
    )
    return width, pooled


def _build_clip(config: Mapping[str, Any], width: int) -> Any:
    """A CLIP text encoder that knows the width of the states which the transformer takes."""
    encoder = parts.build_projected_text(config)
    encoder.joint_width = width
    return encoder


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A transformer of this config.json; its table of positions is the checkpoint's own, in its rounding."""
    import torch
    from diffusers import SD3Transformer2DModel

    side = config.get("pos_embed_max_size") or 96  # SD3Transformer2DModel's default
    # A table of one place is made first, since that of 3.5 medium takes gigabytes to compute, for nothing.
    transformer = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
    places = transformer.pos_embed
    del places.pos_embed
    places.pos_embed = torch.nn.Parameter(torch.empty(1, side * side, transformer.inner_dim))
    places.pos_embed_max_size = side
    return transformer
