"""Sana: a transformer with linear attention over latents that are 32 times smaller than the picture, Gemma 2's states.

Xie et al., "SANA" (2024), https://arxiv.org/abs/2410.10629; its autoencoder: Chen et al., "Deep Compression
Autoencoder" (2024), https://arxiv.org/abs/2410.10733. Sana-Sprint draws in a few steps without the negative prompt:
Chen et al. (2025), https://arxiv.org/abs/2503.09641
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import GEMMA_TOKENIZERS, Shape, Spec, Tokens, parts, text_encoders, transformer2d
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "sana"
COMPONENTS = {
    "transformer": ("SanaTransformer2DModel",),
    "text_encoder": ("Gemma2Model",),
    "vae": ("AutoencoderDC",),
    "tokenizer": GEMMA_TOKENIZERS,
}
SPRINT = "SanaSprintPipeline"
GUIDANCE, STEPS = 4.5, {"SanaPipeline": 20, SPRINT: 2}  # diffusers' defaults
DEVIATION = 0.5  # SCMScheduler's default of sigma_data
LENGTH = 300  # tokens of a prompt that the transformer is shown
# What the text encoder reads before a prompt, word for word as the pipelines of diffusers have it: the models were
# trained with it.
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image \
generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships \
to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully \
on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, \
a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: """


def text(modules: Any, tokens: Any) -> tuple[Any, Any]:
    """[B, S] token ids to Gemma's states of the first token and the prompt's, and their mask: [B, 300, D], [B, 300].

    A negative prompt comes without the instruction, and what is taken of it begins at once.
    """
    import torch

    model = modules.text_encoder
    mask = text_encoders.there(model, tokens).float()
    states = model(tokens, attention_mask=mask).last_hidden_state
    known = model.instruction.shape[0]
    asked = (tokens[:, :known] == model.instruction).all(1)

    def chosen(values: Any) -> Any:
        prompt = torch.cat([values[:, :1], values[:, 1 - LENGTH :]], dim=1)
        first = asked.reshape(-1, *[1] * (values.ndim - 1))
        return torch.where(first, prompt, values[:, :LENGTH])

    return chosen(states), chosen(mask)


def predict(model: Any, sample: Any, timestep: Any, states: Any, mask: Any, guidance: Any = None) -> Any:
    """[B, C, h, w], [B], [B, S, D], [B, S], and [B] if distilled, to all that it predicts: [B, C', h, w].

    diffusers' own forward, without what asks for sizes that are free here.
    """
    side = model.config.patch_size
    height, width = sample.shape[2] // side, sample.shape[3] // side
    tokens = model.patch_embed(sample)  # [B, T, D]
    if guidance is not None:
        time, embedded = model.time_embed(timestep, guidance=guidance, hidden_dtype=sample.dtype)
    else:
        time, embedded = model.time_embed(timestep, batch_size=sample.shape[0], hidden_dtype=sample.dtype)
    states = model.caption_norm(model.caption_projection(states))
    for block in model.transformer_blocks:
        tokens = block(tokens, None, states, mask, time, height, width)
    patches = model.proj_out(model.norm_out(tokens, embedded, model.scale_shift_table))
    return transformer2d.unpatch(patches, sample, side)


def sprint(model: Any, sample: Any, angle: Any, *further: Any, deviation: float) -> Any:
    """What ``predict`` gives at a time of its flow, as the prediction of TrigFlow at an angle.

    https://arxiv.org/abs/2503.09641, formulas 6 to 8; ``deviation`` is that of the loop's sample.
    """
    sine, cosine = angle.sin(), angle.cos()
    time = sine / (cosine + sine)
    t = time[:, None, None, None]
    length = (t**2 + (1 - t) ** 2).sqrt()
    shrunk = sample / deviation * length
    flow = predict(model, shrunk, time, *further)
    return ((1 - 2 * t) * shrunk + (1 - 2 * t + 2 * t**2) * flow) / length * deviation


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The picture size that the checkpoint was made for, (height, width) in pixels."""
    side = _whole(checkpoint, "sample_size", 32) * _pixels_per_latent(checkpoint)
    return side, side


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The four graphs. Raises DexportError for a transformer that does not fit its autoencoder."""
    config, drawn = checkpoint.components["transformer"].config, _canvas(checkpoint, shape)
    parts.check_patches(shape, _whole(checkpoint, "patch_size", 1) * drawn.factor, parts.SIDE)
    channels = drawn.channels
    given = transformer2d.out_channels(config, channels, 32)
    if bool(config.get("guidance_embeds", False)) != _is_distilled(checkpoint):
        must = "true" if _is_distilled(checkpoint) else "false"
        raise DexportError(f"transformer/config.json: guidance_embeds must be {must} for a {checkpoint.pipeline}")
    distilled, deviation = _is_distilled(checkpoint), _deviation(checkpoint)
    time_scale = parts.number("transformer", config, "timestep_scale", 1.0)
    guidance_scale = parts.number("transformer", config, "guidance_embeds_scale", 0.1)

    def denoiser(modules: Any, sample: Any, timestep: Any, states: Any, mask: Any, guidance: Any = None) -> Any:
        model = modules.transformer
        if distilled:
            return sprint(model, sample, timestep, states, mask, guidance * guidance_scale, deviation=deviation)
        output = predict(model, sample, timestep * time_scale, states, mask)
        return output[:, :channels] if channels < given else output

    known = text_encoders.states(checkpoint, LENGTH, "caption_channels", 2304)
    instruction = _instruction(checkpoint)
    tokens = Tensor("tokens", "int64", ("batch", _length(instruction)))
    scalar = Tensor("timestep", "float32", ("batch",))
    further = (Tensor("guidance", "float32", ("batch",)),) if distilled else ()
    output = Tensor("output", "float32", drawn.sample.shape)
    build = {"transformer": lambda: build_transformer(config, shape, drawn.factor)}
    build_text = {name: instructed(own, instruction) for name, own in text_encoders.only(checkpoint, "right").items()}
    return {
        "text": Spec("text", build_text, text, (tokens,), known, {}),
        "denoiser": Spec(
            "denoiser", build, denoiser, (drawn.sample, scalar, *known, *further), (output,), drawn.latent_sizes
        ),
        **_autoencoder(checkpoint, drawn),
    }


def _autoencoder(checkpoint: Checkpoint, drawn: parts.Canvas) -> dict[str, Spec]:
    """The decoder and the encoder, of latents as the loop has them."""
    config = checkpoint.components["vae"].config
    scale = parts.number("vae", config, "scaling_factor", 1.0) * _deviation(checkpoint)

    def decode(modules: Any, sample: Any) -> Any:
        """Latents [B, C, h, w] to a picture in [0, 1]: [B, 3, H, W]."""
        return (modules.vae.decode(sample / scale, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def encode(modules: Any, image: Any) -> Any:
        """A picture in [0, 1], [B, 3, H, W], to latents [B, C, h, w]."""
        return modules.vae.encode(image * 2 - 1, return_dict=False)[0] * scale

    build, sample, image = {"vae": lambda: build_autoencoder(config)}, (drawn.sample,), (drawn.image,)
    return {
        "decoder": Spec("decoder", build, decode, sample, image, drawn.latent_sizes),
        "encoder": Spec("encoder", build, encode, image, sample, drawn.pixel_sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop, with classifier-free guidance or, of Sana-Sprint, with a model that knows the scale."""
    drawn = _canvas(checkpoint, shape)
    guidance = Guidance("embedded" if _is_distilled(checkpoint) else "cfg", GUIDANCE)
    patch = _whole(checkpoint, "patch_size", 1)
    return (drawn.stage(checkpoint, guidance, STEPS[checkpoint.pipeline], multiple=patch, **parts.UNMASKED_FLOW),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The ids of the instruction and a prompt in lower case, or of a negative prompt alone, go to ``tokens``."""
    length = _length(_instruction(checkpoint))
    return {"tokenizer": Tokens("tokens", length, f"{INSTRUCTION}{{}}", "{}", lower=True, side="right")}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for a table of positions, which is computed."""
    if component == "text_encoder":
        return text_encoders.rename_language(name)
    return None if name == "patch_embed.pos_embed" else name


def _instruction(checkpoint: Checkpoint) -> list[int]:
    """The ids of the instruction alone, the mark in front of it among them."""
    ids: list[int] = checkpoint.tokenizers["tokenizer"].made.open().encode(INSTRUCTION).ids
    return ids


def _length(instruction: list[int]) -> int:
    """The tokens of an instruction with a prompt: the last one of it, a space, and the mark are counted with both."""
    return len(instruction) + LENGTH - 2


def _is_distilled(checkpoint: Checkpoint) -> bool:
    return checkpoint.pipeline == SPRINT


def _deviation(checkpoint: Checkpoint) -> float:
    """The deviation of the loop's sample where there is no noise."""
    if not _is_distilled(checkpoint):
        return 1.0
    value = parts.number("scheduler", checkpoint.scheduler, "sigma_data", DEVIATION)
    if value <= 0:
        raise DexportError(f"scheduler/scheduler_config.json: sigma_data={value!r:.60} must be above 0")
    return value


def _canvas(checkpoint: Checkpoint, shape: Shape) -> parts.Canvas:
    channels = parts.whole("vae", checkpoint.components["vae"].config, "latent_channels", 32)
    return parts.draw_canvas(channels, _pixels_per_latent(checkpoint), shape)


def _pixels_per_latent(checkpoint: Checkpoint) -> int:
    name, default = "encoder_block_out_channels", [64] * 6
    return int(1 << (len(parts.blocks("vae", checkpoint.components["vae"].config, default, name)) - 1))


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def instructed(build: Callable[[], Any], instruction: list[int]) -> Callable[[], Any]:
    """A builder of an encoder that knows the ids of the instruction, but for the last two, which a prompt may join."""
    import torch

    def built() -> Any:
        model = build()
        model.register_buffer("instruction", torch.tensor(instruction[:-2]), persistent=False)
        return model

    return built


def build_transformer(config: Mapping[str, Any], shape: Shape, factor: int) -> Any:
    """A Sana transformer of this config.json, for samples of one shape or of all."""
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel.from_config(dict(config))
    if model.patch_embed.pos_embed is not None:
        sides = shape.height // factor, shape.width // factor
        model.patch_embed = transformer2d.sine_positions(model.patch_embed, *sides, free=shape.free)
    for block in model.transformer_blocks:
        block.attn2.set_processor(transformer2d.MaskedAttention(joint_norm=True))
    return model


def build_autoencoder(config: Mapping[str, Any]) -> Any:
    """A deep compression autoencoder of this config.json."""
    from diffusers import AutoencoderDC

    return AutoencoderDC.from_config(dict(config))
