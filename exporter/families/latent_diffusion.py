"""Latent diffusion without text: unconditional, and superresolution, with a UNet over the latents of a VQ autoencoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec, Tokens, parts, unet2d
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "latent-diffusion"
COMPONENTS = {"vqvae": ("VQModel",), "unet": ("UNet2DModel",)}
SUPERRESOLUTION = "LDMSuperResolutionPipeline"
STEPS = {"LDMPipeline": 50, SUPERRESOLUTION: 100}  # diffusers' own
COLOURS = 3  # of the picture that superresolution is shown


def decode(modules: Any, sample: Any) -> Any:
    """Latents [B, C, h, w], as the autoencoder has them, to a picture in [0, 1]: [B, 3, H, W]."""
    vae = modules.vqvae
    nearest = quantize(vae.quantize.embedding, sample, vae.quantize.n_e)
    norms_by = nearest if vae.config.norm_type == "spatial" else None
    return (vae.decoder(vae.post_quant_conv(nearest), norms_by) / 2 + 0.5).clamp(0, 1)


def decode_scaled(modules: Any, sample: Any) -> Any:
    """Likewise, of latents as the loop has them."""
    return decode(modules, sample / parts.latent_scale("vqvae", modules.vqvae.config)[0])


def encode_scaled(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, H, W], to latents that are not yet quantized: [B, C, h, w]."""
    latents = modules.vqvae.encode(image * 2 - 1, return_dict=False)[0]
    return latents * parts.latent_scale("vqvae", modules.vqvae.config)[0]


def quantize(codebook: Any, latents: Any, count: int) -> Any:
    """Each latent of [B, D, h, w] replaced by the nearest of the codebook's ``count`` vectors.

    The nearest by |z − e|² without |z|², which is the same for all e: one matrix product, where the class's own
    distances would take [B h w, count, D] numbers on some runtimes.
    """
    import torch

    table = codebook(torch.arange(count))  # [K, D], as the layer gives it
    flat = latents.flatten(2).transpose(1, 2)  # [B, h w, D]
    distances = table.square().sum(1) - 2 * flat @ table.T  # [B, h w, K]
    return codebook(distances.argmin(2)).transpose(1, 2).reshape(latents.shape)


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The checkpoint's own picture size, (height, width) in pixels."""
    height, width = unet2d.default_sides(checkpoint)
    factor = parts.pixels_per_latent(checkpoint, "vqvae")
    return height * factor, width * factor


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The graphs; superresolution has no encoder, since its picture goes into the denoiser as it is."""
    drawn, unet = _canvas(checkpoint, shape), _denoiser(checkpoint, shape)
    unet2d.check_shape(shape.height, shape.width, drawn.factor * unet.multiple)
    build_unet, build = {"unet": unet.build}, {"vqvae": lambda: build_vq(checkpoint.components["vqvae"].config)}
    sample, image = (drawn.sample,), (drawn.image,)
    if checkpoint.pipeline == SUPERRESOLUTION:
        shown = Tensor("image", "float32", ("batch", COLOURS, *drawn.sample.shape[2:]))

        def upscale(modules: Any, sample: Any, timestep: Any, image: Any) -> Any:
            import torch

            return unet(modules, torch.cat([sample, image * 2 - 1], dim=1), timestep)

        inputs = (*unet.inputs, shown)
        return {
            "denoiser": Spec("denoiser", build_unet, upscale, inputs, (unet.output,), drawn.latent_sizes),
            "decoder": Spec("decoder", build, decode, sample, image, drawn.latent_sizes),
        }
    return {
        "denoiser": Spec("denoiser", build_unet, unet, unet.inputs, (unet.output,), drawn.latent_sizes),
        "decoder": Spec("decoder", build, decode_scaled, sample, image, drawn.latent_sizes),
        "encoder": Spec("encoder", build, encode_scaled, image, sample, drawn.pixel_sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop without guidance."""
    drawn, unet = _canvas(checkpoint, shape), _denoiser(checkpoint, shape)
    sample = (drawn.channels, shape.height // drawn.factor, shape.width // drawn.factor)
    encoder = None if checkpoint.pipeline == SUPERRESOLUTION else "encoder"
    return (
        Stage(
            "base", "denoiser", None, "decoder", encoder, sample, drawn.factor, checkpoint.scheduler,
            Guidance("none", 1.0), STEPS[checkpoint.pipeline], labels=unet.labels, multiple=unet.multiple,
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """There is no text."""
    return {}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor."""
    return parts.rename_attention(name)


def _canvas(checkpoint: Checkpoint, shape: Shape) -> parts.Canvas:
    config = checkpoint.components["vqvae"].config
    parts.latent_scale("vqvae", config)
    channels = parts.whole("vqvae", config, "vq_embed_dim", parts.whole("vqvae", config, "latent_channels", 3))
    return parts.draw_canvas(channels, parts.pixels_per_latent(checkpoint, "vqvae"), shape)


def _denoiser(checkpoint: Checkpoint, shape: Shape) -> unet2d.Denoiser:
    drawn = _canvas(checkpoint, shape)
    more = COLOURS if checkpoint.pipeline == SUPERRESOLUTION else 0
    return unet2d.denoiser(checkpoint, drawn.channels, drawn.sample.shape[2:], more)


def build_vq(config: Mapping[str, Any]) -> Any:
    """A VQ autoencoder of this config.json."""
    from diffusers import VQModel

    return VQModel.from_config(dict(config))
