"""Z-Image and its Turbo: the language model Qwen3, and one transformer over the tokens of picture and text in a row.

Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer" (2025),
https://arxiv.org/abs/2511.22699
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import QWEN_TOKENIZERS, Shape, Spec, Tokens, parts, patches, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "z-image"
COMPONENTS = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": QWEN_TOKENIZERS,
}
LENGTH = 512  # ZImagePipeline's default, as what follows
# There the scale counts from 0, c + g (c - u), and the default is 5.
GUIDANCE, STEPS, SIDE = 6.0, 50, 1024
PATCH = 2
MULTIPLE = 32  # SEQ_MULTI_OF: picture and text are filled up to whole multiples with a learned token each
# ZImageTransformer2DModel's defaults: channels of a head for text, rows and columns; positions that each has.
AXES, LENGTHS, THETA = (32, 48, 48), (1024, 512, 512), 256.0
KEY = f"{PATCH}-1"  # of the layers for patches of one frame


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels that ZImagePipeline draws, as far as the model knows positions."""
    side = min(SIDE, _largest(checkpoint))
    return side, side


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] ids to the states before the last layer, and which of them are there: [B, S, D], [B, S].

    The model looks back alone: what fills up stands behind the text, and changes none of its states.
    """
    mask = text_encoders.there(modules.text_encoder, tokens).float()
    found = modules.text_encoder(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return found.hidden_states[-2] * mask[:, :, None], mask


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, mask: Any) -> Any:
    """[B, C, h, w], [B], [B, S, D], [B, S] to the velocity: [B, C, h, w]."""
    # The model's time rises from noise to picture, and so does its velocity.
    return -modules.transformer(sample, (1000 - timestep) / 1000, encoder_hidden_states, mask)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for parts that do not fit, and for sizes that the model cannot draw."""
    drawn, config = parts.canvas(checkpoint, shape), checkpoint.components["transformer"].config
    encoder = checkpoint.components["text_encoder"].config
    width = _check(checkpoint, drawn, shape)
    tokens = Tensor("tokens", "int64", ("batch", LENGTH))
    states = Tensor("encoder_hidden_states", "float32", ("batch", LENGTH, width))
    mask = Tensor("encoder_hidden_states_mask", "float32", ("batch", LENGTH))
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states, mask)
    output = Tensor("output", "float32", drawn.sample.shape)
    files = checkpoint.tokenizers["tokenizer"]
    build_text = text_encoders.padded(text_encoders.build_qwen3, encoder, files, "right")
    build = {"transformer": lambda: build_transformer(config)}
    return {
        "text": Spec("text", {"text_encoder": build_text}, text, (tokens,), (states, mask), {}),
        "denoiser": Spec("denoiser", build, denoiser, inputs, (output,), drawn.latent_sizes),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance."""
    drawn = parts.canvas(checkpoint, shape)
    guidance = Guidance("cfg", GUIDANCE)
    # ZImageInpaintPipeline, other than those of other flow models, makes all steps if nothing is asked for.
    return (
        drawn.stage(
            checkpoint, guidance, STEPS, multiple=PATCH, patch=PATCH, sigmas="even", **parts.UNMASKED_FLOW
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The prompt stands in the tokenizer's chat, as ZImagePipeline asks for it.

    The pipeline takes the states of the text alone, so on which side the tokenizer fills up changes nothing.
    """
    from exporter import tokenizer

    files = checkpoint.tokenizers["tokenizer"]
    template = tokenizer.chat(files.path, files.class_name, enable_thinking=True)
    return {"tokenizer": Tokens("tokens", LENGTH, template, side="right")}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for what writes words."""
    if component == "text_encoder":
        return text_encoders.rename_language(name)
    return parts.rename_attention(name) if component == "vae" else name


def _largest(checkpoint: Checkpoint) -> int:
    """The largest side of a picture, in pixels: its tokens must have positions."""
    lengths = checkpoint.components["transformer"].config.get("axes_lens") or LENGTHS
    if not isinstance(lengths, list | tuple) or len(lengths) != 3 or not all(type(n) is int and n > 0 for n in lengths):
        raise DexportError(f"transformer/config.json: axes_lens={lengths!r:.60} must be three whole numbers from 1")
    if lengths[0] < LENGTH + 2:  # the text's places count from 1, and the picture stands behind it
        raise DexportError(
            f"transformer/config.json: axes_lens={lengths!r:.60} must begin with {LENGTH + 2} or more: so many places "
            f"have the {LENGTH} tokens of a prompt and the picture behind them"
        )
    return parts.pixels_per_latent(checkpoint) * PATCH * min(lengths[1:])


def _check(checkpoint: Checkpoint, drawn: parts.Canvas, shape: Shape) -> int:
    """The width of the states; DexportError for components that do not fit together."""
    config = checkpoint.components["transformer"].config
    parts.check_patches(shape, drawn.factor * PATCH, _largest(checkpoint))
    parts.check_transformer(config, drawn.channels)
    width, heads = (parts.whole("transformer", config, *one) for one in (("dim", 3840), ("n_heads", 30)))
    parts.check_axes(config, "axes_dims", AXES, width // heads)
    patches_ = (config.get("all_patch_size") or [PATCH], config.get("all_f_patch_size") or [1])
    if PATCH not in patches_[0] or 1 not in patches_[1]:
        raise DexportError(f"transformer/config.json: all_patch_size={patches_[0]!r:.60} has no patches of {PATCH}")
    if config.get("siglip_feat_dim") is not None:
        raise DexportError(
            "transformer/config.json: siglip_feat_dim is of models that are shown pictures; not supported"
        )
    width = text_encoders.language_width("text_encoder", checkpoint.components["text_encoder"].config)
    parts.check_width(checkpoint, "cap_feat_dim", 2560, width)
    return width


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A transformer of this config.json as a function of whole batches.

    ZImageTransformer2DModel takes each picture and each text by itself, cut to its length, and fills them up in Python;
    here each text has all its places, and those that are not there are masked. No number is complex.
    """
    import torch
    from diffusers import ZImageTransformer2DModel

    class Transformer(ZImageTransformer2DModel):  # type: ignore[misc]
        def forward(self, sample: Any, time: Any, states: Any, mask: Any) -> Any:
            """[B, C, h, w], [B] in 0 to 1, [B, S, D], [B, S] to [B, C, h, w]."""
            height, width = sample.shape[2] // PATCH, sample.shape[3] // PATCH
            known = self.t_embedder(time * self.t_scale)
            count = mask.sum(dim=1, keepdim=True).long()  # of tokens of the text, [B, 1]
            filled = (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE
            order = torch.arange(states.shape[1])
            words = torch.where((order < count)[:, :, None], self.cap_embedder(states), self.cap_pad_token)
            seen = order < filled  # [B, S]
            turned_words = self.rope_embedder(_along(order + 1).expand(states.shape[0], -1, -1))
            for layer in self.context_refiner:
                words = layer(words, seen, turned_words)
            tokens = self.all_x_embedder[KEY](patches.pack(sample, PATCH, last=True))
            missing = -tokens.shape[1] % MULTIPLE
            places = patches.grid(torch.arange(height), torch.arange(width))
            first = (filled + 1)[:, :, None].expand(-1, places.shape[0], 1)
            places = torch.cat([first, places.expand(states.shape[0], -1, -1)], dim=2)  # [B, N, 3]
            turned = self.rope_embedder(torch.nn.functional.pad(places, (0, 0, 0, missing)))
            more = self.x_pad_token.expand(states.shape[0], missing, -1)
            row = torch.cat([tokens, more], dim=1)
            for layer in self.noise_refiner:
                row = layer(row, None, turned, known)
            length = row.shape[1]
            row = torch.cat([row, words], dim=1)
            seen = torch.nn.functional.pad(seen, (length, 0), value=True)
            turned = tuple(torch.cat(pair, dim=1) for pair in zip(turned, turned_words, strict=True))
            for layer in self.layers:
                row = layer(row, seen, turned, known)
            row = self.all_final_layer[KEY](row, c=known)
            return patches.unpack(row[:, : places.shape[1]], height, width, PATCH, last=True)

    transformer = Transformer.from_config(dict(config))
    lengths = config.get("axes_lens") or LENGTHS
    transformer.rope_embedder = patches.rotations(
        config.get("axes_dims") or AXES, [range(length) for length in lengths],
        theta=float(config.get("rope_theta") or THETA), angles="float32",
    )  # fmt: skip
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        block.attention.set_processor(RowAttention())
    return transformer


def _along(numbers: Any) -> Any:
    """Places [S, 3] along the first axis."""
    import torch

    return torch.nn.functional.pad(numbers[:, None], (0, 2))


class RowAttention:
    """Attention over one row of tokens; ZSingleStreamAttnProcessor in real numbers."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: None = None, attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:  # fmt: skip
        """[B, S, D], bool [B, S] or None for all, and the rotations, to the attended."""
        import torch

        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            patches.rotate(heads if norm is None else norm(heads), *freqs_cis)
            for heads, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if attention_mask is not None:  # ONNX Runtime wants a row for each query
            attention_mask = attention_mask[:, None, None].expand(-1, 1, query.shape[2], -1)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))
