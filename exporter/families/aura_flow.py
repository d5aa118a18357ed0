"""AuraFlow: a transformer over the patches of latents and the states of a T5 together, KL autoencoder.

https://blog.fal.ai/auraflow/; its first blocks are those of Esser et al. (2024), https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import LLAMA_TOKENIZERS, T5_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders, transformer2d
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "aura-flow"
COMPONENTS = {
    "transformer": ("AuraFlowTransformer2DModel",),
    "text_encoder": ("UMT5EncoderModel", "T5EncoderModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": (*LLAMA_TOKENIZERS, *T5_TOKENIZERS),
}
LENGTH = 256  # tokens of a prompt
GUIDANCE, STEPS = 3.5, 50  # diffusers' defaults
SIDE = 1024  # pixels of a picture; likewise
TIMES = 1000  # timesteps of the scheduler, as the pipeline has them


def text(modules: Any, tokens: Any) -> Any:
    """[B, S] token ids to T5's states, 0 where there is no token: [B, S, D]."""
    mask = text_encoders.there(modules.text_encoder, tokens).float()
    return modules.text_encoder(tokens, attention_mask=mask).last_hidden_state * mask[:, :, None]


def denoiser(modules: Any, sample: Any, timestep: Any, states: Any) -> Any:
    """[B, C, h, w], [B], [B, S, D] to the predicted flow: [B, C, h, w].

    diffusers' own forward, without what asks for sizes that are free here.
    """
    import torch

    model = modules.transformer
    tokens = embed(model.pos_embed, sample)  # [B, T, D]
    time = model.time_step_proj(model.time_step_embed(timestep / TIMES))
    register = model.register_tokens.expand(sample.shape[0], -1, -1)
    context = torch.cat([register, model.context_embedder(states)], dim=1)
    for block in model.joint_transformer_blocks:
        context, tokens = block(hidden_states=tokens, encoder_hidden_states=context, temb=time)
    if len(model.single_transformer_blocks):
        both = torch.cat([context, tokens], dim=1)
        for block in model.single_transformer_blocks:
            both = block(hidden_states=both, temb=time)
        tokens = both[:, context.shape[1] :]
    patches = model.proj_out(model.norm_out(tokens, time))
    return transformer2d.unpatch(patches, sample, model.config.patch_size)


def embed(layer: Any, sample: Any) -> Any:
    """[B, C, h, w] to tokens with positions of the middle of the square that was learned: [B, (h / p) (w / p), D]."""
    side, dim = layer.patch_size, layer.pos_embed.shape[2]
    patches = sample.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, rows, p, columns, p]
    patches = layer.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3))  # [B, rows, columns, D]
    rows, columns = sample.shape[2] // side, sample.shape[3] // side
    whole = math.isqrt(layer.pos_embed_max_size)
    top, left = whole // 2 - rows // 2, whole // 2 - columns // 2
    square = layer.pos_embed[:, : whole * whole].reshape(1, whole, whole, dim)
    return (patches + square[:, top : top + rows, left : left + columns]).flatten(1, 2)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """diffusers' default, or as much as there are positions for: (height, width) in pixels."""
    side = min(SIDE, _largest(checkpoint) * parts.pixels_per_latent(checkpoint))
    return side, side


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for a size beyond the positions, and what does not fit the autoencoder."""
    config, drawn = checkpoint.components["transformer"].config, parts.canvas(checkpoint, shape)
    most = _largest(checkpoint) * drawn.factor
    parts.check_patches(shape, _whole(checkpoint, "patch_size", 2) * drawn.factor, most)
    if shape.free:
        raise DexportError(
            f"this model learned its positions, for {most} pixels a side at most; choose one size with --shape"
        )
    parts.check_transformer(config, drawn.channels)
    tokens = Tensor("tokens", "int64", ("batch", LENGTH))
    states, _ = text_encoders.states(checkpoint, LENGTH, "joint_attention_dim", 2048)
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states)
    output = Tensor("output", "float32", drawn.sample.shape)
    return {
        "text": Spec("text", text_encoders.only(checkpoint), text, (tokens,), (states,), {}),
        "denoiser": Spec(
            "denoiser", {"transformer": lambda: build_transformer(config)}, denoiser, inputs, (output,),
            drawn.latent_sizes,
        ),
        **parts.autoencoder(checkpoint, drawn),
    }  # fmt: skip


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance."""
    drawn = parts.canvas(checkpoint, shape)
    patch = _whole(checkpoint, "patch_size", 2)
    return (drawn.stage(checkpoint, Guidance("cfg", GUIDANCE), STEPS, multiple=patch, **parts.UNMASKED_FLOW),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The tokenizer's ids go to ``tokens``."""
    return {"tokenizer": Tokens("tokens", LENGTH)}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor."""
    return parts.rename(component, name)


def _largest(checkpoint: Checkpoint) -> int:
    """The longest side of a sample, in latents, that there are positions for."""
    return math.isqrt(_whole(checkpoint, "pos_embed_max_size", 1024)) * _whole(checkpoint, "patch_size", 2)


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def build_transformer(config: Mapping[str, Any]) -> Any:
    """An AuraFlow transformer of this config.json."""
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel.from_config(dict(config))
