"""Lumina 2: a transformer over the tokens of a text and the patches of latents in one row, Gemma 2, KL autoencoder.

Qin et al., "Lumina-Image 2.0" (2025), https://arxiv.org/abs/2503.21758
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import GEMMA_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders, transformer2d
from runtimes import timetable
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "lumina2"
COMPONENTS = {
    "transformer": ("Lumina2Transformer2DModel",),
    "text_encoder": ("Gemma2Model",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": GEMMA_TOKENIZERS,
}
LENGTH = 256  # tokens of a prompt
GUIDANCE, STEPS = 4.0, 30  # diffusers' defaults
AXES = (32, 32, 32)  # Lumina2Transformer2DModel's default: channels of a head for places in the text, rows and columns
TIMES = 1000  # default of the schedulers' num_train_timesteps
# What the text encoder reads before a prompt, word for word as diffusers' pipeline has it; before a negative prompt
# there is nothing.
INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] token ids to Gemma's states before its last layer, and their mask: [B, S, D], [B, S]."""
    mask = text_encoders.there(modules.text_encoder, tokens).float()
    return modules.text_encoder(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-2], mask


def predict(model: Any, sample: Any, time: Any, states: Any, mask: Any) -> Any:
    """[B, C, h, w], [B] from 0 for noise to 1, [B, S, D], [B, S] to the flow towards the picture: [B, C, h, w].

    diffusers puts a picture's tokens right behind those of its text, so that the length depends on the prompt. Here
    they begin at S for every prompt, and nothing looks at what lies between: the numbers are the same.
    """
    import torch

    side, length = model.config.patch_size, states.shape[1]
    rows, columns = sample.shape[2] // side, sample.shape[3] // side
    embedded, context = model.time_caption_embed(sample, time, states)
    patches = sample.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, rows, p, columns, p]
    tokens = model.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    turns = turns_of(model, mask, rows, columns)
    for layer in model.context_refiner:
        context = layer(context, mask, turns[:, :length])
    for layer in model.noise_refiner:
        tokens = layer(tokens, None, turns[:, length:], embedded)
    both = torch.cat([context, tokens], dim=1)
    seen = torch.cat([mask, torch.ones_like(tokens[:, :, 0])], dim=1)
    for layer in model.layers:
        both = layer(both, seen, turns, embedded)
    return transformer2d.unpatch(model.norm_out(both, embedded)[:, length:], sample, side)


class RotatedAttention:
    """Attention of diffusers' ``Attention`` over tokens whose queries and keys are turned by their positions.

    diffusers' own processor turns them with complex numbers, which ONNX does not have.
    """

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, image_rotary_emb: Any
    ) -> Any:
        """[B, L, D], the same again, a mask [B, L] or None, and turns [B, L, d / 2, 2] to [B, L, D]."""
        width = attn.to_q.out_features // attn.heads

        def heads(values: Any, norm: Any) -> Any:  # [B, L, H·d] to [B, H, L, d]
            values = values.unflatten(2, (-1, width))
            values = (values if norm is None else turned(norm(values), image_rotary_emb)).transpose(1, 2)
            fewer = attn.heads // values.shape[1]  # heads of keys and values, than of queries
            return values[:, :, None].expand(-1, -1, fewer, -1, -1).flatten(1, 2) if fewer > 1 else values

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(encoder_hidden_states), attn.norm_k)
        value = heads(attn.to_v(encoder_hidden_states), None)
        result = transformer2d.attend(query, key, value, attention_mask, attn.scale)
        return attn.to_out[0](result.transpose(1, 2).flatten(2))


def turned(values: Any, turns: Any) -> Any:
    """Pairs of numbers in [B, L, H, d], turned by cosines and sines [B, L, d / 2, 2]."""
    import torch

    one, other = values.unflatten(3, (-1, 2)).unbind(4)
    cosine, sine = turns[:, :, None].unbind(4)
    return torch.stack([one * cosine - other * sine, one * sine + other * cosine], dim=4).flatten(3)


def turns_of(model: Any, mask: Any, rows: Any, columns: Any) -> Any:
    """The turns of each token of a text [B, S] and of a picture behind it: [B, S + rows·columns, d / 2, 2].

    A token has a place on three axes: in the text, row, and column. A picture's place in the text is its end.
    """
    import torch

    batch, length = mask.shape
    text = [model.axis_0[:length], *(axis[:1].expand(length, -1, -1) for axis in (model.axis_1, model.axis_2))]
    end = model.axis_0[(mask > 0).long().sum(1)]  # [B, d / 2, 2]
    picture = [
        end[:, None, None].expand(-1, rows, columns, -1, -1),
        model.axis_1[None, :rows, None].expand(batch, -1, columns, -1, -1),
        model.axis_2[None, None, :columns].expand(batch, rows, -1, -1, -1),
    ]
    words = torch.cat(text, dim=1)[None].expand(batch, -1, -1, -1)
    return torch.cat([words, torch.cat(picture, dim=3).flatten(1, 2)], dim=1)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size that the checkpoint was made for, (height, width) in pixels."""
    side = _whole(checkpoint, "sample_size", 128) * parts.pixels_per_latent(checkpoint)
    return side, side


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for a size beyond the positions, and what does not fit the autoencoder."""
    config, drawn = checkpoint.components["transformer"].config, parts.canvas(checkpoint, shape)
    _check_places(checkpoint, shape, drawn.factor)
    parts.check_transformer(config, drawn.channels)
    head = _whole(checkpoint, "hidden_size", 2304) // _whole(checkpoint, "num_attention_heads", 24)
    parts.check_axes(config, "axes_dim_rope", AXES, head)
    times = parts.number("scheduler", checkpoint.scheduler, "num_train_timesteps", TIMES)

    def denoiser(modules: Any, sample: Any, timestep: Any, *known: Any) -> Any:
        # The model's time runs from noise to picture, and so does its flow.
        return -predict(modules.transformer, sample, 1 - timestep / times, *known)

    tokens = Tensor("tokens", "int64", ("batch", LENGTH))
    known = text_encoders.states(checkpoint, LENGTH, "cap_feat_dim", 1024)
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), *known)
    output = Tensor("output", "float32", drawn.sample.shape)
    return {
        "text": Spec("text", text_encoders.only(checkpoint, "right"), text, (tokens,), known, {}),
        "denoiser": Spec(
            "denoiser", {"transformer": lambda: build_transformer(config)}, denoiser, inputs, (output,),
            drawn.latent_sizes,
        ),
        **parts.autoencoder(checkpoint, drawn),
    }  # fmt: skip


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance, after which each row of the output is as long as with the prompt."""
    drawn = parts.canvas(checkpoint, shape)
    return (
        drawn.stage(
            checkpoint, Guidance("cfg", GUIDANCE, normalize="rows"), STEPS,
            scheduler=_scheduler(checkpoint, drawn.channels), multiple=_whole(checkpoint, "patch_size", 2),
            sigmas="even", **parts.UNMASKED_FLOW,
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The ids of the instruction and a prompt, or of a negative prompt alone, go to ``tokens``."""
    return {"tokenizer": Tokens("tokens", LENGTH, f"{INSTRUCTION}{{}}", "{}", side="right")}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor."""
    if component == "text_encoder":
        return text_encoders.rename_language(name)
    return parts.rename(component, name)


def _scheduler(checkpoint: Checkpoint, channels: int) -> Mapping[str, Any]:
    """The scheduler's config, with the shift by resolution as the fixed one that it is for all sizes.

    diffusers' pipeline counts the sample's channels where others count its tokens.
    """
    config = checkpoint.scheduler
    if not config.get("use_dynamic_shifting"):
        return config
    mu = timetable.shift(config, channels)
    fixed = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return {**config, "use_dynamic_shifting": False, "shift": fixed}


def _check_places(checkpoint: Checkpoint, shape: Shape, factor: int) -> None:
    """Raise DexportError for a picture without whole patches, or with more of them than there are places for."""
    patch = _whole(checkpoint, "patch_size", 2) * factor
    places = checkpoint.components["transformer"].config.get("axes_lens", [300, 512, 512])
    if not isinstance(places, list) or len(places) != 3 or any(type(count) is not int for count in places):
        raise DexportError(f"transformer/config.json: axes_lens={places!r:.60} must be three whole numbers")
    if places[0] <= LENGTH:
        raise DexportError(f"transformer/config.json: axes_lens={places!r:.60} must begin with more than {LENGTH}")
    parts.check_patches(shape, patch, min(places[1:]) * patch)


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A Lumina 2 transformer of this config.json, with its positions' turns as real numbers."""
    import torch
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel.from_config(dict(config))
    for index, table in enumerate(model.rope_embedder.freqs_cis):  # complex [places, d / 2]
        model.register_buffer(f"axis_{index}", torch.view_as_real(table).float(), persistent=False)
    for layer in (*model.context_refiner, *model.noise_refiner, *model.layers):
        layer.attn.set_processor(RotatedAttention())
    return model
