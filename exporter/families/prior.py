"""The prior of unCLIP: a transformer that draws CLIP's embedding of a picture out of noise and a prompt.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022),
https://arxiv.org/abs/2204.06125, section 2.2; diffusers' PriorTransformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.families import Spec, Tokens, parts, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint


@dataclass(frozen=True)
class Prior:
    """A pipeline's prior: the names of its components, and the name under which later stages take what it draws."""

    component: str
    text_encoder: str
    gives: str

    def builder(self, checkpoint: Checkpoint) -> dict[str, Callable[[], Any]]:
        """What builds its module."""
        config = checkpoint.components[self.component].config
        return {self.component: lambda: build(config)}

    def embedding(self, checkpoint: Checkpoint) -> Tensor:
        """What it draws: CLIP's embedding of a picture, [B, D]."""
        return Tensor(self.gives, "float32", ("batch", self._width(checkpoint)))

    def specs(self, checkpoint: Checkpoint) -> dict[str, Spec]:
        """The graphs of the prompt and of the prior itself; what becomes of its result is the family's."""
        encoder, config = (checkpoint.components[name].config for name in (self.text_encoder, self.component))
        tokens = parts.tokens(checkpoint, self.text_encoder, "tokens")
        width, own = parts.whole(self.text_encoder, encoder, "projection_dim", 512), self._width(checkpoint)
        states = parts.whole(self.text_encoder, encoder, "hidden_size", 512)
        if width != own or states != own:
            raise DexportError(
                f"{self.component}/config.json: embedding_dim is {own}; {self.text_encoder} is {states} wide and "
                f"projects to {width}, which must be the same"
            )
        if parts.whole(self.component, config, "num_embeddings", 77) != tokens.shape[1]:
            raise DexportError(f"{self.component}/config.json: num_embeddings must be the {tokens.shape[1]} tokens")
        if config.get("added_emb_type", "prd") != "prd" or config.get("encoder_hid_proj_type", "linear") != "linear":
            raise DexportError(
                f"{self.component}/config.json: added_emb_type must be 'prd', encoder_hid_proj_type 'linear'"
            )
        prompt = (
            Tensor("text_embeds", "float32", ("batch", width)),
            Tensor("text_states", "float32", (*tokens.shape, states)),
            Tensor("text_mask", "float32", tokens.shape),
        )
        sample, output = (Tensor(name, "float32", ("batch", own)) for name in ("sample", "output"))
        inputs = (sample, Tensor("timestep", "float32", ("batch",)), *prompt)

        def text(modules: Any, tokens: Any) -> tuple[Any, Any, Any]:
            """[B, S] token ids to the projected state, the last layer's states, and 1 where a token is of the text."""
            module = modules.get_submodule(self.text_encoder)
            made = module(input_ids=tokens)
            return made.text_embeds, made.last_hidden_state, text_encoders.there(module, tokens).float()

        def denoiser(modules: Any, sample: Any, timestep: Any, *prompt: Any) -> Any:
            """[B, D], [B], and the prompt's to the embedding that it predicts: [B, D]."""
            return modules.get_submodule(self.component)(sample, timestep, *prompt, return_dict=False)[0]

        files = checkpoint.tokenizers[self.text_encoder.replace("text_encoder", "tokenizer")]
        build_text = {self.text_encoder: text_encoders.padded(parts.build_projected_text, encoder, files)}
        return {
            "text": Spec("text", build_text, text, (tokens,), prompt, {}),
            "prior": Spec("denoiser", self.builder(checkpoint), denoiser, inputs, (output,), {}),
        }

    def stage(
        self, checkpoint: Checkpoint, decoder: str, scheduler: Mapping[str, Any], scale: float, steps: int
    ) -> Stage:
        """Its loop; ``decoder``: the graph that makes the embedding of what it draws."""
        return Stage(
            "prior", "prior", "text", decoder, None, (self._width(checkpoint),), 1, scheduler, Guidance("cfg", scale),
            steps, gives=self.gives,
        )  # fmt: skip

    def tokens(self, checkpoint: Checkpoint) -> Tokens:
        """The text graph's input of its tokenizer's ids, and how many that takes."""
        _, length = parts.tokens(checkpoint, self.text_encoder, "tokens").shape
        return Tokens("tokens", int(length))

    def _width(self, checkpoint: Checkpoint) -> int:
        config = checkpoint.components[self.component].config
        width = parts.whole(self.component, config, "embedding_dim", 768)
        for name in ("clip_embed_dim", "embedding_proj_dim"):
            if config.get(name) not in (None, width):
                raise DexportError(f"{self.component}/config.json: {name} must be embedding_dim, {width}")
        return width


def build(config: Mapping[str, Any]) -> Any:
    """A prior of this config.json."""
    from diffusers import PriorTransformer

    return PriorTransformer.from_config(dict(config))


def black(checkpoint: Checkpoint, component: str) -> Any:
    """A module with the buffer ``nothing`` [1, D]: CLIP's embedding of a black picture, by the checkpoint's encoder.

    It is the same for every request, so it is computed here, a layer's weights in memory at a time, and the encoder,
    which is larger than the prior, stays out of the graph.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from exporter import reference, trace
    from exporter.weights import bind, parameter_shapes

    config = CLIPVisionConfig.from_dict(dict(checkpoint.components[component].config))
    picture = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    encoder = trace.build(
        Spec(
            "encoder", {component: lambda: CLIPVisionModelWithProjection(config)},
            lambda modules, pixels: modules.get_submodule(component)(pixels).image_embeds, (), (), {},
        )
    )  # fmt: skip
    reference.lend(encoder, bind(checkpoint, parameter_shapes(encoder)))
    made = torch.nn.Module()
    made.register_buffer("nothing", encoder(picture), persistent=False)
    return made
