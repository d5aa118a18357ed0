"""The families that can be exported: a row here, a file beside.

A family's file says which components a pipeline has, and gives for each graph a plain function over the components'
modules and the tensors that go in and out. It imports torch, diffusers and transformers only inside functions, so
that looking at a checkpoint stays quick. docs/adding-a-family.md has an example.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from exporter.families import refused
from runtimes.errors import DexportError
from runtimes.manifest import Kind, Stage, Tensor

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

PIPELINES = {
    "AnimateDiffPipeline": "animatediff",
    "AnimateDiffSDXLPipeline": "animatediff_xl",
    "AuraFlowPipeline": "aura_flow",
    "ConsistencyModelPipeline": "pixel",
    "DDIMPipeline": "pixel",
    "DDPMPipeline": "pixel",
    "DiTPipeline": "dit",
    "FluxPipeline": "flux",
    "KandinskyV22CombinedPipeline": "kandinsky",
    "LDMPipeline": "latent_diffusion",
    "LDMSuperResolutionPipeline": "latent_diffusion",
    "LDMTextToImagePipeline": "latent_diffusion_text",
    "LatentConsistencyModelPipeline": "stable_diffusion",
    "Lumina2Pipeline": "lumina2",
    "PNDMPipeline": "pixel",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana",
    "QwenImagePipeline": "qwen_image",
    "StableCascadeCombinedPipeline": "stable_cascade",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "StableDiffusionAdapterPipeline": "stable_diffusion",
    "StableDiffusionControlNetPipeline": "stable_diffusion",
    "StableDiffusionInpaintPipeline": "stable_diffusion",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLAdapterPipeline": "stable_diffusion_xl",
    "StableDiffusionXLControlNetPipeline": "stable_diffusion_xl",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl",
    "StableDiffusionXLInpaintPipeline": "stable_diffusion_xl",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "UnCLIPPipeline": "unclip",
    "WuerstchenCombinedPipeline": "wuerstchen",
    "ZImagePipeline": "z_image",
}
"""The allow-list: diffusers' pipeline class to the family's file."""

SAME = {
    "FluxImg2ImgPipeline": "FluxPipeline",
    "FluxInpaintPipeline": "FluxPipeline",
    "KandinskyV22Img2ImgCombinedPipeline": "KandinskyV22CombinedPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "LatentConsistencyModelPipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
    "QwenImageInpaintPipeline": "QwenImagePipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "StableDiffusionControlNetImg2ImgPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetInpaintPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline": "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetInpaintPipeline": "StableDiffusionXLControlNetPipeline",
    "ZImageImg2ImgPipeline": "ZImagePipeline",
    "ZImageInpaintPipeline": "ZImagePipeline",
}
"""Classes whose checkpoints have the parts of another: what they do is asked of any bundle, by --image and --mask."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+")  # of a class's name

# Each kind of tokenizer by the classes of transformers that a checkpoint may name for it. The generic ones take
# whatever tokenizer.json is there: transformers 5 saves many a tokenizer under the first of these names.
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", *GENERIC_TOKENIZERS)
BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", *GENERIC_TOKENIZERS)
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", *GENERIC_TOKENIZERS)
GEMMA_TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast", *GENERIC_TOKENIZERS)
LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast", *GENERIC_TOKENIZERS)
QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", *GENERIC_TOKENIZERS)
TOKENIZERS = frozenset(
    CLIP_TOKENIZERS + BERT_TOKENIZERS + T5_TOKENIZERS + GEMMA_TOKENIZERS + LLAMA_TOKENIZERS + QWEN_TOKENIZERS
)


@dataclass(frozen=True)
class Spec:
    """A graph to be: ``forward(modules, *inputs)`` over the components of these builders, and its tensors.

    ``builders`` are by component name; a parameter of the graph is named "<component>.<its name in the component>".
    ``example`` gives the sizes to trace free dimensions with, where the default of ``trace`` will not do; ``sizes`` the
    smallest and the largest size of a free dimension that has such.
    """

    kind: Kind
    builders: Mapping[str, Callable[[], Any]]
    forward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    example: Mapping[str, int]
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """Where a tokenizer's ids go: the text graph's input, and how many that takes.

    What is done to a prompt before, as in the manifest's ``Tokenizer``: ``template`` holds "{}" where the prompt goes,
    ``negative`` likewise for negative prompts, where theirs is another; ``lower`` strips the prompt and makes it lower
    case. ``side``: where ids that fill up stand, None for the tokenizer's own side, as most pipelines have it.
    """

    input: str
    length: int
    template: str = "{}"
    negative: str | None = None
    lower: bool = False
    side: Literal["right", "left"] | None = None


@dataclass(frozen=True)
class Shape:
    """The picture's size in pixels; with ``free``, the graphs take other sizes too."""

    height: int
    width: int
    free: bool


class Family(Protocol):
    """What a module in exporter/families offers."""

    NAME: str
    # Component of the pipeline to the classes that it may have; None among them: it need not be there.
    COMPONENTS: Mapping[str, tuple[str | None, ...]]

    def default_shape(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """The checkpoint's own picture size, (height, width) in pixels."""

    def specs(self, checkpoint: Checkpoint, shape: Shape) -> Mapping[str, Spec]:
        """The graphs by name. Raises DexportError for options and sizes that the family cannot do."""

    def rename(self, component: str, name: str) -> str | None:
        """The module's name of a tensor that a checkpoint calls ``name``; None for one that nothing needs."""

    def stages(self, checkpoint: Checkpoint, shape: Shape) -> tuple[Stage, ...]:
        """The loops, with graphs named as in ``specs``."""

    def token_inputs(self, checkpoint: Checkpoint) -> Mapping[str, Tokens]:
        """For each tokenizer component, what it gives to the text graph."""


def schedulers(family: Family) -> tuple[str, ...]:
    """The components of a family's pipelines that are schedulers, that of the main stage first."""
    return getattr(family, "SCHEDULERS", ("scheduler",))


def find(pipeline: str) -> Family:
    """Return the family of a pipeline class; DexportError says why another is not supported, and which may do."""
    if pipeline not in PIPELINES:
        reason = refused.reason(pipeline)
        near = nearest(pipeline) if reason.others_help else []
        advice = f"; nearest to it: {', '.join(near)}" if near else ""
        why = "" if reason is refused.YET else f": {reason.why}"
        raise DexportError(
            f"the pipeline class {pipeline:.80} is not supported{why}{advice}; docs/families.md lists all"
        )
    module: Any = importlib.import_module(f"exporter.families.{PIPELINES[pipeline]}")
    return module  # type: ignore[no-any-return]


def nearest(pipeline: str, count: int = 3) -> list[str]:
    """The supported classes whose names share most words with a class's."""
    asked = set(WORD.findall(pipeline.removesuffix("Pipeline")))
    shared = {name: _likeness(asked, set(WORD.findall(name.removesuffix("Pipeline")))) for name in PIPELINES}
    return sorted((name for name in shared if shared[name]), key=lambda name: (-shared[name], len(name), name))[:count]


def _likeness(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
