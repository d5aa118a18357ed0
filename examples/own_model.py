"""A diffusion model of one's own, in plain PyTorch: trained here in a minute or two, built, and drawn without torch.

    python examples/own_model.py

Its UNet, its noise schedule and its four classes are nobody else's; dexport is told what they are by one ``OwnModel``.
Leaves the bundles and ``shapes.png`` in ``own-model/``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import dexport
from runtimes.image import grid

CLASSES = ("disc", "square", "triangle", "ring")
NONE = len(CLASSES)  # the number that stands for no class
SIDE = 16
STEPS = 500  # of the noise schedule
DROPPED = 0.15  # of the classes in training, so that there is something to guide away from


def signal(count: int = STEPS) -> Tensor:
    """The share of the signal's variance after each step: log of signal to noise, evenly from 7 to -7."""
    return torch.linspace(7, -7, count, dtype=torch.float64).sigmoid()


class Block(nn.Module):
    """Two convolutions; time and class shift what lies between them."""

    def __init__(self, inner: int, outer: int, known: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)])
        self.shift, self.skip = nn.Linear(known, outer), nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """[B, inner, h, w] and [B, known] to [B, outer, h, w]."""
        h = self.first(functional.silu(self.norms[0](x))) + self.shift(known)[:, :, None, None]
        return self.skip(x) + self.second(functional.silu(self.norms[1](h)))


class UNet(nn.Module):
    """Two levels, and attention at the lower one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        known = 4 * width
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -math.log(1000), width)))
        self.time, self.label = nn.Linear(2 * width, known), nn.Embedding(NONE + 1, known)
        self.begin, self.end = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, known), Block(width, 2 * width, known)])
        self.norm, self.attention = nn.GroupNorm(8, 2 * width), nn.MultiheadAttention(2 * width, 4, batch_first=True)
        self.up = nn.ModuleList([Block(4 * width, 2 * width, known), Block(3 * width, width, known)])

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """[B, 3, h, w], [B] and [B] to the velocity, [B, 3, h, w]."""
        angles = timestep[:, None] * self.frequencies
        known = functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(labels))
        high = self.down[0](self.begin(sample), known)
        low = x = self.down[1](functional.avg_pool2d(high, 2), known)
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, x.shape[2:])
        x = functional.interpolate(self.up[0](torch.cat([x, low], 1), known), scale_factor=2.0)
        return self.end(self.up[1](torch.cat([x, high], 1), known))


def shapes(labels: Tensor, random: torch.Generator) -> Tensor:
    """Pictures of these classes in [-1, 1], [B, 3, SIDE, SIDE]: any place, size and colour on a dark ground."""
    count = len(labels)
    size, colour, x, y = (torch.rand(count, n, 1, 1, generator=random) for n in (1, 3, 1, 1))
    radius = 3 + 3 * size
    line = torch.arange(SIDE) + 0.5
    dx = line[None, None, None, :] - (SIDE / 2 + (2 * x - 1) * (SIDE / 2 - radius))
    dy = line[None, None, :, None] - (SIDE / 2 + (2 * y - 1) * (SIDE / 2 - radius))
    far = (dx**2 + dy**2).sqrt()
    triangle = torch.maximum(dy - 0.7 * radius, (1.8 * dx.abs() - dy - 0.8 * radius) / 2)
    edges = [far - radius, torch.maximum(dx.abs(), dy.abs()) - 0.8 * radius, triangle, (far - 0.8 * radius).abs() - 0.9]
    inside = (0.5 - torch.stack(edges)[labels, torch.arange(count)]).clamp(0, 1)
    return inside * (0.4 + 1.5 * colour) - 0.9


def train(steps: int, batch: int = 64) -> UNet:
    """A UNet that has learned to say the velocity (Salimans and Ho, https://arxiv.org/abs/2202.00512)."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    model = UNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    kept = signal().float()
    for step in range(steps):
        labels = torch.randint(NONE, (batch,), generator=random)
        clean, t = shapes(labels, random), torch.randint(STEPS, (batch,), generator=random)
        alpha, sigma = (part[t].sqrt()[:, None, None, None] for part in (kept, 1 - kept))
        noise = torch.randn(clean.shape, generator=random)
        told = torch.where(torch.rand(batch, generator=random) < DROPPED, NONE, labels)
        velocity = model(alpha * clean + sigma * noise, t.float(), told)
        loss = functional.mse_loss(velocity, alpha * noise - sigma * clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step + 1 == steps:
            print(f"training: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return model


def main() -> None:
    """Train, build for two backends, draw, and say where the picture is."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("-o", "--output", type=Path, default=Path("own-model"), help="folder (default: own-model)")
    arguments.add_argument("--training", type=int, default=1200, help="steps of the training (default: 1200)")
    options = arguments.parse_args()
    own = dexport.OwnModel(
        train(options.training), sample=(3, SIDE, SIDE), alphas_cumprod=signal().tolist(), prediction="v_prediction",
        labels=CLASSES, null_label=NONE, guidance=2.0, steps=20,
    )  # fmt: skip
    rows: list[list[Image.Image]] = []
    made = dexport.build(own, options.output, targets=["onnxruntime", "openvino=bf16"], overwrite=True)
    for built in made:
        pipeline = dexport.load(built.folder)
        pictures = pipeline(labels=CLASSES, images=3, seed=1).images
        rows.append([picture.resize((5 * SIDE, 5 * SIDE), Image.Resampling.NEAREST) for picture in pictures])
        print(f"{built.folder}: {built.accuracy['image']['psnr_db']:.1f} dB from the torch model")
    sheet = grid(
        rows, [f"{built.target} {built.precision}" for built in made], [name for name in CLASSES for _ in "123"]
    )
    sheet.save(options.output / "shapes.png")
    print(options.output / "shapes.png")


if __name__ == "__main__":
    main()
