"""Models that draw pixels, without text and without an autoencoder: DDPM, DDIM, PNDM and consistency models.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239; Song et al.,
"Consistency Models" (2023), https://arxiv.org/abs/2303.01469. Their samples are pictures in [-1, 1], in colour or grey.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec, Tokens, parts, unet2d
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "pixel-diffusion"
COMPONENTS = {"unet": ("UNet2DModel",)}
# diffusers' own. DDPM's chain is as long as the model was trained on.
STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50, "PNDMPipeline": 50, "ConsistencyModelPipeline": 1}
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey picture: ITU-R BT.601, as Pillow has it


def decoder(modules: Any, sample: Any) -> Any:
    """A sample [B, 3 or 1, h, w] to a picture in [0, 1]: [B, 3, h, w]."""
    import torch

    image = (sample / 2 + 0.5).clamp(0, 1)
    return image if sample.shape[1] == 3 else torch.cat([image] * 3, dim=1)


def encoder(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, h, w], to a sample of three channels: [B, 3, h, w]."""
    return image * 2 - 1


def grey_encoder(modules: Any, image: Any) -> Any:
    """A picture in [0, 1], [B, 3, h, w], to a sample of its brightness: [B, 1, h, w]."""
    return sum(share * image[:, index : index + 1] for index, share in enumerate(LUMA)) * 2 - 1


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The checkpoint's own picture size, (height, width) in pixels."""
    return unet2d.default_sides(checkpoint)


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The three graphs; decoder and encoder only turn [-1, 1] into pictures and back."""
    channels = _channels(checkpoint)
    sides = ("height", "width") if shape.free else (shape.height, shape.width)
    unet = unet2d.denoiser(checkpoint, channels, sides)
    unet2d.check_shape(shape.height, shape.width, unet.multiple)
    sizes = {"height": shape.height, "width": shape.width}
    sample, image = unet.inputs[0], Tensor("image", "float32", ("batch", 3, *sides))
    encode = encoder if channels == 3 else grey_encoder
    return {
        "denoiser": Spec("denoiser", {"unet": unet.build}, unet, unet.inputs, (unet.output,), sizes),
        "decoder": Spec("decoder", {}, decoder, (sample,), (image,), sizes),
        "encoder": Spec("encoder", {}, encode, (image,), (sample,), sizes),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop, with the model's classes where it has some, and no guidance."""
    sample = (_channels(checkpoint), shape.height, shape.width)
    unet = unet2d.denoiser(checkpoint, sample[0], sample[1:])
    trained = parts.whole("scheduler", checkpoint.scheduler, "num_train_timesteps", 1000)
    return (
        Stage(
            "base", "denoiser", None, "decoder", "encoder", sample, 1, checkpoint.scheduler, Guidance("none", 1.0),
            min(STEPS[checkpoint.pipeline], trained), labels=unet.labels, multiple=unet.multiple,
        ),
    )  # fmt: skip


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """There is no text."""
    return {}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor."""
    return parts.rename_attention(name)


def _channels(checkpoint: Checkpoint) -> int:
    channels = parts.whole("unet", checkpoint.components["unet"].config, "in_channels", 3)
    if channels not in (1, 3):
        raise DexportError(
            f"unet/config.json: in_channels={channels}: pictures have 3 channels, or 1 where they are grey"
        )
    return channels
