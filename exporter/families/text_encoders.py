"""Text encoders other than CLIP's that families share: their builders, and the mask over the tokens that are there.

T5: Raffel et al. (2020), https://arxiv.org/abs/1910.10683; UMT5: Chung et al. (2023), https://arxiv.org/abs/2304.09151;
Gemma 2: Gemma Team (2024), https://arxiv.org/abs/2408.00118.
"""

from __future__ import annotations

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


def padded(build: Callable[[Config], Any], config: Config, files: TokenizerFiles) -> Callable[[], Any]:
    """A builder of an encoder that knows the id that its tokenizer fills up with, for ``there``."""
    from exporter import tokenizer

    def built() -> Any:
        module = build(config)
        found, module.pad, _ = tokenizer.read(files.path, files.class_name)
        module.marks = found.encode("").ids.count(module.pad)
        return module

    return built


BUILDERS = {"T5EncoderModel": build_t5, "UMT5EncoderModel": build_umt5, "Gemma2Model": build_gemma2}


def only(checkpoint: Checkpoint) -> dict[str, Callable[[], Any]]:
    """The builder of a text graph's one encoder, ``padded``."""
    part, files = checkpoint.components["text_encoder"], checkpoint.tokenizers["tokenizer"]
    return {"text_encoder": padded(BUILDERS[part.class_name], part.config, files)}


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
    """Which of the ids [B, S] are tokens of a text, for an encoder of ``padded``: bool [B, S]."""
    filled = tokens == encoder.pad
    if encoder.marks:  # a tokenizer may fill up with its mark of the end, and the first of them is the text's own
        filled = filled.long().cumsum(1) > encoder.marks
    return ~filled
