"""Checkpoints that belong together: a prior and a decoder, a consistency decoder beside a model or inside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter import ensemble, reference
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes import cascade
from runtimes.errors import DexportError
from tests.families.small_cascades import consistency_decoder, kandinsky, stable_diffusion, unclip

SHAPE = Shape(16, 16, free=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kandinsky in one folder and in two, and Stable Diffusion with a consistency decoder beside it and inside."""
    place = tmp_path_factory.mktemp("combined")
    pipe = kandinsky(place / "both")
    pipe.prior_pipe.save_pretrained(place / "prior")
    pipe.decoder_pipe.save_pretrained(place / "decoder")
    stable_diffusion(place / "sd")
    stable_diffusion(place / "sd-inside", consistency_decoder(place / "consistency"))
    return place


def run(origin: Origin, graph: str, *inputs: torch.Tensor) -> Any:
    with torch.inference_mode():
        return reference.load(ensemble.read(origin), graph)(*inputs)


def test_two_folders_are_the_combined_one(folder: Path) -> None:
    one, two = ensemble.read(folder / "both"), ensemble.read(Origin(folder / "decoder", prior=folder / "prior"))
    assert one.pipeline == two.pipeline == "KandinskyV22CombinedPipeline"
    assert {name: part.config.get("_class_name") for name, part in one.components.items()} == {
        name: part.config.get("_class_name") for name, part in two.components.items()
    }
    assert ensemble.stages(one, SHAPE) == ensemble.stages(two, SHAPE)
    assert list(ensemble.specs(one, SHAPE)) == list(ensemble.specs(two, SHAPE))
    names = {file.path for file in ensemble.source(two)}
    assert {"prior_prior/config.json", "prior_tokenizer/tokenizer_config.json", "movq/config.json"} <= names
    assert list(ensemble.token_inputs(two)) == ["tokenizer_prior"]
    for origin in (Origin(folder / "both"), Origin(folder / "decoder", prior=folder / "prior")):
        _, nothing = run(origin, "embedding", torch.zeros(1, 16))
        assert nothing.std() > 0.01
    assert Origin(folder / "decoder", prior=folder / "prior").checkpoints == [folder / "decoder", folder / "prior"]


def test_defaults_are_of_the_main_stage(folder: Path) -> None:
    made = ensemble.read(Origin(folder / "both", steps=7, guidance=1, sampler="ddim"))
    prior, decoder = ensemble.stages(made, SHAPE)
    assert (prior.steps, prior.guidance.scale, prior.scheduler["_class_name"]) == (25, 4.0, "UnCLIPScheduler")
    assert (decoder.steps, decoder.guidance.scale, decoder.scheduler["_class_name"]) == (7, 1.0, "DDIMScheduler")
    assert cascade.main([prior, decoder]) == (decoder,)  # though it is not guided by default now


def test_consistency_decoder_inside_is_as_beside(folder: Path) -> None:
    beside, inside = Origin(folder / "sd", decoder=folder / "consistency"), Origin(folder / "sd-inside")
    made = [ensemble.read(origin) for origin in (beside, inside)]
    for one in made:
        base, decoder = ensemble.stages(one, SHAPE)
        assert (base.gives, base.decoder, base.encoder) == ("latents", "latents", "encoder")
        assert (decoder.denoiser, decoder.decoder, decoder.sample) == ("consistency", "decoder", (3, 16, 16))
        wanted = {"text", "denoiser", "encoder", "latents", "consistency", "decoder"}
        assert set(ensemble.specs(one, SHAPE)) == wanted
        assert set(ensemble.specs(one, Shape(16, 16, free=True))) == wanted
    sample, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 16, 16)
    outputs = [run(origin, "consistency", sample, torch.tensor([512.0]), latents) for origin in (beside, inside)]
    assert torch.equal(*outputs) and outputs[0].std() > 0.01
    vae = consistency_decoder(folder / "again").eval()
    with torch.inference_mode():
        expected = vae.encode(2 * sample.sigmoid() - 1).latent_dist.mode() * vae.config.scaling_factor
    np.testing.assert_allclose(run(inside, "encoder", sample.sigmoid()), expected, atol=1e-5)


def test_unguided_base_of_a_consistency_decoder_stays_unguided(folder: Path) -> None:
    base, _ = ensemble.stages(ensemble.read(Origin(folder / "sd-inside", guidance=0)), SHAPE)
    assert base.guidance.kind == "none"


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin("decoder"), "give the KandinskyV22PriorPipeline with --prior"),
        (Origin("prior"), "draws no picture; give it with --prior"),
        (Origin("decoder", prior="sd"), "a StableDiffusionPipeline; the prior of a KandinskyV22Pipeline is"),
        (Origin("sd", prior="prior"), "a StableDiffusionPipeline takes no prior"),
        (Origin("decoder", prior="nowhere"), "nowhere: no such folder"),
        (Origin("sd", decoder="sd/vae"), "'AutoencoderKL'; it must be an AutoencoderTiny or a ConsistencyDecoderVAE"),
        (Origin("sd", decoder="nowhere"), "nowhere: no such folder"),
        (Origin("sd", decoder="both"), "both: a whole checkpoint; give the folder of the one component"),
        (Origin("both", decoder="consistency"), "Stable Diffusion 1's autoencoder, which a KandinskyV22Combined"),
        (Origin("both", embeddings=["word.safetensors"]), "leave --embedding out for a KandinskyV22Combined"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder: Path, origin: Origin, said: str) -> None:
    places = {name: folder / getattr(origin, name) for name in ("path", "prior", "decoder") if getattr(origin, name)}
    with pytest.raises(DexportError, match=said):
        ensemble.read(replace(origin, **places))


def test_decoder_of_other_latents_is_refused(folder: Path, tmp_path: Path) -> None:
    consistency_decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    normal = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 2.0, 1.0]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025} | normal))
    said = "its latents have 4 channels, scale 0.08683, 0.1628, 0.06513, 0.1303, shift 0.1, -0.2, 0.3, 0, those of .*"
    with pytest.raises(DexportError, match=f"{said}/sd 4 channels, scale 0.1822, shift 0; leave"):
        ensemble.read(Origin(folder / "sd", decoder=tmp_path))


def test_unclip_draws_one_size(tmp_path: Path) -> None:
    unclip(tmp_path / "unclip")
    made = ensemble.read(tmp_path / "unclip")
    assert [stage.name for stage in ensemble.stages(made, SHAPE)] == [
        "prior", "decoder", "superresolution", "superresolution_last",
    ]  # fmt: skip
    assert [len(way) for way in cascade.ways(ensemble.stages(made, SHAPE))] == [1, 1, 2]
    with pytest.raises(DexportError, match="16x16 pixels alone"):
        ensemble.specs(made, Shape(32, 32, free=False))
