"""PixArt-α and PixArt-Σ: a transformer over the patches of latents, cross-attention to T5's states, KL autoencoder.

Chen et al., "PixArt-α" (2023), https://arxiv.org/abs/2310.00426; "PixArt-Σ" (2024), https://arxiv.org/abs/2403.04692
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import T5_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders, transformer2d
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "pixart"
COMPONENTS = {
    # The first checkpoints name the class that PixArt's was split off from.
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
    "text_encoder": ("T5EncoderModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": T5_TOKENIZERS,
}
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens of a prompt
GUIDANCE, STEPS = 4.5, 20  # diffusers' defaults
TOLD = 128  # sample_size of the model that is told the picture's size, where its config does not say which is


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] token ids to T5's states and their mask: [B, S, D], [B, S]."""
    mask = text_encoders.there(modules.text_encoder, tokens).float()
    return modules.text_encoder(tokens, attention_mask=mask).last_hidden_state, mask


def predict(model: Any, sample: Any, timestep: Any, states: Any, mask: Any, resolution: Any = None) -> Any:
    """[B, C, h, w], [B], [B, S, D], [B, S], and [B, 2] if it is told the size, to all that it predicts.

    diffusers' own forward, without what asks for sizes that are free here.
    """
    told = {"resolution": resolution, "aspect_ratio": None}
    if resolution is not None:
        told["aspect_ratio"] = resolution[:, :1] / resolution[:, 1:]
    tokens = model.pos_embed(sample)  # [B, T, D]
    time, embedded = model.adaln_single(timestep, told, batch_size=sample.shape[0], hidden_dtype=sample.dtype)
    if model.caption_projection is not None:
        states = model.caption_projection(states)
    for block in model.transformer_blocks:
        tokens = block(tokens, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=time)
    patches = transformer2d.finish(model, tokens, embedded)
    return transformer2d.unpatch(patches, sample, model.config.patch_size)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size that the checkpoint was made for, (height, width) in pixels."""
    side = _whole(checkpoint, "sample_size", 128) * parts.pixels_per_latent(checkpoint)
    return side, side


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for a transformer that is none of PixArt's."""
    config, drawn = checkpoint.components["transformer"].config, parts.canvas(checkpoint, shape)
    parts.check_patches(shape, _whole(checkpoint, "patch_size", 2) * drawn.factor, parts.SIDE)
    channels = drawn.channels
    given = transformer2d.out_channels(config, channels, 8)
    out = given if checkpoint.scheduler.get("variance_type") in parts.LEARNED else channels

    def denoiser(modules: Any, *inputs: Any) -> Any:
        output = predict(modules.transformer, *inputs)
        return output[:, :out] if out < given else output

    tokens = Tensor("tokens", "int64", ("batch", LENGTHS[checkpoint.pipeline]))
    known = text_encoders.states(checkpoint, LENGTHS[checkpoint.pipeline], "caption_channels", 4096)
    inputs = [drawn.sample, Tensor("timestep", "float32", ("batch",)), *known]
    if _is_told(checkpoint):
        inputs.append(Tensor("resolution", "float32", ("batch", 2)))
    output = Tensor("output", "float32", ("batch", out, *drawn.sample.shape[2:]))
    build = {"transformer": lambda: build_transformer(config, shape, drawn.factor)}
    return {
        "text": Spec("text", text_encoders.only(checkpoint), text, (tokens,), known, {}),
        "denoiser": Spec("denoiser", build, denoiser, tuple(inputs), (output,), drawn.latent_sizes),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance."""
    drawn = parts.canvas(checkpoint, shape)
    told = {"resolution": ["image_height", "image_width"]} if _is_told(checkpoint) else {}
    patch = _whole(checkpoint, "patch_size", 2)
    return (drawn.stage(checkpoint, Guidance("cfg", GUIDANCE), STEPS, inputs=told, multiple=patch),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The tokenizer's ids of a prompt in lower case, as diffusers' pipeline makes it, go to ``tokens``."""
    return {"tokenizer": Tokens("tokens", LENGTHS[checkpoint.pipeline], lower=True)}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for the table of positions, which is computed."""
    return None if name == "pos_embed.pos_embed" else parts.rename(component, name)


def _is_told(checkpoint: Checkpoint) -> bool:
    """Whether the transformer is told the size of the picture."""
    told = checkpoint.components["transformer"].config.get("use_additional_conditions")
    return _whole(checkpoint, "sample_size", 128) == TOLD if told is None else bool(told)


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def build_transformer(config: Mapping[str, Any], shape: Shape, factor: int) -> Any:
    """A PixArt transformer of this config.json, for samples of one shape or of all."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel.from_config(dict(config))
    sides = shape.height // factor, shape.width // factor
    model.pos_embed = transformer2d.sine_positions(model.pos_embed, *sides, free=shape.free)
    for block in model.transformer_blocks:
        block.attn2.set_processor(transformer2d.MaskedAttention())
    return model
