"""Qwen-Image: Qwen2.5-VL's language model, a transformer over packed latents, a video autoencoder with one frame.

Wu et al., "Qwen-Image Technical Report" (2025), https://arxiv.org/abs/2508.02324
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.families import QWEN_TOKENIZERS, Shape, Spec, Tokens, parts, patches, text_encoders
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "qwen-image"
COMPONENTS = {
    "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    "transformer": ("QwenImageTransformer2DModel",),
    "vae": ("AutoencoderKLQwenImage",),
    "tokenizer": QWEN_TOKENIZERS,
}
# QwenImagePipeline's: what is written around a prompt, how many of its first tokens are left out, and how many states
# of those that follow the transformer takes; latents along a side of the default picture.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED, LENGTH = 34, 512
GUIDANCE, STEPS, SIDE = 4.0, 50, 128
PATCH = 2
AXES = (16, 56, 56)  # QwenImageTransformer2DModel's default: channels of a head for the frame, rows and columns
# Options of models that are shown pictures (editing, layers).
FOREIGN = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]  # fmt: skip
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]  # fmt: skip
"""AutoencoderKLQwenImage's default of what each channel of its latents is scaled by."""


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels that QwenImagePipeline draws."""
    side = SIDE * _factor(checkpoint)
    return side, side


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] ids to the states behind the template's first words, and which of them are there: [B, L, D], [B, L].

    The model looks back alone: what fills up stands behind the text, and changes none of its states.
    """
    mask = text_encoders.there(modules.text_encoder, tokens)[:, DROPPED:].float()
    states = modules.text_encoder(input_ids=tokens, use_cache=False).last_hidden_state[:, DROPPED:]
    return states * mask[:, :, None], mask


def denoiser(modules: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, mask: Any) -> Any:
    """[B, C, h, w], [B], [B, L, D], [B, L] to the velocity: [B, C, h, w]."""
    height, width = sample.shape[2] // PATCH, sample.shape[3] // PATCH
    tokens = modules.transformer(
        hidden_states=patches.pack(sample, PATCH), timestep=timestep / 1000, img_shapes=[(1, height, width)],
        encoder_hidden_states=encoder_hidden_states, encoder_hidden_states_mask=mask > 0, return_dict=False,
    )[0]  # fmt: skip
    return patches.unpack(tokens, height, width, PATCH)


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
    vae = modules.vae
    image = vae.decode((sample * vae.channel_std + vae.channel_mean)[:, :, None], return_dict=False)[0]
    return (image[:, :, 0] / 2 + 0.5).clamp(0, 1)


def encode(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to the mode of its latents' distribution: [B, C, h, w]."""
    vae = modules.vae
    latents = vae.encode((image * 2 - 1)[:, :, None], return_dict=False)[0].mode()[:, :, 0]
    return (latents - vae.channel_mean) / vae.channel_std


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for parts that do not fit, and for sizes that have no whole tokens."""
    configs = {name: part.config for name, part in checkpoint.components.items()}
    drawn = _canvas(checkpoint, shape)
    width = _check(checkpoint, drawn, shape)
    tokens = Tensor("tokens", "int64", ("batch", DROPPED + LENGTH))
    states = Tensor("encoder_hidden_states", "float32", ("batch", LENGTH, width))
    mask = Tensor("encoder_hidden_states_mask", "float32", ("batch", LENGTH))
    output = Tensor("output", "float32", drawn.sample.shape)
    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), states, mask)
    build_text = text_encoders.padded(
        text_encoders.build_qwen_vl, configs["text_encoder"], checkpoint.tokenizers["tokenizer"], "right"
    )
    coder = {"vae": lambda: build_vae(configs["vae"])}
    return {
        "text": Spec("text", {"text_encoder": build_text}, text, (tokens,), (states, mask), {}),
        "denoiser": Spec(
            "denoiser", {"transformer": lambda: build_transformer(configs["transformer"])}, denoiser, inputs,
            (output,), drawn.latent_sizes,
        ),
        "decoder": Spec("decoder", coder, decode, (drawn.sample,), (drawn.image,), drawn.latent_sizes),
        "encoder": Spec("encoder", coder, encode, (drawn.image,), (drawn.sample,), drawn.pixel_sizes),
    }  # fmt: skip


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop with classifier-free guidance that keeps each token's length."""
    drawn = _canvas(checkpoint, shape)
    guidance = Guidance("cfg", GUIDANCE, normalize="tokens")
    return (drawn.stage(checkpoint, guidance, STEPS, multiple=PATCH, patch=PATCH, sigmas="even", **parts.FLOW),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The prompt stands in a chat; the pipeline fills up a batch alone, and of one prompt nothing."""
    return {"tokenizer": Tokens("tokens", DROPPED + LENGTH, TEMPLATE, side="right")}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for what looks at pictures and what writes words."""
    return text_encoders.rename_language(name) if component == "text_encoder" else name


def _canvas(checkpoint: Checkpoint, shape: Shape) -> parts.Canvas:
    channels = parts.whole("vae", checkpoint.components["vae"].config, "z_dim", 16)
    return parts.draw_canvas(channels, _factor(checkpoint), shape)


def _factor(checkpoint: Checkpoint) -> int:
    """Pixels of the picture for each latent: the autoencoder halves between its blocks."""
    halved = checkpoint.components["vae"].config.get("temperal_downsample", [False, True, True])
    if not isinstance(halved, list) or not 1 <= len(halved) < parts.BLOCKS:
        raise DexportError(f"vae/config.json: temperal_downsample={halved!r:.60} must be a list of true and false")
    return int(1 << len(halved))


def _check(checkpoint: Checkpoint, drawn: parts.Canvas, shape: Shape) -> int:
    """The width of the states; DexportError for components that do not fit together."""
    config = checkpoint.components["transformer"].config
    parts.check_patches(shape, drawn.factor * PATCH, drawn.factor * PATCH * patches.SIDE)
    for option in FOREIGN:
        if config.get(option):
            raise DexportError(
                f"transformer/config.json: {option} is for models that are shown pictures; not supported"
            )
    head = parts.whole("transformer", config, "attention_head_dim", 128)
    parts.check_axes(config, "axes_dims_rope", AXES, head)
    if parts.whole("transformer", config, "patch_size", PATCH) != PATCH:
        raise DexportError("transformer/config.json: patch_size must be 2, as QwenImagePipeline packs latents")
    taken = parts.whole("transformer", config, "in_channels", 64)
    given = parts.whole("transformer", config, "out_channels", 16)
    if (taken, given) != (drawn.channels * PATCH * PATCH, drawn.channels):
        raise DexportError(
            f"transformer/config.json: {taken} channels in and {given} out; with latents of {drawn.channels} there "
            f"must be {drawn.channels * PATCH * PATCH} in and {drawn.channels} out"
        )
    vae = checkpoint.components["vae"].config
    parts.check_normal("vae", vae.get("latents_mean", MEAN), vae.get("latents_std", STD), drawn.channels)
    width = text_encoders.language_width("text_encoder", checkpoint.components["text_encoder"].config)
    parts.check_width(checkpoint, "joint_attention_dim", 3584, width)
    return width


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A transformer of this config.json without complex numbers."""
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel.from_config(dict(config))
    transformer.pos_embed = _positions(config.get("axes_dims_rope") or AXES)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(JointAttention())
    return transformer


def _positions(dims: Sequence[int]) -> Any:
    """A module with the rotations of a picture's tokens, whose middle is 0, and of the text's, which stand beyond."""
    import torch

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = patches.SIDE // 2
            numbers = range(-self.low, self.low + LENGTH)
            self.turned = patches.rotations(dims, [numbers] * len(dims), powers="float32")

        def forward(self, shapes: Any, max_txt_seq_len: int, device: Any) -> Any:
            ((_, height, width),) = shapes
            rows = torch.arange(height) - (height + 1) // 2
            columns = torch.arange(width) - (width + 1) // 2
            places = torch.nn.functional.pad(patches.grid(rows, columns), (1, 0))
            beyond = rows[-1:].maximum(columns[-1:]) + 1
            words = (torch.arange(max_txt_seq_len) + beyond)[:, None].expand(-1, len(dims))
            return self.turned(places + self.low), self.turned(words + self.low)

    return Positions()


class JointAttention:
    """Attention over the tokens of text and picture together; QwenDoubleStreamAttnProcessor2_0 in real numbers."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, encoder_hidden_states_mask: Any,
        image_rotary_emb: Any, attention_mask: None = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """[B, N, D] of the picture, [B, L, D] of the text, bool [B, L], and their rotations, to both attended."""
        import torch

        def heads(states: Any, layer: Any, norm: Any = None, turned: Any = None) -> Any:
            states = layer(states).unflatten(-1, (attn.heads, -1))  # [B, S, H, d]
            if norm is not None:
                states = norm(states)
            return states if turned is None else patches.rotate(states, *turned)

        picture, words = hidden_states, encoder_hidden_states
        turned, turned_words = image_rotary_emb
        query, key, value = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in (
                (heads(words, attn.add_q_proj, attn.norm_added_q, turned_words),
                 heads(picture, attn.to_q, attn.norm_q, turned)),
                (heads(words, attn.add_k_proj, attn.norm_added_k, turned_words),
                 heads(picture, attn.to_k, attn.norm_k, turned)),
                (heads(words, attn.add_v_proj), heads(picture, attn.to_v)),
            )
        )  # fmt: skip
        seen = torch.nn.functional.pad(encoder_hidden_states_mask, (0, picture.shape[1]), value=True)
        seen = seen[:, None, None].expand(-1, 1, query.shape[2], -1)  # ONNX Runtime wants a row for each query
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
        attended = attended.transpose(1, 2).flatten(2)
        length = words.shape[1]
        return attn.to_out[0](attended[:, length:]), attn.to_add_out(attended[:, :length])


def build_vae(config: Mapping[str, Any]) -> Any:
    """An autoencoder of this config.json, with the mean and deviation of each channel of its latents."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_config(dict(config))
    for name, values in (("channel_mean", vae.config.latents_mean), ("channel_std", vae.config.latents_std)):
        vae.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
    return vae
