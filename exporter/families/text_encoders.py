"""Text encoders other than CLIP's that families share: their builders, and the mask over the tokens that are there.

T5: Raffel et al. (2020), https://arxiv.org/abs/1910.10683; UMT5: Chung et al. (2023), https://arxiv.org/abs/2304.09151.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.families import parts

if TYPE_CHECKING:
    from exporter.checkpoint import TokenizerFiles

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
    """A builder of an encoder that knows, as ``pad``, the id that its tokenizer fills up with."""
    from exporter import tokenizer

    def built() -> Any:
        module = build(config)
        module.pad = tokenizer.read(files.path, files.class_name)[1]
        return module

    return built


def there(encoder: Any, tokens: Any) -> Any:
    """Which of the ids [B, S] are tokens of a text, for an encoder of ``padded``: bool [B, S]."""
    return tokens != encoder.pad
