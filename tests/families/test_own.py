"""A model of one's own, in plain PyTorch, against a sampler written out in torch on the same noise."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import dexport
from examples.own_model import CLASSES, NONE, SIDE, UNet, signal
from exporter import own, reference
from exporter.own import OwnModel
from runtimes.accuracy import psnr
from runtimes.errors import DexportError
from runtimes.manifest import Guidance
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from tests.families.harness import draw, draws

ROOT = Path(__file__).resolve().parents[2]
LEAST_DB = 80
TARGETS = ("onnxruntime", "openvino")


class Latent(nn.Module):
    """A denoiser of latents that is told its guidance and a constant; plain enough to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Any, timestep: Any, guidance: Any, tone: Any) -> Any:
        """A flow's velocity."""
        known = (timestep / 1000 + guidance / 10)[:, None] * tone  # [B, 4]
        return self.mix(sample).tanh() + known[:, :, None, None]


class Decoder(nn.Module):
    """Latents to pictures of twice their sides."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, sample: Any) -> Any:
        """[B, 4, h, w] to [B, 3, 2 h, 2 w] in [0, 1]."""
        return self.out(sample).sigmoid()


class Text(nn.Module):
    """Token ids to states and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 6)

    def forward(self, tokens: Any) -> Any:
        """[B, 5] to [B, 5, 6] and [B, 6]."""
        states = self.table(tokens)
        return states, states.mean(1)


class Prompted(nn.Module):
    """A denoiser of grey pictures that attends to words."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(1, 6), nn.Linear(6, 1)

    def forward(self, sample: Any, timestep: Any, words: Any, pooled: Any) -> Any:
        """Noise, [B, 1, h, w]."""
        pixels = self.query(sample.flatten(2).transpose(1, 2))
        seen = nn.functional.scaled_dot_product_attention(pixels, words, words) * pooled[:, None]
        return self.out(seen).transpose(1, 2).unflatten(2, sample.shape[2:]) + 0.1 * sample


def prompted(folder: Path, **changes: Any) -> OwnModel:
    """A model of text with a tokenizer of five words."""
    words = {word: index for index, word in enumerate(["<pad>", "<end>", "red", "green", "apple", "pear"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(5)
    model = OwnModel(
        Prompted(), (1, 8, 8), betas=np.linspace(1e-3, 0.05, 100).tolist(), text=Text(), tokenizer=folder, length=5,
        conditioning=("words", "pooled"), guidance=3.0, steps=4, sampler="ddim",
    )  # fmt: skip
    return replace(model, **changes)


def classes(**changes: Any) -> OwnModel:
    """The example's model, without its training."""
    torch.manual_seed(3)
    model = OwnModel(
        UNet(8), (3, SIDE, SIDE), alphas_cumprod=signal(200).tolist(), prediction="v_prediction", sampler="ddim",
        labels=CLASSES, null_label=NONE, guidance=2.5, steps=4,
    )  # fmt: skip
    return replace(model, **changes)


def latent(**changes: Any) -> OwnModel:
    """A flow of latents with a decoder and no encoder."""
    torch.manual_seed(4)
    model = OwnModel(
        Latent(), (4, 8, 8), scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0},
        guidance=Guidance("embedded", 3.5), inputs={"tone": [0.5, -0.25, 0.0, 1.0]}, decoder=Decoder(), steps=3,
    )  # fmt: skip
    return replace(model, **changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model with classes for both backends, gate and all, and the same module still in training mode."""
    model, folder = classes(), tmp_path_factory.mktemp("own")
    model.denoiser.train()
    made = dexport.build(model, folder / "bundles", targets=TARGETS, dynamic_shape=True)
    assert model.denoiser.training and all(value.requires_grad for value in model.denoiser.parameters())
    return {item.target: item.folder for item in made}


def ddim(model: OwnModel, labels: list[int], noise: Any, guidance: float, steps: int) -> np.ndarray[Any, Any]:
    """Pictures by DDIM, https://arxiv.org/abs/2010.02502, formula 12, from a velocity, in float64 around the model."""
    bars = torch.tensor(model.alphas_cumprod, dtype=torch.float64)
    times = (torch.arange(steps) * (len(bars) // steps)).flip(0)  # "leading", as diffusers' DDIM has it by default
    x, module = torch.from_numpy(noise), model.denoiser.eval()
    for t in times.tolist():
        told = torch.full((len(x),), float(t))
        with torch.no_grad():
            with_class, without = (
                module(x.float(), told, torch.tensor(of)).double() for of in (labels, [NONE] * len(labels))
            )
        velocity = without + guidance * (with_class - without)
        alpha, sigma = bars[t].sqrt(), (1 - bars[t]).sqrt()
        clean, epsilon = alpha * x - sigma * velocity, alpha * velocity + sigma * x
        before = t - len(bars) // steps
        kept = bars[before] if before >= 0 else torch.tensor(1.0, dtype=torch.float64)
        x = kept.sqrt() * clean + (1 - kept).sqrt() * epsilon
    return ((x / 2 + 0.5).clamp(0, 1)).numpy()


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_are_those_of_a_sampler_in_torch(built: dict[str, Path], target: str) -> None:
    request = Request(labels=["ring", 1], guidance=2.5, steps=4)
    _, pictures = draw(Pipeline.load(built[target]), request)
    expected = ddim(classes(), [3, 1], draws((2, 3, SIDE, SIDE))(), 2.5, 4)
    assert psnr(expected, pictures) > LEAST_DB and np.std(expected) > 0.05
    other = ddim(classes(), [0, 2], draws((2, 3, SIDE, SIDE))(), 2.5, 4)
    assert psnr(expected, other) < 40  # or the comparison would prove little


def test_other_sizes_and_pictures_to_begin_with(built: dict[str, Path]) -> None:
    pipeline = dexport.load(built["onnxruntime"])
    (wide,) = pipeline(labels="disc", size=(16, 24), steps=2).images
    assert wide.size == (24, 16)
    begun = pipeline(labels="disc", image=Image.new("RGB", (SIDE, SIDE), "red"), strength=0.5, steps=4).images[0]
    assert begun.size == (SIDE, SIDE)


def test_latents_with_embedded_guidance_and_a_decoder(tmp_path: Path) -> None:
    model = latent()
    (made,) = dexport.build(model, tmp_path / "bundle", targets="openvino")
    request = Request(guidance=2.0, steps=3)
    latents, picture = draw(Pipeline.load(made.folder), request)
    x = draws((1, 4, 8, 8))()
    plain = np.linspace(1.0, 2 * 1e-3 / (1 + 1e-3), 3)  # diffusers' spacing goes down to the shifted sigma of t = 1
    sigmas = [*(2 * plain / (1 + plain)), 0.0]
    for sigma, after in pairwise(sigmas):
        with torch.no_grad():
            velocity = model.denoiser(
                torch.from_numpy(x).float(), torch.full((1,), 1000 * sigma, dtype=torch.float32), torch.full((1,), 2.0),
                torch.tensor([model.inputs["tone"]]),
            )  # fmt: skip
        x = x + (after - sigma) * velocity.double().numpy()
    assert np.abs(latents - x).max() <= 1e-3
    with torch.no_grad():
        assert psnr(model.decoder(torch.from_numpy(x).float()).numpy(), picture) > LEAST_DB
    assert picture.shape == (1, 3, 16, 16)


def test_prompts_reach_the_denoiser(tmp_path: Path) -> None:
    model = prompted(tmp_path / "words")
    (made,) = dexport.build(model, tmp_path / "bundle", targets="onnxruntime")
    latents, _ = draw(Pipeline.load(made.folder), Request(["red apple", "pear"], steps=4, guidance=3.0))
    assert model.text is not None
    with torch.no_grad():
        tokens = torch.tensor([[2, 4, 1, 0, 0], [5, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
        words, pooled = model.text(tokens)
        x, bars = torch.from_numpy(draws((2, 1, 8, 8))()), torch.from_numpy(np.cumprod(1 - np.array(model.betas)))
        for t in (75, 50, 25, 0):
            told = torch.full((2,), float(t))
            asked = model.denoiser(x.float(), told, words[:2], pooled[:2]).double()
            empty = model.denoiser(x.float(), told, words[[2, 2]], pooled[[2, 2]]).double()
            epsilon = empty + 3.0 * (asked - empty)
            clean = (x - (1 - bars[t]).sqrt() * epsilon) / bars[t].sqrt()
            kept = bars[t - 25] if t else torch.tensor(1.0)
            x = kept.sqrt() * clean + (1 - kept).sqrt() * epsilon
    assert np.abs(latents - x.numpy()).max() <= 1e-3
    assert np.abs(latents[0] - latents[1]).max() > 0.01


def test_the_reference_is_the_module_itself() -> None:
    model = classes()
    read = own.read(model)
    sample, told, labels = torch.randn(2, 3, SIDE, SIDE), torch.tensor([3.0, 150.0]), torch.tensor([0, NONE])
    with torch.no_grad():
        expected = model.denoiser.eval()(sample, told, labels)
        torch.testing.assert_close(reference.load(read, "denoiser")(sample, told, labels), expected)
    (file,) = read.source()
    assert file.path == "denoiser" and file.size == 4 * sum(
        value.numel() for value in (*model.denoiser.parameters(), *model.denoiser.buffers())
    )
    with torch.no_grad():
        model.denoiser.end.bias += 1
    changed = own.read(model).source()[0].sha256
    assert changed != file.sha256
    model.denoiser.frequencies *= 2  # a buffer
    assert own.read(model).source()[0].sha256 != changed
    model.denoiser.frequencies[0] = torch.nan
    with pytest.raises(DexportError, match="'frequencies' holds NaN"):
        own.read(model)


class Looks(Latent):
    """Decides by a value."""

    def forward(self, sample: Any, timestep: Any, guidance: Any, tone: Any) -> Any:
        """Not for a graph."""
        return sample if float(sample.sum()) > 0 else super().forward(sample, timestep, guidance, tone)


def broken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: classes(sample=(3, 16)), r"sample must be \(channels, height, width\)"),
        (lambda: classes(denoiser="unet"), "denoiser must be a torch.nn.Module"),
        (lambda: classes(betas=[0.1, 0.2]), "give one of betas, alphas_cumprod and scheduler"),
        (lambda: classes(alphas_cumprod=[0.5, 0.7]), "alphas_cumprod fall from almost 1"),
        (lambda: classes(alphas_cumprod=[[0.5]]), "lists of numbers"),
        (lambda: classes(null_label=None), "guidance needs something to steer away from"),
        (lambda: classes(prediction="velocity"), "prediction_type"),
        (lambda: classes(sampler="nonsense"), "nonsense"),
        (lambda: classes(sampler="flow_euler"), "flow"),
        (lambda: classes(null_label="none"), "null_label must be the number"),
        (lambda: classes(labels="disc"), "list their names"),
        (lambda: classes(labels=["a", "A"]), "two classes have the same name"),
        (lambda: classes(guidance=None), "guidance must be a number"),
        (lambda: classes(steps="20"), "steps must be a whole number from 1"),
        (lambda: classes(multiple=0), "multiple must be a whole number from 1"),
        (lambda: classes(alphas_cumprod=["a"]), "lists of numbers"),
        (lambda: classes(inputs={"labels": 1}), "'labels' is filled by the request"),
        (lambda: latent(inputs={"tone": ["a"]}), "'tone' must be numbers"),
        (lambda: latent(scheduler="DDIM"), "scheduler must be a config"),
        (lambda: classes(labels=0, null_label=None, guidance=1), "denoiser: it does not run on .*labels"),
        (lambda: classes(sample=(2, 16, 16)), "give a decoder for 2"),
        (lambda: classes(denoiser=broken(UNet(8))), "holds NaN or infinity"),
        (lambda: latent(decoder=nn.Conv2d(4, 4, 1)), "decoder: a sample of .* gave a picture of"),
        (lambda: latent(inputs={"tone": [0.5, 1, 2]}), "denoiser: it does not run on .*tone"),
        (lambda: latent(denoiser=Looks()), "denoiser: it goes by the value of a tensor"),
        (lambda: classes(tokenizer="words"), "text and tokenizer go together"),
        (lambda: latent(text=Text(), tokenizer="nowhere", length=5), "text: it gave .* conditioning names"),
        (lambda: 3, "a checkpoint is a path, or a dexport.OwnModel, not 3"),
    ],
)
def test_descriptions_that_do_not_fit(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DexportError, match=words) as error:
        dexport.export(make(), tmp_path / "hub")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "label"), [({"labels": NONE + 4}, NONE + 3), ({"null_label": NONE + 1}, NONE + 1)])
def test_a_label_that_the_denoiser_does_not_have(tmp_path: Path, changes: dict[str, int], label: int) -> None:
    with pytest.raises(DexportError, match=f"graph denoiser does not take the label {label} ") as error:
        dexport.build(classes(**changes), tmp_path / "bundle", targets="onnxruntime")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_is_only_for_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="takes nothing that is said of files"):
        dexport.export(dexport.Origin(classes(), clip_skip=2), tmp_path / "hub")


def test_the_example_draws(tmp_path: Path) -> None:
    words = [sys.executable, "examples/own_model.py", "--training", "2", "-o", str(tmp_path / "own")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" dB from the torch model") == 2
    with Image.open(tmp_path / "own" / "shapes.png") as sheet:
        assert sheet.width > 12 * 5 * SIDE and len(sheet.getcolors(1 << 20) or []) > 100
