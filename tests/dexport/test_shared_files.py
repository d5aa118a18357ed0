"""A checkpoint in one file with a LoRA, as they are shared, from the command line to the exported graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import save_file
from transformers import CLIPTextModel

from tests.dexport.conftest import Say
from tests.exporter import ldm


def test_a_single_file_with_a_lora(say: Say, tiny_sd: Path, tmp_path: Path) -> None:
    """The graphs compute what diffusers' modules do with W + scale · alpha / rank · up · down for W."""
    random = np.random.default_rng(0)
    down = random.standard_normal((4, 32)).astype(np.float32)
    up = random.standard_normal((64, 4)).astype(np.float32)
    save_file(ldm.of_folder(tiny_sd), tmp_path / "model.safetensors")
    lora = {}
    for name in (
        "unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "te_text_model_encoder_layers_1_mlp_fc1",
    ):
        lora |= {f"lora_{name}.lora_down.weight": down, f"lora_{name}.lora_up.weight": up}
        lora[f"lora_{name}.alpha"] = np.array(2, np.float32)
    save_file(lora, tmp_path / "style.safetensors")
    said = say(
        "export", tmp_path / "model.safetensors", "--config", tiny_sd, "-o", tmp_path / "hub", "--json",
        "--lora", f"{tmp_path / 'style.safetensors'}:0.7",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert say("inspect", tmp_path / "hub", "--json").json["adapters"] == {"lora1/style.safetensors": 0.7}

    text = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet", torch_dtype=torch.float32)
    update = torch.from_numpy(0.7 * 2 / 4 * up @ down)
    tokens = random.integers(0, 500, (2, 77))
    sample = random.standard_normal((2, 4, 16, 16)).astype(np.float32)
    timestep = np.array([900, 3], np.float32)
    with torch.no_grad():
        text.encoder.layers[1].mlp.fc1.weight += update
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight += update
        states = text(torch.from_numpy(tokens)).last_hidden_state
        output = unet(torch.from_numpy(sample), torch.from_numpy(timestep), states).sample
    denoise = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states.numpy()}
    for graph, inputs, expected in (("text", {"tokens": tokens}, states), ("denoiser", denoise, output)):
        session = onnxruntime.InferenceSession(
            tmp_path / "hub" / graph / "model.onnx", providers=["CPUExecutionProvider"]
        )
        found = session.run(None, inputs)[0]
        assert np.linalg.norm(found - expected.numpy()) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("options", [["--config", "stable-diffusion-1"], ["--lora", "no.safetensors"]])
def test_a_wrong_choice_is_one_line(say: Say, tiny_sd: Path, tmp_path: Path, options: list[str]) -> None:
    said = say("export", tiny_sd, *options, "-o", tmp_path / "hub")
    assert said.code == 2 and said.err.count("\n") == 1 and not (tmp_path / "hub").exists()


def test_what_is_left_out_of_a_file_is_said(say: Say, tiny_sd: Path, tmp_path: Path) -> None:
    """On stderr of a build and in what it made, and not in the way of JSON; the bundle is proven as any other."""
    extras = {"cond_stage_model.logit_scale": np.ones(3), "model_ema.decay": np.ones(3)}
    save_file(ldm.of_folder(tiny_sd) | extras, tmp_path / "model.safetensors")
    note = (
        "model.safetensors: a StableDiffusionPipeline does not use 2 tensors of its file: "
        "'cond_stage_model.logit_scale', 'model_ema.decay'; left out"
    )
    file, config = tmp_path / "model.safetensors", ("--config", tiny_sd)
    assert say("inspect", file, *config, "--json").json["notes"] == [note]
    said = say("build", file, *config, "--target", "onnxruntime", "-o", tmp_path / "bundle", "--json")
    assert said.code == 0, said.err
    assert f"note: {note}" in said.err.splitlines() and said.json["bundles"][0]["notes"] == [note]
    assert say("inspect", tmp_path / "bundle", "--json").json["notes"] == [note]
    assert "does not use 2 tensors" in (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")
    assert "notes" not in say("inspect", tiny_sd, "--json").json
