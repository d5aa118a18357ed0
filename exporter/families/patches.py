"""Latents as tokens: packed in patches, in order, and turned by where each of them is.

Rotary positions: Su et al. (2021), https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIDE = 1024  # the most tokens along a side that a table of positions holds: a picture of 16384 pixels


def pack(sample: Any, patch: int, *, last: bool = False) -> Any:
    """Latents [B, C, h, w] to a token for each patch, row by row: [B, h/p · w/p, C · p · p].

    last: the channels are innermost, [p, p, C] in a token.
    """
    batch, channels, height, width = sample.shape
    tokens = sample.reshape(batch, channels, height // patch, patch, width // patch, patch)
    order = (0, 2, 4, 3, 5, 1) if last else (0, 2, 4, 1, 3, 5)
    return tokens.permute(order).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Any, height: Any, width: Any, patch: int, *, last: bool = False) -> Any:
    """The inverse, for ``height`` by ``width`` tokens: [B, C, p · height, p · width]."""
    batch, channels = tokens.shape[0], tokens.shape[2] // (patch * patch)
    if last:
        sample = tokens.reshape(batch, height, width, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    else:
        sample = tokens.reshape(batch, height, width, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return sample.reshape(batch, channels, height * patch, width * patch)


def grid(rows: Any, columns: Any) -> Any:
    """Row and column of each token, int64 [height · width, 2], of the positions along both sides."""
    import torch

    height, width = rows.shape[0], columns.shape[0]
    return torch.stack(
        [rows[:, None].expand(height, width), columns[None].expand(height, width)], dim=-1
    ).reshape(-1, 2)  # fmt: skip


def rotate(heads: Any, cos: Any, sin: Any) -> Any:
    """Heads [B, S, H, d] of which each pair of channels is turned by the cosines and sines, [S, d] or [B, S, d]."""
    import torch

    one, two = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return heads * cos[..., None, :] + torch.stack([-two, one], dim=-1).flatten(3) * sin[..., None, :]


def rotations(
    dims: Sequence[int], positions: Sequence[range], theta: float = 10000.0, *, powers: str = "float64",
    angles: str = "float64",
) -> Any:  # fmt: skip
    """A module that gives the cosines and sines, [..., sum(dims)] each, of places [..., axes] within ``positions``.

    dims: how many channels of a head turn by each axis. They lie in tables, computed as the family's model does, with
    its powers of theta and its angles rounded to these types: no backend has to, and TensorRT knows no float64.
    """
    import torch

    class Rotations(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for axis, (dim, own) in enumerate(zip(dims, positions, strict=True)):
                steps = torch.arange(0, dim, 2, dtype=getattr(torch, powers)) / dim
                numbers = torch.arange(own.start, own.stop, dtype=steps.dtype)
                turns = torch.outer(numbers, 1.0 / theta**steps).to(getattr(torch, angles))
                for name, values in (("cos", turns.cos()), ("sin", turns.sin())):
                    table = values.repeat_interleave(2, dim=1).float()
                    self.register_buffer(f"{name}_{axis}", table, persistent=False)

        def forward(self, places: Any) -> tuple[Any, Any]:
            cos, sin = (
                torch.cat([getattr(self, f"{name}_{axis}")[places[..., axis]] for axis in range(len(dims))], dim=-1)
                for name in ("cos", "sin")
            )
            return cos, sin

    return Rotations()
