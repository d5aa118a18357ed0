"""Latents as tokens: packed in patches, in order, and turned by where each of them is.

Rotary positions: Su et al. (2021), https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIDE = 1024  # positions along a side where the size of a picture is free


def pack(sample: Any, patch: int = 2) -> Any:
    """Latents [B, C, h, w] to a token for each patch, row by row: [B, h/p · w/p, C · p · p]."""
    batch, channels, height, width = sample.shape
    tokens = sample.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Any, height: Any, width: Any, patch: int = 2) -> Any:
    """The inverse, for ``height`` by ``width`` tokens: [B, C, p · height, p · width]."""
    batch, channels = tokens.shape[0], tokens.shape[2] // (patch * patch)
    sample = tokens.reshape(batch, height, width, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return sample.reshape(batch, channels, height * patch, width * patch)


def grid(height: Any, width: Any) -> Any:
    """Row and column of each token, int64 [height · width, 2]."""
    import torch

    rows, columns = torch.arange(height), torch.arange(width)
    return torch.stack(
        [rows[:, None].expand(height, width), columns[None].expand(height, width)], dim=-1
    ).reshape(-1, 2)  # fmt: skip


def rotations(dims: Sequence[int], counts: Sequence[int], theta: float = 10000.0) -> Any:
    """A module that gives the cosines and sines, [S, sum(dims)] each, of positions [S, axes].

    dims: how many channels of a head turn by each axis. counts: how many positions each has, from 0. They lie in
    tables, computed in float64 as diffusers does: no backend has to do so, and TensorRT could not.
    """
    import torch

    class Rotations(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for axis, (dim, count) in enumerate(zip(dims, counts, strict=True)):
                powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
                angles = torch.outer(torch.arange(count, dtype=torch.float64), 1.0 / theta**powers)
                for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
                    table = values.repeat_interleave(2, dim=1).float()
                    self.register_buffer(f"{name}_{axis}", table, persistent=False)

        def forward(self, positions: Any) -> tuple[Any, Any]:
            cos, sin = (
                torch.cat([getattr(self, f"{name}_{axis}")[positions[:, axis]] for axis in range(len(dims))], dim=-1)
                for name in ("cos", "sin")
            )
            return cos, sin

    return Rotations()
