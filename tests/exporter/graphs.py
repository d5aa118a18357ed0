"""Small hub-like graphs made of diffusers' and transformers' own blocks, with torch as their oracle.

They have what the real ones have (Attention, GroupNormalization, Gelu, cross-attention, causal text attention, a
dynamic batch, external weights) at a size that exports in seconds. Weights are random and seeded.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtimes.manifest import Graph, Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """An exported graph, the torch module it came from, and a maker of its inputs for a batch size and a seed."""

    source: Path
    graph: Graph
    module: torch.nn.Module
    inputs: Callable[[int, int], dict[str, Array]]

    def expected(self, inputs: dict[str, Array]) -> Array:
        """What torch computes in fp32 for these inputs."""
        output = self.module(*(torch.from_numpy(inputs[tensor.name]) for tensor in self.graph.inputs))
        result: Array = output.numpy()
        return result


class Denoiser(torch.nn.Module):
    def __init__(self, heads: int = 8) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=heads,
            norm_num_groups=8,
        )

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=16,
        )
        del self.vae.encoder, self.vae.quant_conv

    def forward(self, sample: Any) -> Any:
        return (self.vae.decode(sample, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


class Text(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=97,
                eos_token_id=98,
            )
        )

    def forward(self, tokens: Any) -> Any:
        return self.model(tokens, return_dict=False)[0]


class Distances(torch.nn.Module):
    """T5's encoder, and a mask of the tokens that fill up, which are those of id 0."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.model = T5EncoderModel(
            T5Config(
                vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
            )
        )
        with torch.no_grad():  # so that a distance in the next row of the table makes a difference
            self.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(0, 3)

    def forward(self, tokens: Any) -> Any:
        return self.model(tokens, attention_mask=(tokens != 0).float(), return_dict=False)[0]


class Sines(torch.nn.Module):
    """What Flux makes of its timestep and guidance, and SDXL of its sizes in pixels."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.embeddings import Timesteps

        self.time = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: Any, guidance: Any, time_ids: Any) -> Any:
        sizes = self.time(time_ids.flatten()).reshape(-1, 6 * 64)
        return torch.cat([self.time(timestep / 1000 * 1000), self.time(guidance * 1000), sizes], dim=1)


@functools.cache
def denoiser() -> Sample:
    """A UNet2DConditionModel with 32 and 64 channels on 8x8 latents, 5 conditioning tokens of width 32."""

    def inputs(batch: int, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {
            "sample": rng.standard_normal((batch, 4, 8, 8), np.float32),
            "timestep": rng.integers(0, 1000, batch).astype(np.float32),
            "encoder_hidden_states": rng.standard_normal((batch, 5, 32), np.float32),
        }

    return _export("denoiser", Denoiser, inputs, "output")


@functools.cache
def decoder() -> Sample:
    """An AutoencoderKL decoder with 16 and 32 channels: 8x8 latents to 16x16 pixels."""

    def inputs(batch: int, seed: int) -> dict[str, Array]:
        return {"sample": np.random.default_rng(seed).standard_normal((batch, 4, 8, 8), np.float32)}

    return _export("decoder", Decoder, inputs, "image")


@functools.cache
def text() -> Sample:
    """A CLIP text model, two layers of width 32, 16 tokens."""

    def inputs(batch: int, seed: int) -> dict[str, Array]:
        return {"tokens": np.random.default_rng(seed).integers(0, 98, (batch, 16), np.int64)}

    return _export("text", Text, inputs, "encoder_hidden_states")


@functools.cache
def distances() -> Sample:
    """A T5 encoder, two layers of width 32, of 300 tokens: too many for the table of their distances to be folded."""

    def inputs(batch: int, seed: int) -> dict[str, Array]:
        tokens = np.random.default_rng(seed).integers(1, 99, (batch, 300), np.int64)
        tokens[:, 250:] = 0
        return {"tokens": tokens}

    return _export("text", Distances, inputs, "encoder_hidden_states")


@functools.cache
def sines() -> Sample:
    """The sines of a timestep, a guidance and six sizes in pixels, 64 of each: [B, 512]."""

    def inputs(batch: int, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {
            "timestep": rng.integers(500, 1000, batch).astype(np.float32),
            "guidance": rng.uniform(1, 9, batch).astype(np.float32),
            "time_ids": rng.integers(0, 2049, (batch, 6)).astype(np.float32),
        }

    return _export("denoiser", Sines, inputs, "output")


SAMPLES = {"text": text, "distances": distances, "denoiser": denoiser, "decoder": decoder}
"""Each is exported at its first call, and once in a run of the tests."""


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dexport-graphs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _export(
    kind: Any, make: Callable[[], torch.nn.Module], inputs: Callable[..., dict[str, Array]], output: str
) -> Sample:
    torch.manual_seed(7)
    module = make().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():  # norms and biases that are 1 and 0 would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    example = {name: torch.from_numpy(value) for name, value in inputs(2, 0).items()}
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            dynamo=True,
            opset_version=23,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=[{0: batch} for _ in example],
            verbose=False,
        )
    source = _folder() / make.__name__ / "model.onnx"
    source.parent.mkdir(parents=True)
    assert program is not None
    program.save(source, external_data=True)
    result = module(*example.values())
    described = tuple(
        Tensor(name, str(value.dtype).removeprefix("torch."), ("batch", *value.shape[1:]))
        for name, value in (*example.items(), (output, result))
    )
    graph = Graph(kind, f"{kind}/model.onnx", described[:-1], described[-1:])
    return Sample(source, graph, module, inputs)


def relative(found: Array, expected: Array) -> float:
    """The relative L2 distance, in float64."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
