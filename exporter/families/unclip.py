"""unCLIP, the open one of which is Karlo: a prior, a UNet that draws a small picture, and two that make it larger.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022),
https://arxiv.org/abs/2204.06125. All of it is in pixels; there is no autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import CLIP_TOKENIZERS, Shape, Spec, Tokens, parts, prior, unet2d
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "unclip"
COMPONENTS = {
    "prior": ("PriorTransformer",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "tokenizer": CLIP_TOKENIZERS,
    "text_proj": ("UnCLIPTextProjModel",),
    "decoder": ("UNet2DConditionModel",),
    "super_res_first": ("UNet2DModel",),
    "super_res_last": ("UNet2DModel",),
}
SCHEDULERS = ("decoder_scheduler", "prior_scheduler", "super_res_scheduler")
# Scale of guidance and steps, diffusers' own.
PRIOR_GUIDANCE, PRIOR_STEPS = 4.0, 25
DECODER_GUIDANCE, DECODER_STEPS = 8.0, 25
LARGER_STEPS = 7
COLOURS = 3
PRIOR = prior.Prior("prior", "text_encoder", "image_embeds")
LOW = "low_resolution"  # the small picture, as large as what is made of it


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for position ids, which are no weights."""
    return None if name.endswith("embeddings.position_ids") else name


def embedding(modules: Any, sample: Any) -> tuple[Any, Any]:
    """What the prior has drawn, [B, D], to CLIP's embedding, and to what was learned to stand for none."""
    drawn = modules.prior.post_process_latents(sample)
    return drawn, modules.text_proj.learned_classifier_free_guidance_embeddings[None].expand_as(drawn)


def decoder(
    modules: Any, sample: Any, timestep: Any, image_embeds: Any, text_embeds: Any, text_states: Any, text_mask: Any
) -> Any:
    """[B, 3, h, w], [B], [B, D], and the prompt's to the predicted noise and what it learned of the variance."""
    import torch

    states, added = modules.text_proj(
        image_embeddings=image_embeds, prompt_embeds=text_embeds, text_encoder_hidden_states=text_states,
        do_classifier_free_guidance=False,
    )  # fmt: skip
    mask = torch.nn.functional.pad(text_mask, (modules.text_proj.clip_extra_context_tokens, 0), value=1.0)
    return modules.decoder(
        sample, timestep, states, class_labels=added, attention_mask=mask, return_dict=False
    )[0]  # fmt: skip


def larger(modules: Any, sample: Any) -> Any:
    """A small picture in [-1, 1] and beyond, [B, 3, h, w], to one in [-1, 1] of the full size: [B, 3, H, W]."""
    return modules.resize.rows @ sample.clamp(-1, 1) @ modules.resize.columns.T


def picture(modules: Any, sample: Any) -> Any:
    """[-1, 1] and beyond to [0, 1]: [B, 3, H, W]."""
    return (sample / 2 + 0.5).clamp(0, 1)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The one picture size of the checkpoint, (height, width) in pixels."""
    return parts.sides(
        "super_res_first", "sample_size", checkpoint.components["super_res_first"].config.get("sample_size")
    )


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The seven graphs. Raises DexportError for another size than the checkpoint's, which it was trained for."""
    own, small = default_shape(checkpoint), _small(checkpoint)
    if shape.free or (shape.height, shape.width) != own:
        raise DexportError(f"this model draws {own[0]}x{own[1]} pixels alone; leave --shape and --dynamic-shape out")
    components = {name: part.config for name, part in checkpoint.components.items()}
    _check(components)
    embeds, timestep = PRIOR.embedding(checkpoint), Tensor("timestep", "float32", ("batch",))
    latent, nothing = (Tensor(name, "float32", embeds.shape) for name in ("sample", f"negative_{embeds.name}"))
    made, drawn = PRIOR.specs(checkpoint), Tensor("sample", "float32", ("batch", COLOURS, *small))
    given = _given(checkpoint, "decoder", checkpoint.scheduler)
    build_projection: dict[str, Callable[[], Any]] = {"text_proj": lambda: build_text_proj(components["text_proj"])}
    build_decoder = {"decoder": lambda: parts.build_unet(components["decoder"]), **build_projection}

    def guided(modules: Any, *inputs: Any) -> Any:
        return decoder(modules, *inputs)[:, :given]

    full, low = (Tensor(name, "float32", ("batch", COLOURS, *own)) for name in ("sample", LOW))
    return {
        **made,
        "embedding": Spec(
            "decoder", {**PRIOR.builder(checkpoint), **build_projection}, embedding, (latent,), (embeds, nothing), {}
        ),
        "denoiser": Spec(
            "denoiser", build_decoder, guided, (drawn, timestep, embeds, *made["text"].outputs),
            (Tensor("output", "float32", ("batch", given, *small)),), {},
        ),
        "larger": Spec("decoder", {"resize": lambda: build_resize(small, own)}, larger, (drawn,), (low,), {}),
        "super_res_first": _upscaler(checkpoint, "super_res_first", (full, timestep, low)),
        "super_res_last": _upscaler(checkpoint, "super_res_last", (full, timestep, low)),
        "decoder": Spec("decoder", {}, picture, (full,), (Tensor("image", "float32", full.shape),), {}),
    }  # fmt: skip


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """Prior, decoder, and the two of which the second makes superresolution's last step."""
    small, own = _small(checkpoint), default_shape(checkpoint)
    scheduler = checkpoint.schedulers["super_res_scheduler"]
    # The last step is at timestep 0 of those that the model was trained on.
    last = 1 - 1 / parts.whole("super_res_scheduler", scheduler, "num_train_timesteps", 1000)
    none = Guidance("none", 1.0)
    return (
        PRIOR.stage(checkpoint, "embedding", checkpoint.schedulers["prior_scheduler"], PRIOR_GUIDANCE, PRIOR_STEPS),
        Stage(
            "decoder", "denoiser", "text", "larger", None, (COLOURS, *small), own[0] // small[0], checkpoint.scheduler,
            Guidance("cfg", DECODER_GUIDANCE), DECODER_STEPS, gives=LOW,
        ),
        Stage(
            "superresolution", "super_res_first", None, None, None, (COLOURS, *own), 1, scheduler, none, LARGER_STEPS,
            span=(0.0, last),
        ),
        Stage(
            "superresolution_last", "super_res_last", None, "decoder", None, (COLOURS, *own), 1, scheduler, none,
            LARGER_STEPS, span=(last, 1.0),
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """The tokenizer's ids go to ``tokens``."""
    return {"tokenizer": PRIOR.tokens(checkpoint)}


def _small(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the picture that is made larger."""
    small = parts.sides("decoder", "sample_size", checkpoint.components["decoder"].config.get("sample_size"))
    own = default_shape(checkpoint)
    if own[0] % small[0] or own[1] % small[1] or own[0] // small[0] != own[1] // small[1]:
        raise DexportError(f"a picture of {own} pixels is no whole multiple of {small}, of which it is made")
    return small


def _given(checkpoint: Checkpoint, component: str, scheduler: Mapping[str, Any]) -> int:
    """The channels that a UNet's graph gives: a learned variance is among them where the scheduler takes it."""
    given = parts.whole(component, checkpoint.components[component].config, "out_channels", COLOURS)
    return given if scheduler.get("variance_type") in parts.LEARNED else COLOURS


def _upscaler(checkpoint: Checkpoint, component: str, inputs: tuple[Tensor, ...]) -> Spec:
    config = checkpoint.components[component].config
    given = _given(checkpoint, component, checkpoint.schedulers["super_res_scheduler"])

    def upscaler(modules: Any, sample: Any, timestep: Any, low_resolution: Any) -> Any:
        import torch

        both = torch.cat([sample, low_resolution], dim=1)
        return modules.get_submodule(component)(both, timestep, return_dict=False)[0][:, :given]

    output = Tensor("output", "float32", ("batch", given, *inputs[0].shape[2:]))
    return Spec("denoiser", {component: lambda: unet2d.build(config)}, upscaler, inputs, (output,), {})


def _check(components: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DexportError for UNets that do not take and give pictures in three colours."""
    wanted = {"decoder": (COLOURS,), "super_res_first": (2 * COLOURS,), "super_res_last": (2 * COLOURS,)}
    for name, taken in wanted.items():
        pair = tuple(parts.whole(name, components[name], side, COLOURS) for side in ("in_channels", "out_channels"))
        if pair[0] not in taken or pair[1] not in (COLOURS, 2 * COLOURS):
            raise DexportError(f"{name}/config.json: {pair[0]} channels in and {pair[1]} out are not unCLIP's")
    if components["decoder"].get("class_embed_type") != "identity":
        raise DexportError(
            f"decoder/config.json: class_embed_type={components['decoder'].get('class_embed_type')!r:.60} must be "
            "'identity'"
        )


def build_text_proj(config: Mapping[str, Any]) -> Any:
    """What makes the decoder's conditioning of both embeddings, of this config.json."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    return UnCLIPTextProjModel.from_config(dict(config))


def build_resize(small: tuple[int, int], full: tuple[int, int]) -> Any:
    """A module with the matrices of bicubic interpolation as torch does it with antialiasing.

    Along each axis it is linear; runtimes differ in the cubic's constant and at the edges.
    """
    import torch

    made = torch.nn.Module()
    for name, before, after in zip(("rows", "columns"), small, full, strict=True):
        matrix = torch.nn.functional.interpolate(
            torch.eye(before)[None, None], (after, before), mode="bicubic", align_corners=False, antialias=True
        )[0, 0]
        made.register_buffer(name, matrix, persistent=False)
    return made
