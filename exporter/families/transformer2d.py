"""What transformers over patches of latents share: attention under a mask, and sine positions for every size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.families import parts
from runtimes.errors import DexportError

# Added to the scores of padding, as PixArt and Sana were trained; after softmax it is 0, and fp16 can hold it.
MASKED = -10000.0


class MaskedAttention:
    """Cross-attention of diffusers' ``Attention`` under a mask of the keys, [B, S]: 1 for a token, 0 for padding.

    diffusers' own processors repeat the mask for each head, and ask for sizes in a way that fixes the batch.
    ``joint_norm``: queries and keys are normalized over all heads together, not each head by itself.
    """

    def __init__(self, *, joint_norm: bool = False) -> None:
        self.joint_norm = joint_norm

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any) -> Any:
        """[B, Q, D], [B, S, E] and [B, S] to [B, Q, D]."""

        def heads(values: Any, norm: Any) -> Any:  # [B, L, H·d] to [B, H, L, d]
            if norm is not None and self.joint_norm:
                values = norm(values)
            values = values.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return values if norm is None or self.joint_norm else norm(values)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(encoder_hidden_states), attn.norm_k)
        value = heads(attn.to_v(encoder_hidden_states), None)
        result = attend(query, key, value, attention_mask, attn.scale)
        return attn.to_out[0](result.transpose(1, 2).flatten(2)) / attn.rescale_output_factor


def attend(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """Attention over heads, [B, H, Q, d], [B, H, S, d] and again, with a mask of the keys [B, S] or None."""
    import torch

    bias = None if mask is None else ((1 - mask) * MASKED)[:, None, None].expand(-1, -1, query.shape[2], -1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def sine_positions(embed: Any, height: int, width: int, *, free: bool) -> Any:
    """Give diffusers' ``PatchEmbed`` the sine table of a sample [.., height, width]; with ``free``, of every size.

    The table is stretched over the picture: a position is the patch's place in one of the checkpoint's own size.
    Returns what is to stand in its place.
    """
    import torch
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    rows, columns, dim = height // embed.patch_size, width // embed.patch_size, embed.pos_embed.shape[-1]
    table = get_2d_sincos_pos_embed(
        dim, (rows, columns), base_size=embed.base_size, interpolation_scale=embed.interpolation_scale
    )
    embed.register_buffer("pos_embed", table.float()[None], persistent=False)
    embed.height, embed.width = rows, columns
    if not free:
        return embed
    steps = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
    embed.register_buffer("frequencies", (10000.0**-steps).float(), persistent=False)
    embed.forward = lambda sample: _embed(embed, sample)
    return embed


def _embed(embed: Any, sample: Any) -> Any:
    """What PatchEmbed does, with its table made in the graph: [B, C, h, w] to [B, (h / p) (w / p), D]."""
    import torch

    patches = embed.proj(sample)  # [B, D, rows, columns]

    def table(count: Any) -> Any:  # [count, D / 2]
        places = torch.arange(count).float() * embed.base_size / count / embed.interpolation_scale
        angles = places[:, None] * embed.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    down, across = table(patches.shape[2]), table(patches.shape[3])
    spread = down[:, None].expand(-1, across.shape[0], -1), across[None].expand(down.shape[0], -1, -1)
    positions = torch.cat([spread[1], spread[0]], dim=2)  # [rows, columns, D]: diffusers' has the columns first
    return (patches.permute(0, 2, 3, 1) + positions).flatten(1, 2)


def finish(model: Any, tokens: Any, embedded: Any) -> Any:
    """The last norm of [B, T, D], modulated by the embedded timestep [B, D], and the projection: [B, T, p p C]."""
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    return model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)


def unpatch(tokens: Any, sample: Any, side: int) -> Any:
    """[B, (h / p) (w / p), p p C], the patches row by row, to [B, C, h, w] of the size of ``sample``."""
    rows, columns = sample.shape[2] // side, sample.shape[3] // side
    patches = tokens.unflatten(2, (side, side, -1)).unflatten(1, (rows, columns))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def out_channels(config: Mapping[str, Any], channels: int, default: int) -> int:
    """The channels of what a transformer predicts for latents of ``channels``: as many, or also a learned variance.

    default: of a config that does not say. Raises DexportError for a transformer that is made for other latents.
    """
    taken = parts.whole("transformer", config, "in_channels", channels)
    given = parts.whole("transformer", {"out_channels": default, **config}, "out_channels", taken)
    if taken != channels or given not in (channels, 2 * channels):
        raise DexportError(
            f"transformer/config.json: {taken} channels in and {given} out where the autoencoder has {channels}; there "
            "must be as many in, and as many or twice as many out"
        )
    return given
