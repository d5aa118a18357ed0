"""IP-Adapter: a picture in place of words, as tokens that each cross-attention of a UNet attends to beside the text's.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2023),
https://arxiv.org/abs/2308.06721. A published file holds ``image_proj.*``, which makes tokens of what CLIP sees in a
picture, and ``ip_adapter.N.to_k_ip.weight`` and ``to_v_ip``, N odd, for each attention in the order of diffusers.
The plain adapter takes the pooled embedding, "plus" the states of all patches through a resampler.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.stored import view
from runtimes.errors import DexportError, first_of
from runtimes.safetensors import Entry, Stored

CLASS = "IPAdapter"  # of the component that makes tokens; not a class of diffusers, which has several for it
IMAGE_ENCODER = "image_encoder"
TOKENS = 4  # of the plain adapter; no file says it
HEAD = 64  # width of a head of the resampler, likewise
# CLIP's, of the picture's three channels
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # the order in which diffusers counts a UNet's attentions
ATTENTION = re.compile(r"((?:down_blocks|up_blocks|mid_block)\..*\.attn2)\.to_k\.weight")
PLAIN = {"proj.weight": "image_embeds.weight", "proj.bias": "image_embeds.bias"}
# The resampler's names, of a layer N in a published file to those of diffusers' class.
LAYER = {
    "0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0", "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2",
}  # fmt: skip


def split(
    file: Path, entries: Mapping[str, Entry], unet: Mapping[str, Stored], index: int
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors of a file by their modules' names: those that make tokens, and those of the UNet's attentions.

    ``index``: how many IP-Adapters the UNet has already. Raises DexportError for a tensor without a use, one that is
    missing, and for keys and values of another UNet.
    """
    left = dict(entries)
    keys: dict[str, Stored] = {}
    attentions = sorted(filter(None, map(ATTENTION.fullmatch, unet)), key=lambda match: _place(match[1]))
    for number, match in enumerate(attentions):
        for part in ("k", "v"):
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            if name not in left:
                raise DexportError(f"{file}: {name!r} is missing; it is no IP-Adapter, or one for another model")
            entry, own = left.pop(name), unet[f"{match[1]}.to_{part}.weight"]
            if entry.shape != own.shape:
                raise DexportError(
                    f"{file}: {name!r} is {list(entry.shape)} where the UNet's own {own.name!r} is {list(own.shape)}; "
                    "it is an IP-Adapter for another model"
                )
            keys[f"{match[1]}.processor.to_{part}_ip.{index}.weight"] = entry
    prefix = "image_proj."
    projection: dict[str, Stored] = {}
    plus = f"{prefix}latents" in left
    for name in [name for name in left if name.startswith(prefix)]:
        renamed = (
            _renamed(name.removeprefix(prefix), left[name]) if plus else _plain(name.removeprefix(prefix), left[name])
        )
        if renamed:
            projection |= renamed
            del left[name]
    if left:
        raise DexportError(
            f"{file}: no use for {first_of(sorted(left))}; the plain IP-Adapter and IP-Adapter Plus for the "
            "checkpoint's UNet are exported, and no Face ID and no Full Face"
        )
    shapes = {name: tensor.shape for name, tensor in projection.items()}
    wanted = (
        ("latents", "proj_in.weight", "proj_out.weight", "layers.0.attn.to_q.weight")
        if plus
        else ("image_embeds.weight", "norm.weight")
    )
    for name in wanted:
        if len(shapes.get(name, ())) != (3 if name == "latents" else 1 if name == "norm.weight" else 2):
            raise DexportError(f"{file}: {name!r} of image_proj is missing or of another shape; it is no IP-Adapter")
    return projection, keys


def _place(attention: str) -> tuple[int, list[int]]:
    block, _, rest = attention.partition(".")
    return BLOCKS.index(block), [int(number) for number in re.findall(r"\d+", rest.removesuffix("attn2"))]


def _plain(name: str, entry: Entry) -> dict[str, Stored]:
    if name in PLAIN or name in ("norm.weight", "norm.bias"):
        return {PLAIN.get(name, name): entry}
    return {}


def _renamed(name: str, entry: Entry) -> dict[str, Stored]:
    """The resampler's tensor by diffusers' name, or two where it has two in one; {} for one that is none of it."""
    if name == "latents" or re.fullmatch(r"(proj_in|proj_out|norm_out)\.(weight|bias)", name):
        return {name: entry}
    found = re.fullmatch(r"layers\.(\d+)\.(\d\.\w+)\.(weight|bias)", name)
    if not found:
        return {}
    number, part, kind = found.groups()
    if part in LAYER:
        return {f"layers.{number}.{LAYER[part]}.{kind}": entry}
    if part != "0.to_kv" or len(entry.shape) != 2 or entry.shape[0] % 2:
        return {}
    height, width = entry.shape[0] // 2, entry.shape[1]
    return {
        f"layers.{number}.attn.to_{half}.{kind}": view(entry, (height, width), (width, 1), offset * height * width)
        for offset, half in enumerate("kv")
    }


def is_plus(projection: Mapping[str, Stored]) -> bool:
    """Whether the adapter takes all patches of the picture."""
    return "latents" in projection


def tokens(projection: Mapping[str, Stored]) -> tuple[int, int]:
    """How many tokens an adapter makes of a picture, and their width."""
    if is_plus(projection):
        return projection["latents"].shape[1], projection["proj_out.weight"].shape[0]
    return TOKENS, projection["image_embeds.weight"].shape[0] // TOKENS


def taken(projection: Mapping[str, Stored]) -> int:
    """How many numbers an adapter takes of a picture, or of each of its patches."""
    return projection["proj_in.weight" if is_plus(projection) else "image_embeds.weight"].shape[1]


def build_projection(projection: Mapping[str, Stored]) -> Any:
    """The module that makes tokens, of the sizes that its weights have."""
    from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection

    count, width = tokens(projection)
    if not is_plus(projection):
        return ImageProjection(taken(projection), width, count)
    hidden, inner = projection["proj_in.weight"].shape[0], projection["layers.0.attn.to_q.weight"].shape[0]
    depth = len({name.split(".")[1] for name in projection if name.startswith("layers.")})
    return IPAdapterPlusImageProjection(
        embed_dims=taken(projection), output_dims=width, hidden_dims=hidden, depth=depth,
        dim_head=HEAD, heads=inner // HEAD, num_queries=count,
    )  # fmt: skip


def build_encoder(config: Mapping[str, Any]) -> Any:
    """CLIP's image encoder of this config.json, with the mean and deviation of the pictures that it was trained on."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(config)))
    for name, values in (("pixel_mean", MEAN), ("pixel_deviation", DEVIATION)):
        encoder.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
    return encoder


def encode(encoder: Any, projection: Any, image: Any) -> tuple[Any, Any]:
    """A picture [B, 3, H, W] in [0, 1] to its tokens [B, T, D], and to those that stand for no picture.

    As in diffusers, those are of an embedding of zeros, for "plus" of a picture that is 0 after normalization.
    """
    import torch

    normal = (image - encoder.pixel_mean) / encoder.pixel_deviation
    if not hasattr(projection, "latents"):
        embedding = encoder(pixel_values=normal).image_embeds
        return projection(embedding), projection(torch.zeros_like(embedding))
    # As one batch: apart, the resampler's first attentions would have one query, over which TensorRT-RTX 1.7 crashes.
    both = torch.cat([normal, torch.zeros_like(normal)])
    tokens_ = projection(encoder(pixel_values=both, output_hidden_states=True).hidden_states[-2])
    return tokens_[: image.shape[0]], tokens_[image.shape[0] :]


def install(unet: Any, count: int) -> Any:
    """Give each cross-attention of a UNet keys and values for the tokens of ``count`` adapters; returns the UNet.

    Its ``encoder_hidden_states`` are then (states [B, S, D], [(tokens [B, T, D], scale [B]), ...]).
    """
    import torch

    class Decoupled(torch.nn.Module):
        """An attention processor of diffusers: attention to the text, plus each adapter's own, scaled."""

        def __init__(self, attention: Any) -> None:
            super().__init__()
            width, inner = attention.to_k.in_features, attention.to_k.out_features
            self.to_k_ip, self.to_v_ip = (
                torch.nn.ModuleList(torch.nn.Linear(width, inner, bias=False) for _ in range(count)) for _ in range(2)
            )

        def forward(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, **ignored: Any) -> Any:
            states, pictures = encoder_hidden_states
            query = _heads(attn.to_q(hidden_states), attn.heads)
            attend = torch.nn.functional.scaled_dot_product_attention
            out = attend(query, *(_heads(layer(states), attn.heads) for layer in (attn.to_k, attn.to_v)))
            for (tokens_, scale), *layers in zip(pictures, self.to_k_ip, self.to_v_ip, strict=True):
                key, value = (_heads(layer(tokens_), attn.heads) for layer in layers)
                # Written out, since TensorRT-RTX 1.7 crashes over two Attention nodes that have one query.
                more = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value
                out = out + scale[:, None, None, None] * more
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            module.set_processor(Decoupled(module))
    return unet


def _heads(value: Any, heads: int) -> Any:
    """[B, S, heads * D] as [B, heads, S, D]."""
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)
