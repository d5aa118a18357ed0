"""Würstchen: a prior of attention blocks draws a small map of the picture, of which a second model draws latents.

Pernias et al., "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models" (2023),
https://arxiv.org/abs/2306.00637. Stable Cascade grew out of it: the order of the stages, their sizes and Paella's VQ
decoder are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts, stable_cascade, text_encoders
from runtimes.manifest import Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "wuerstchen"
COMPONENTS = {
    "prior_prior": ("WuerstchenPrior",),
    "prior_text_encoder": ("CLIPTextModel",),
    "prior_tokenizer": CLIP_TOKENIZERS,
    "decoder": ("WuerstchenDiffNeXt",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": CLIP_TOKENIZERS,
    "vqgan": ("PaellaVQModel",),
}
SCHEDULERS = stable_cascade.SCHEDULERS
STEPS, DECODER_STEPS = 60, 12  # diffusers' own
MEAN, SHIFT = 42.0, 1.0  # of the prior's map, likewise

default_shape = stable_cascade.default_shape


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; its text encoders lost the level "text_model.", as elsewhere."""
    if component.endswith("text_encoder"):
        return parts.rename("text_encoder", name)
    return stable_cascade.rename(component, name)


def text(modules: Any, tokens: Any, tokens_2: Any) -> tuple[Any, Any]:
    """[B, S] token ids of each encoder to its states: [B, S, D], [B, S, D2]."""
    encoders = (modules.prior_text_encoder, tokens), (modules.text_encoder, tokens_2)
    first, second = (
        encoder(input_ids=ids, attention_mask=text_encoders.there(encoder, ids).long()).last_hidden_state
        for encoder, ids in encoders
    )
    return first, second


def draw_map(modules: Any, sample: Any, timestep: Any, text_states: Any) -> Any:
    """[B, C, h, w], [B] from 1 to 0, and the prompt's to the predicted noise: [B, C, h, w]."""
    return modules.prior_prior(sample, timestep, text_states)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for options and sizes that they do not meet in."""
    config = {name: part.config for name, part in checkpoint.components.items()}
    small, large = stable_cascade.samples(checkpoint, shape, "c_in")
    encoders = ("prior_text_encoder", "tokens", "text_states"), ("text_encoder", "tokens_2", "text_states_2")
    tokens = [parts.tokens(checkpoint, component, ids) for component, ids, _ in encoders]
    widths = [parts.whole(component, config[component], "hidden_size", 512) for component, _, _ in encoders]
    states, states_2 = (
        Tensor(name, "float32", (*ids.shape, width))
        for (_, _, name), ids, width in zip(encoders, tokens, widths, strict=True)
    )
    stable_cascade.check_widths(
        config,
        {
            "prior_prior": {"c_cond": widths[0]},
            "decoder": {"clip_embd": widths[1], "effnet_embd": small[0], "c_out": large[0]},
        },
    )
    mean, shift = (
        parts.number("model_index", checkpoint.index, f"prior_latent_{name}", default)
        for name, default in (("mean", MEAN), ("std", SHIFT))
    )

    def draw_latents(modules: Any, sample: Any, timestep: Any, text_states_2: Any, image_embeddings: Any) -> Any:
        """[B, 4, h, w], [B] from 1 to 0, the prompt's, and the prior's map to the predicted noise: [B, 4, h, w]."""
        return modules.decoder(sample, timestep, image_embeddings * mean - shift, text_states_2)

    timestep, given = (
        Tensor("timestep", "float32", ("batch",)),
        Tensor(stable_cascade.GIVEN, "float32", ("batch", *small)),
    )
    image = Tensor("image", "float32", ("batch", 3, shape.height, shape.width))
    samples, outputs = (
        [Tensor(name, "float32", ("batch", *size)) for size in (small, large)] for name in ("sample", "output")
    )
    build_text = {
        component: text_encoders.padded(
            parts.build_text, config[component], checkpoint.tokenizers[component.replace("text_encoder", "tokenizer")]
        )
        for component, _, _ in encoders
    }
    build_map = {"prior_prior": lambda: build_prior(config["prior_prior"])}
    build_latents = {"decoder": lambda: build_decoder(config["decoder"])}
    build_vqgan = {"vqgan": lambda: stable_cascade.build_paella(config["vqgan"])}
    return {
        "text": Spec("text", build_text, text, tuple(tokens), (states, states_2), {}),
        "prior": Spec("denoiser", build_map, draw_map, (samples[0], timestep, states), (outputs[0],), {}),
        "denoiser": Spec(
            "denoiser", build_latents, draw_latents, (samples[1], timestep, states_2, given), (outputs[1],), {}
        ),
        "decoder": Spec("decoder", build_vqgan, stable_cascade.decode, (samples[1],), (image,), {}),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """The prior, guided, and the decoder, which goes by the map that the prior draws."""
    return stable_cascade.two_stages(
        checkpoint, stable_cascade.samples(checkpoint, shape, "c_in"), (STEPS, DECODER_STEPS)
    )


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The prior's tokenizer's ids go to ``tokens``, the decoder's to ``tokens_2``."""
    encoders = {"prior_tokenizer": ("prior_text_encoder", "tokens"), "tokenizer": ("text_encoder", "tokens_2")}
    return {
        tokenizer: Tokens(ids, int(parts.tokens(checkpoint, component, ids).shape[1]))
        for tokenizer, (component, ids) in encoders.items()
    }


def build_prior(config: Mapping[str, Any]) -> Any:
    """A prior of this config.json, whose attention is one operation."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    made = WuerstchenPrior.from_config(dict(config))
    made.set_attn_processor(AttnProcessor2_0())
    made.gen_r_embedding = stable_cascade.times(made, made.config.c_r)
    return made


def build_decoder(config: Mapping[str, Any]) -> Any:
    """What draws latents, of this config.json."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    made = WuerstchenDiffNeXt.from_config(dict(config))
    made.gen_r_embedding = stable_cascade.times(made, made.config.c_r)
    return made
