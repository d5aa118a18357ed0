"""Transformers that a language model tells what to draw: refusals, defaults, sizes, and what is theirs alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from exporter import checkpoint, hub, record, reference, tokenizer
from exporter.families import Shape, text_encoders
from runtimes import guidance, timetable
from runtimes.errors import DexportError
from runtimes.image import to_array
from runtimes.manifest import Graph, Model, Tokenizer
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import require
from tests.families import small_transformers as small
from tests.families.harness import picture

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SHAPE = Shape(32, 32, free=False)
Saved = Callable[[str], Path]


TRANSFORMER, VAE, INDEX = "transformer/config.json", "vae/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("name", "file", "changes", "words"),
    [
        ("pixart_sigma", TRANSFORMER, {"in_channels": 9}, "9 channels in and 8 out where the autoencoder has 4"),
        ("pixart_sigma", TRANSFORMER, {"out_channels": 6}, "4 channels in and 6 out"),
        ("pixart_sigma", TRANSFORMER, {"patch_size": 3}, "32x32 pixels: this model needs multiples of 6"),
        ("pixart_sigma", TRANSFORMER, {"caption_channels": 8}, "caption_channels=8 where the text encoders give 16"),
        ("pixart_sigma", INDEX, {"tokenizer": ["transformers", "BertTokenizer"]}, "is exported with T5Tokenizer"),
        ("sana", TRANSFORMER, {"in_channels": 9}, "9 channels in and 4 out where the autoencoder has 4"),
        ("sana", TRANSFORMER, {"caption_channels": 8}, "caption_channels=8 where the text encoders give 16"),
        ("sana", VAE, {"scaling_factor": 0}, "scaling_factor=0 is not a usable number"),
        ("sana", VAE, {"encoder_block_out_channels": 8}, "encoder_block_out_channels=8 must be a list"),
        ("sana_sprint", TRANSFORMER, {"guidance_embeds": False}, "guidance_embeds must be true"),
        ("aura_flow", TRANSFORMER, {"pos_embed_max_size": 16}, "32x32 pixels: this model knows positions up to 16"),
        ("aura_flow", TRANSFORMER, {"joint_attention_dim": 8}, "joint_attention_dim=8 where the text encoders give 16"),
        ("lumina2", TRANSFORMER, {"axes_lens": [300, 16]}, "axes_lens"),
        ("lumina2", TRANSFORMER, {"axes_lens": [200, 16, 16]}, "must begin with more than 256"),
        ("lumina2", TRANSFORMER, {"axes_lens": [300, 1, 16]}, "32x32 pixels: this model knows positions up to 16"),
        ("lumina2", TRANSFORMER, {"axes_dim_rope": [4, 4, 2]}, "that make the 8 channels of a head"),
        ("lumina2", TRANSFORMER, {"cap_feat_dim": 8}, "cap_feat_dim=8 where the text encoders give 16"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(
    changed: Callable[..., Path], tmp_path: Path, name: str, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = changed(name, file, **changes)
    with pytest.raises(DexportError, match=words) as caught:
        hub.export(folder, tmp_path / "hub", shape=(32, 32))
    assert "\n" not in str(caught.value) and not (tmp_path / "hub").exists()


def test_learned_positions_are_of_one_size(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="choose one size with --shape"):
        hub.export(saved("aura_flow"), tmp_path / "hub", dynamic_shape=True)


def test_defaults_are_the_pipelines(saved: Saved) -> None:
    found = {}
    for name in small.WRITERS:
        read = checkpoint.read(saved(name))
        (stage,) = read.family.stages(read, SHAPE)
        (tokens,) = read.family.token_inputs(read).values()
        guided = stage.guidance.kind, stage.guidance.scale, stage.guidance.normalize
        found[name] = (read.family.default_shape(read), stage.steps, *guided, stage.sigmas, tokens.lower)
    assert found == {
        "pixart_alpha": ((256, 256), 20, "cfg", 4.5, "none", "scheduler", True),
        "pixart_sigma": ((16, 16), 20, "cfg", 4.5, "none", "scheduler", True),
        "sana": ((16, 16), 20, "cfg", 4.5, "none", "scheduler", True),
        "sana_wide": ((16, 16), 20, "cfg", 4.5, "none", "scheduler", True),
        "sana_sprint": ((16, 16), 2, "embedded", 4.5, "none", "scheduler", True),
        "aura_flow": ((32, 32), 50, "cfg", 3.5, "none", "scheduler", False),
        "lumina2": ((64, 64), 30, "cfg", 4.0, "rows", "even", False),
    }


@pytest.mark.parametrize("name", ["pixart_sigma", "sana_wide", "lumina2"])
def test_a_denoiser_of_every_size(saved: Saved, tmp_path: Path, name: str) -> None:
    folder = saved(name)
    model = hub.export(folder, tmp_path / "hub", shape=(32, 48), dynamic_shape=True, graphs=["denoiser"])
    graph = model.graphs["denoiser"]
    session = require("onnxruntime").open(tmp_path / "hub" / graph.file, graph, "cpu", None, None)
    for batch, height, width in ((2, 6, 4), (1, 8, 10)):
        factor = model.stages[0].factor
        original = reference.load(checkpoint.read(folder), "denoiser", (height * factor, width * factor))
        sizes, stream = {"batch": batch, "height": height, "width": width}, np.random.default_rng(0)
        inputs = {}
        for tensor in graph.inputs:
            shape = [sizes[side] if isinstance(side, str) else side for side in tensor.shape]
            inputs[tensor.name] = stream.standard_normal(shape).astype(np.float32)
        inputs["timestep"] = np.full(batch, 400, np.float32)
        mask = inputs["encoder_hidden_states_mask"]
        mask[:] = np.arange(mask.shape[1]) < stream.integers(20, 90, (batch, 1))
        with torch.no_grad():
            wanted = original(*(torch.from_numpy(inputs[tensor.name]) for tensor in graph.inputs)).numpy()
        assert np.abs(session.run(inputs)["output"] - wanted).max() < 1e-4 < np.std(wanted)


def test_a_picture_is_reworked(saved: Saved, tmp_path: Path) -> None:
    """From half of the way, as diffusers' scheduler and transformer do it; it has no pipeline for that."""
    folder, size, steps = saved("pixart_sigma"), (16, 16), 8
    read = checkpoint.read(folder)
    specs, stages = (part(read, Shape(*size, free=False)) for part in (read.family.specs, read.family.stages))
    graphs = {name: Graph(spec.kind, f"{name}/model.onnx", spec.inputs, spec.outputs) for name, spec in specs.items()}
    files, (tokens,) = read.tokenizers["tokenizer"], read.family.token_inputs(read).values()
    tokenizer.write(files.made, tmp_path / "tokenizer.json")
    words = Tokenizer("tokenizer.json", tokens.input, tokens.length, files.made.pad, lower=tokens.lower)
    opened = {name: record.TorchSession(read, name, graph, [], size) for name, graph in graphs.items()}
    model = Model(read.family.NAME, read.pipeline, graphs, (words,), stages, ())
    pipeline = Pipeline(model, tmp_path, opened.__getitem__)
    request = Request(["red apple"], image=picture(16), strength=0.5, steps=steps, guidance=1.0)
    noise = np.random.default_rng(3).standard_normal((1, 4, 8, 8))
    *_, last = pipeline.generate(request, lambda: noise)

    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32)
    states, mask, _, _ = pipe.encode_prompt("red apple", False)
    pipe.scheduler.set_timesteps(steps)
    times = pipe.scheduler.timesteps[steps // 2 :]
    pipe.scheduler.set_begin_index(steps // 2)
    start = torch.from_numpy(pipeline.encode(to_array(request.image, size)))
    sample = pipe.scheduler.add_noise(start, torch.from_numpy(noise).float(), times[:1])
    for t in times:
        with torch.no_grad():
            output = pipe.transformer(
                sample, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t.expand(1),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
            )[0]  # fmt: skip
        sample = pipe.scheduler.step(output[:, :4], t, sample, return_dict=False)[0]
    assert last.total == len(times) == 4
    assert np.abs(last.sample - sample.numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_lumina_is_shifted_as_its_pipeline_does_it(tmp_path: Path, kind: str) -> None:
    """By the number of channels, which is the same for every size."""
    small.lumina2(tmp_path / "checkpoint", shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    read = checkpoint.read(tmp_path / "checkpoint")
    (stage,) = read.family.stages(read, SHAPE)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "checkpoint/scheduler")
    from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=calculate_shift(stage.sample[0]))
    rows = timetable.compile_stage(stage, 7, stage.sample).rows
    np.testing.assert_allclose([row.t for row in rows], theirs.timesteps.numpy(), rtol=1e-6)


def test_rows_keep_their_length() -> None:
    """As Lumina2Pipeline has it, with torch; and a row without length stays one."""
    without, with_prompt = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 8)).astype(np.float32)
    without[:, :, 0] = with_prompt[:, :, 0] = 0
    c, u = torch.tensor(with_prompt, dtype=torch.float64), torch.tensor(without, dtype=torch.float64)
    mixed = u + 4.0 * (c - u)
    ratio = torch.norm(c, dim=-1, keepdim=True) / torch.norm(mixed, dim=-1, keepdim=True)
    wanted = (mixed * ratio).nan_to_num(0).numpy()
    found = guidance.guide(without, with_prompt, 4.0, rows=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert not math.isclose(np.abs(found - mixed.numpy()).max(), 0)


@pytest.mark.parametrize(
    ("marks", "least", "ids", "seen"),
    [
        (0, 0, [5, 6, 2, 2, 2], [1, 1, 0, 0, 0]),
        (1, 1, [5, 6, 2, 2, 2], [1, 1, 1, 0, 0]),
        (1, 2, [2, 2, 2, 2, 2], [1, 1, 0, 0, 0]),  # two marks, and no text
        (1, 1, [5, 2, 6, 2, 2], [1, 1, 1, 1, 0]),  # a text may hold a mark
        (1, 1, [5, 2, 6, 7, 2], [1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_a_mark_that_also_fills_up(marks: int, least: int, ids: list[int], seen: list[int], left: bool) -> None:
    encoder = SimpleNamespace(pad=2, marks=marks, least=least, left=left)
    step = -1 if left else 1
    assert text_encoders.there(encoder, torch.tensor([ids[::step]])).long().tolist() == [seen[::step]]
