"""Text encoders other than CLIP's that families share: their builders, and the mask over the tokens that are there.

T5: Raffel et al. (2020), https://arxiv.org/abs/1910.10683; UMT5: Chung et al. (2023), https://arxiv.org/abs/2304.09151;
Gemma 2: Gemma Team (2024), https://arxiv.org/abs/2408.00118.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import parts
from runtimes.manifest import Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint, TokenizerFiles

Config = Mapping[str, Any]


def width(component: str, config: Config) -> int:
    """The width of the states of a T5."""
    return parts.whole(component, config, "d_model", 512)


def build_t5(config: Config) -> Any:
    """A T5 encoder of this config.json."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config.from_dict(dict(config)))


def build_umt5(config: Config) -> Any:
    """A UMT5 encoder of this config.json."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def build_gemma2(config: Config) -> Any:
    """A Gemma 2 without a head, of this config.json."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config.from_dict(dict(config)))


def language(config: Config) -> Config:
    """The part of a config.json that is of the language model; old files have it beside the rest."""
    own = config.get("text_config")
    return own if isinstance(own, Mapping) else config


def language_width(component: str, config: Config) -> int:
    """The width of the states of a language model, alone or in one that also looks at pictures."""
    return parts.whole(component, language(config), "hidden_size", 4096)


def build_qwen_vl(config: Config) -> Any:
    """The language model of a Qwen2.5-VL of this config.json, without what looks at pictures and what writes words."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(Qwen2_5_VLConfig.from_dict(dict(config)).text_config)


def build_qwen3(config: Config) -> Any:
    """A language model Qwen3 of this config.json, without what writes words."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config.from_dict(dict(config)))


def rename_language(name: str) -> str | None:
    """The name in a language model alone of a tensor of a whole one; None for what is not of it."""
    name = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    return None if name.startswith(("visual.", "lm_head.")) else name


def padded(
    build: Callable[[Config], Any], config: Config, files: TokenizerFiles, side: str | None = None
) -> Callable[[], Any]:
    """A builder of an encoder that knows what its tokenizer fills up with, for ``there``.

    side: where, None for the tokenizer's own side.
    """

    def built() -> Any:
        module, made = build(config), files.made
        encoding = made.open().encode("a")
        marks = [number for number, mark in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if mark]
        module.pad, module.left, module.least = made.pad, (side or made.side) == "left", len(marks)
        # A tokenizer may fill up with one of its marks, and those that stand there are the text's own.
        ids = encoding.ids if module.left else encoding.ids[::-1]
        module.marks = sum(1 for _ in itertools.takewhile(lambda number: number == made.pad, ids))
        return module

    return built


BUILDERS = {"T5EncoderModel": build_t5, "UMT5EncoderModel": build_umt5, "Gemma2Model": build_gemma2}


def only(checkpoint: Checkpoint, side: str | None = None) -> dict[str, Callable[[], Any]]:
    """The builder of a text graph's one encoder, ``padded`` on a side."""
    part, files = checkpoint.components["text_encoder"], checkpoint.tokenizers["tokenizer"]
    return {"text_encoder": padded(BUILDERS[part.class_name], part.config, files, side)}


def states(checkpoint: Checkpoint, length: int, option: str, default: int) -> tuple[Tensor, Tensor]:
    """The states of ``length`` tokens that a text graph's one encoder gives, and which of them are a text's.

    option, default: of the transformer's config, for the width that it takes. Raises DexportError for another one.
    """
    part = checkpoint.components["text_encoder"]
    wide = (language_width if part.class_name == "Gemma2Model" else width)(part.name, part.config)
    parts.check_width(checkpoint, option, default, wide)
    return (
        Tensor("encoder_hidden_states", "float32", ("batch", length, wide)),
        Tensor("encoder_hidden_states_mask", "float32", ("batch", length)),
    )


def there(encoder: Any, tokens: Any) -> Any:
    """Which of the ids [B, S] are tokens of a text, for an encoder of ``padded``: bool [B, S].

    What fills up stands at one end. So a text may hold the id of it, as words that mean a mark do.
    """
    import torch

    places = torch.arange(1, tokens.shape[1] + 1)  # counted from where the text stands; whole, since bf16 ends at 256
    places = places.flip(0) if encoder.left else places
    last = ((tokens != encoder.pad).long() * places).amax(dim=1, keepdim=True)  # that does not fill up: [B, 1]
    return places <= (last + encoder.marks).clamp(min=encoder.least)
