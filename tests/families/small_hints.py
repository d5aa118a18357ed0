"""Tiny networks that steer by pictures, with random weights: of diffusers' own classes, or in the published names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE = 32  # pixels of the pictures that the tiny checkpoints draw, and that the image encoder takes
SEEN = {"hidden_size": 16, "projection_dim": 24}


def shaken(module: Any, seed: int, scale: float = 0.2) -> Any:
    """The module with noise on every weight: those that steer begin with nothing but zeros at their ends."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        weight.data.add_(scale * torch.randn_like(weight))
    return module.eval()


def control(unet: Any, seed: int) -> Any:
    """A ControlNet for a UNet, whose autoencoder makes a quarter of the pixels latents."""
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return shaken(network, seed)


def features(seed: int, kind: str = "full_adapter", **options: Any) -> Any:
    """A T2I-Adapter."""
    small = {"in_channels": 3, "channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 2}
    return shaken(diffusers.T2IAdapter(**small | options, adapter_type=kind), seed)


def write_image_encoder(folder: Path) -> None:
    """CLIP's image encoder for pictures of 32 x 32 pixels."""
    config = CLIPVisionConfig(
        **SEEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    shaken(CLIPVisionModelWithProjection(config), 21, 0.3).save_pretrained(folder)


def write_ip_adapter(file: Path, unet: Any, *, plus: bool = False) -> None:
    """An IP-Adapter in the names of its training code."""
    torch.manual_seed(22)
    width = unet.config.cross_attention_dim
    tensors = _resampler(width) if plus else _projection(width)
    tensors = {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
    attentions = [attention for name, attention in unet.attn_processors.items() if "attn2" in name]
    modules = dict(unet.named_modules())
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    assert len(names) == len(attentions)
    for index, name in enumerate(names):
        for part in ("k", "v"):
            own = getattr(modules[name], f"to_{part}").weight
            tensors[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = 0.3 * torch.randn(own.shape)
    save_file(tensors, file)


def _projection(width: int) -> dict[str, torch.Tensor]:
    size = 4 * width
    return {
        "proj.weight": 0.3 * torch.randn(size, SEEN["projection_dim"]), "proj.bias": 0.3 * torch.randn(size),
        "norm.weight": 1 + 0.3 * torch.randn(width), "norm.bias": 0.3 * torch.randn(width),
    }  # fmt: skip


def _resampler(width: int, hidden: int = 16, queries: int = 3) -> dict[str, torch.Tensor]:
    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.3 * torch.randn(size), f"{name}.bias": 0.3 * torch.randn(size)}

    tensors = {
        "latents": torch.randn(1, queries, hidden),
        "proj_in.weight": 0.3 * torch.randn(hidden, SEEN["hidden_size"]), "proj_in.bias": 0.3 * torch.randn(hidden),
        "proj_out.weight": 0.3 * torch.randn(width, hidden), "proj_out.bias": 0.3 * torch.randn(width),
        **norm("norm_out", width),
    }  # fmt: skip
    for layer in range(4):
        tensors |= norm(f"layers.{layer}.0.norm1", hidden) | norm(f"layers.{layer}.0.norm2", hidden)
        tensors |= norm(f"layers.{layer}.1.0", hidden)
        for name, shape in (
            ("0.to_q", (64, hidden)), ("0.to_kv", (128, hidden)), ("0.to_out", (hidden, 64)),
            ("1.1", (4 * hidden, hidden)), ("1.3", (hidden, 4 * hidden)),
        ):  # fmt: skip
            tensors[f"layers.{layer}.{name}.weight"] = 0.3 * torch.randn(shape)
    return tensors
