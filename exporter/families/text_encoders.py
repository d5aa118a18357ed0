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
