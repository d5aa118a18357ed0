"""Latent diffusion from text, the model before Stable Diffusion: a BERT of its own, UNet with cross-attention, KL VAE.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from exporter.families import BERT_TOKENIZERS, Shape, Spec, Tokens, parts
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "latent-diffusion-text"
COMPONENTS = {
    "bert": ("LDMBertModel",),
    "unet": ("UNet2DConditionModel",),
    "vqvae": ("AutoencoderKL",),  # so called by the pipeline, whatever it is
    "tokenizer": BERT_TOKENIZERS,
}
LENGTH = 77  # tokens of a prompt, in LDMTextToImagePipeline whatever its tokenizer says
GUIDANCE, STEPS = 1.0, 50  # diffusers' defaults; its example guides with 6


def text(modules: Any, tokens: Any) -> Any:
    """[B, S] token ids to the last layer's states, normed: [B, S, D]; what fills up is not masked."""
    return modules.bert(tokens, output_attentions=False, output_hidden_states=False, return_dict=False)[0]


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
    """[B, C, h, w], [B], [B, S, D] to the predicted noise: [B, C, h, w]."""
    return modules.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    return parts.decode(SimpleNamespace(vae=modules.vqvae), sample)


def encode(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to the mode of its latents' distribution: [B, C, h, w]."""
    return parts.encode(SimpleNamespace(vae=modules.vqvae), image)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size, (height, width) in pixels, of a checkpoint whose UNet says its latents'."""
    height, width = parts.sides("unet", "sample_size", checkpoint.components["unet"].config.get("sample_size") or 32)
    factor = parts.pixels_per_latent(checkpoint, "vqvae")
    return height * factor, width * factor


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for configs that do not fit, and sizes that have no whole latents."""
    bert, unet, vae = (checkpoint.components[name].config for name in ("bert", "unet", "vqvae"))
    drawn = _canvas(checkpoint, shape)
    parts.painting(checkpoint, drawn)  # whose UNet is one of the autoencoder's channels
    if (most := parts.whole("bert", bert, "max_position_embeddings", LENGTH)) < LENGTH:
        raise DexportError(f"bert/config.json: max_position_embeddings={most}; the pipeline gives it {LENGTH} tokens")
    tokens = Tensor("tokens", "int64", ("batch", LENGTH))
    states = Tensor("encoder_hidden_states", "float32", (*tokens.shape, parts.whole("bert", bert, "d_model", 1280)))
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states)
    output = Tensor("output", "float32", drawn.sample.shape)
    build_vae = {"vqvae": lambda: parts.build_vae(vae)}
    return {
        "text": Spec("text", {"bert": lambda: build_bert(bert)}, text, (tokens,), (states,), {}),
        "denoiser": Spec(
            "denoiser", {"unet": lambda: parts.build_unet(unet)}, denoiser, inputs, (output,), drawn.odd_sizes
        ),
        "decoder": Spec("decoder", build_vae, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", build_vae, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance."""
    drawn = _canvas(checkpoint, shape)
    return (drawn.stage(checkpoint, Guidance("cfg", GUIDANCE), STEPS),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The tokenizer's ids go to ``tokens``."""
    return {"tokenizer": Tokens("tokens", LENGTH)}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids, which are no weights."""
    if name.endswith("position_ids"):
        return None
    return parts.rename_attention(name) if component == "vqvae" else name


def _canvas(checkpoint: Checkpoint, shape: Shape) -> parts.Canvas:
    config = checkpoint.components["vqvae"].config
    parts.latent_scale("vqvae", config)
    channels = parts.whole("vqvae", config, "latent_channels", 4)
    return parts.draw_canvas(channels, parts.pixels_per_latent(checkpoint, "vqvae"), shape)


def build_bert(config: Mapping[str, Any]) -> Any:
    """A text encoder of this config.json."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return LDMBertModel(LDMBertConfig.from_dict(dict(config)))
