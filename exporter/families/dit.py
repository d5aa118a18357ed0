"""DiT: a transformer over the patches of latents, told a class; KL autoencoder.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import Shape, Spec, Tokens, parts
from runtimes.errors import DexportError
from runtimes.manifest import Guidance, Labels, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

NAME = "dit"
# The first checkpoints name the class that DiT's was split off from.
COMPONENTS = {
    "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
GUIDANCE, STEPS = 4.0, 50  # DiTPipeline's defaults


def default_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """The one picture size of the checkpoint, (height, width) in pixels."""
    side = _whole(checkpoint, "sample_size", 32) * parts.pixels_per_latent(checkpoint)
    return side, side


def specs(checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
    """The three graphs. Raises DexportError for another size than the checkpoint's: its positions are learned by."""
    own = default_shape(checkpoint)
    if shape.free or (shape.height, shape.width) != own:
        raise DexportError(f"this model draws {own[0]}x{own[1]} pixels alone; leave --shape and --dynamic-shape out")
    config, drawn = checkpoint.components["transformer"].config, parts.canvas(checkpoint, shape)
    channels, given = _whole(checkpoint, "in_channels", 4), _whole(checkpoint, "out_channels", drawn.channels)
    if channels != drawn.channels or given not in (channels, 2 * channels):
        raise DexportError(
            f"transformer/config.json: {channels} channels in and {given} out where the autoencoder has "
            f"{drawn.channels}; there must be as many in, and as many or twice as many out"
        )
    # Of twice the channels the second half is a learned variance. DiTPipeline has no use for it.
    out = given if checkpoint.scheduler.get("variance_type") in parts.LEARNED else channels

    def denoiser(modules: Any, sample: Any, timestep: Any, labels: Any) -> Any:
        output = modules.transformer(sample, timestep, labels, return_dict=False)[0]
        return output[:, :out] if out < given else output

    inputs = (drawn.sample, Tensor("timestep", "float32", ("batch",)), Tensor("labels", "int64", ("batch",)))
    output = Tensor("output", "float32", ("batch", out, *drawn.sample.shape[2:]))
    build = {"transformer": lambda: build_transformer(config)}
    return {
        "denoiser": Spec("denoiser", build, denoiser, inputs, (output,), {}),
        **parts.autoencoder(checkpoint, drawn),
    }


def stages(checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
    """One loop, guided by the class that the model was told in training where it was told none: the last."""
    drawn = parts.canvas(checkpoint, shape)
    count = _whole(checkpoint, "num_embeds_ada_norm", 1000)
    labels = Labels(count, count, _names(checkpoint, count))
    return (drawn.stage(checkpoint, Guidance("cfg", GUIDANCE), STEPS, text=None, labels=labels),)


def token_inputs(checkpoint: Checkpoint) -> Mapping[str, Tokens]:
    """There is no text."""
    return {}


def rename(component: str, name: str) -> str | None:
    """Today's module name of a checkpoint's tensor; None for the table of positions, which is computed."""
    return None if name == "pos_embed.pos_embed" else parts.rename_attention(name)


def _whole(checkpoint: Checkpoint, name: str, default: int) -> int:
    return parts.whole("transformer", checkpoint.components["transformer"].config, name, default)


def _names(checkpoint: Checkpoint, count: int) -> dict[str, str]:
    """The classes' names, which DiT's model_index.json may have as "id2label"."""
    names = checkpoint.index.get("id2label") or {}
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and name.isprintable() and key.isascii() and key.isdigit() and int(key) < count
        for key, name in names.items()
    ):
        raise DexportError(f"model_index.json: id2label must give names to numbers below {count}")
    return {str(int(key)): name for key, name in names.items()}


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A DiT of this config.json."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_config(dict(config))
