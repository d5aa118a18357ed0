"""Checkpoints in one file: every tensor where diffusers has it, nothing guessed, and what is no checkpoint named."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from exporter import checkpoint, handles, hub, single_file, tokenizer, trace
from exporter.ensemble import Origin
from exporter.families import Shape
from exporter.weights import bind, parameter_shapes
from runtimes.errors import DexportError
from runtimes.safetensors import Entry, read_header
from tests.exporter import ldm

KINDS = {
    "stable-diffusion-1": {"text_encoder": lambda t: ldm.clip(t)},
    "stable-diffusion-2": {"text_encoder": lambda t: ldm.open_clip(t, "cond_stage_model.model.")},
    "stable-diffusion-2-base": {"text_encoder": lambda t: ldm.open_clip(t, "cond_stage_model.model.")},
    "stable-diffusion-xl": {
        "text_encoder": lambda t: ldm.clip(t, ldm.XL[0]),
        "text_encoder_2": lambda t: ldm.open_clip(t, ldm.XL[1]),
    },
}


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(DexportError) as caught:
        checkpoint.read(file, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


JUNK = {
    "model_ema.diffusion_modelinput_blocks00weight": np.zeros(3, np.float16),
    "alphas_cumprod": np.ones(1000, np.float32),
    "sqrt_recipm1_alphas_cumprod": np.ones(1000, np.float32),
    "posterior_log_variance_clipped": np.ones(1000, np.float32),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
}


@pytest.fixture
def single(tiny_sd: Path, tmp_path: Path) -> Path:
    """``tiny_sd`` as one file, with what training leaves behind."""
    tensors = ldm.of_folder(tiny_sd) | JUNK
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_a_single_file_is_the_folder(single: Path, tiny_sd: Path, tiny_hub: Path, tmp_path: Path) -> None:
    """Every tensor, and the exported graphs byte for byte."""
    read = same_tensors(single, tiny_sd)
    hub.export(Origin(single, config=tiny_sd), tmp_path / "hub", graphs=["text", "decoder"])
    for graph, end in itertools.product(("text", "decoder"), ("", ".data")):
        path = f"{graph}/model.onnx{end}"
        assert (tmp_path / "hub" / path).read_bytes() == (tiny_hub / path).read_bytes()
    source = {file.path: file.sha256 for file in read.source()}
    assert source["m.safetensors"] == hashlib.sha256(single.read_bytes()).hexdigest()
    assert {"model_index.json", "unet/config.json", "tokenizer/vocab.json"} < set(source)


def same_tensors(single: Path, folder: Path) -> checkpoint.Checkpoint:
    """What was read of a single file, after each of its tensors was compared with the folder's."""
    read, expected = checkpoint.read(single, config=folder), checkpoint.read(folder)
    rename = read.family.rename
    for name, part in expected.components.items():
        theirs = {rename(name, key): entry for key, entry in part.entries.items()}
        ours = {rename(name, key): entry for key, entry in read.components[name].entries.items()}
        assert sorted(ours) == sorted(theirs)
        assert all(np.array_equal(ours[key].load(), entry.load()) for key, entry in theirs.items())
    return read


def test_sdxl_in_a_single_file_is_the_folder(tiny_sdxl: Path, tmp_path: Path) -> None:
    save_file(ldm.of_folder(tiny_sdxl), tmp_path / "xl.safetensors")
    read = same_tensors(tmp_path / "xl.safetensors", tiny_sdxl)
    assert set(read.tokenizers) == {"tokenizer", "tokenizer_2"}


@pytest.fixture(scope="module")
def modules() -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """For each shipped configuration: the shape of every parameter of its modules, which have no values."""

    def shapes(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            if name.startswith("text"):
                kind = getattr(transformers, config["architectures"][0])
                module = kind(transformers.CLIPTextConfig.from_dict(config))
            else:
                module = getattr(diffusers, config["_class_name"]).from_config(config)
        return {key: tuple(value.shape) for key, value in module.named_parameters()}

    return {
        kind: {name: shapes(name, config) for name, config in ldm.configs(single_file.CONFIGS / kind).items()}
        for kind in KINDS
    }


def hollow(kind: str, parts: dict[str, dict[str, tuple[int, ...]]], file: Path) -> Path:
    """A file of a kind's full size under its training code's names, all holes."""
    config = ldm.configs(single_file.CONFIGS / kind)

    def tensors(name: str) -> Iterator[tuple[str, NDArray[Any]]]:
        return ((key, np.broadcast_to(np.float16(0), shape)) for key, shape in parts[name].items())

    named = [ldm.unet(tensors("unet"), config["unet"]), ldm.vae(tensors("vae"), config["vae"])]
    named += [rename(tensors(name)) for name, rename in KINDS[kind].items()]
    return ldm.write_hollow(file, {name: value.shape for name, value in itertools.chain(*named)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_configurations_are_those_of_the_full_models(kind: str, modules: Any, tmp_path: Path) -> None:
    """From a header of full size every parameter of every module and graph gets a tensor of its shape, none is left."""
    file = hollow(kind, modules[kind], tmp_path / "m.safetensors")
    entries = read_header(file)
    if "-2" in kind:  # nothing in the file says which
        with pytest.raises(DexportError, match=r"768 pixels.*or stable-diffusion-2-base"):
            single_file.configuration(file, entries, None)
    else:
        assert single_file.configuration(file, entries, None) == single_file.CONFIGS / kind
    folder = single_file.configuration(file, entries, kind)
    found = single_file.convert(file, entries, ldm.configs(folder))
    assert sorted(found) == sorted(modules[kind])
    for name, shapes in modules[kind].items():
        plain = {key.removeprefix("text_model."): value.shape for key, value in found[name].items()}
        assert plain == {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    read = checkpoint.read(file, config=kind, check=False)
    size = Shape(*read.family.default_shape(read), free=False)
    for spec in read.family.specs(read, size).values():
        wanted = parameter_shapes(trace.build(spec))
        assert {name: entry.shape for name, entry in bind(read, wanted).items()} == wanted


@pytest.mark.parametrize(
    ("kind", "base", "pipeline"),
    [
        ("stable-diffusion-1-inpainting", "stable-diffusion-1", "StableDiffusionInpaintPipeline"),
        ("stable-diffusion-2-inpainting", "stable-diffusion-2-base", "StableDiffusionInpaintPipeline"),
        ("stable-diffusion-xl-inpainting", "stable-diffusion-xl", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_inpainting_models_have_five_channels_more(
    kind: str, base: str, pipeline: str, modules: Any, tmp_path: Path
) -> None:
    """Of what goes into the UNet; all else is the model's that they are made of."""
    shapes = modules[base] | {"unet": modules[base]["unet"] | {"conv_in.weight": (320, 9, 3, 3)}}
    file = hollow(base, shapes, tmp_path / "m.safetensors")
    assert single_file.configuration(file, read_header(file), None) == single_file.CONFIGS / kind
    own, theirs = (ldm.configs(single_file.CONFIGS / name) for name in (kind, base))
    assert own == theirs | {"unet": theirs["unet"] | {"in_channels": 9}}
    read = checkpoint.read(file, check=False)
    assert read.pipeline == pipeline and read.scheduler["prediction_type"] == "epsilon"
    denoiser = read.family.specs(read, Shape(512, 512, free=False))["denoiser"]
    assert [tensor.shape[1] for tensor in denoiser.inputs[:3]] == [4, 1, 4]


def test_sizes_are_those_that_are_published(modules: Any) -> None:
    """Millions of parameters, as the models' papers and cards have them."""
    sizes = {
        kind: {name: sum(np.prod(shape, dtype=object) for shape in shapes.values()) for name, shapes in parts.items()}
        for kind, parts in modules.items()
    }
    one, two, xl = (sizes[f"stable-diffusion-{name}"] for name in ("1", "2", "xl"))
    assert (one["unet"], one["text_encoder"], one["vae"]) == (859_520_964, 123_060_480, 83_653_863)
    assert (two["unet"], xl["unet"], xl["text_encoder_2"]) == (865_910_724, 2_567_463_684, 694_659_840)


def test_open_clip_is_cut_and_turned(tmp_path: Path) -> None:
    """Queries, keys and values from one matrix; a projection that is stored the other way round."""
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
        "projection_dim": 32, "max_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    module = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    for value in module.parameters():
        torch.nn.init.normal_(value)
    tensors = {name: value.detach().numpy() for name, value in module.named_parameters()}
    file = tmp_path / "m.safetensors"
    save_file({name: np.ascontiguousarray(v) for name, v in ldm.open_clip(tensors.items(), ldm.XL[1])}, file)
    found = single_file.convert(file, read_header(file), {"text_encoder_2": config})["text_encoder_2"]
    assert sorted(found) == sorted(tensors)
    assert all(np.array_equal(found[name].load(), value) for name, value in tensors.items())
    assert found["text_projection.weight"].size == 32 * 32 * 4 and found["text_projection.weight"].finite()


def test_a_converter_may_cut_and_turn_but_not_compute(tmp_path: Path) -> None:
    value = np.arange(48, dtype=np.float16).reshape(12, 4)
    save_file({"w": value}, tmp_path / "w.safetensors")
    handle = handles.handle(read_header(tmp_path / "w.safetensors")["w"])
    for cut in (
        lambda w: w.chunk(3)[1],
        lambda w: w[4:, 1:3].T.contiguous(),
        lambda w: w.reshape(3, 16)[:, 2:5].clone(),
    ):
        assert np.array_equal(handles.stored(cut(handle)).load(), cut(torch.from_numpy(value)).numpy())
    assert isinstance(handles.stored(handle[6:]), Entry)

    def swap(w: Any) -> Any:
        return torch.cat([w[8:] * torch.tensor(1.0), torch.cat([w[:2]]), w[2:8]])

    assert np.array_equal(handles.stored(swap(handle)).load(), swap(torch.from_numpy(value)).numpy())
    assert (handle[:3] == 0).equal(torch.from_numpy(value[:3]) == 0)
    for compute in (lambda w: w + 1, lambda w: torch.cat([w, w], 1), lambda w: swap(w)[:2], lambda w: w * 2):
        with pytest.raises(RuntimeError, match="may only cut and turn"):
            compute(handle)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA or another adapter; give it beside"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA or another adapter"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "an autoencoder (VAE) alone"),
        (["first_stage_model.encoder.conv_in.weight"], "an autoencoder (VAE) alone"),
        (["down_blocks.0.resnets.0.norm1.weight"], "one component of a diffusers folder"),
        (["control_model.time_embed.0.weight"], "a ControlNet in one file"),
        (["image_proj.proj.weight"], "an IP-Adapter; give it beside"),
        (["emb_params"], "a textual-inversion embedding"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "of the kind 'flux-"),
        (["layer1.weight"], "not a Stable Diffusion checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told_what_it_is(tmp_path: Path, names: list[str], words: str) -> None:
    file = ldm.write_hollow(tmp_path / "m.safetensors", dict.fromkeys(names, (4, 4)))
    assert words in refusal(file)


def test_wrong_files(single: Path, tiny_sd: Path, tmp_path: Path) -> None:
    whole = load_file(single)
    write = lambda tensors: save_file(tensors, single)  # noqa: E731
    write(whole | {"model.diffusion_model.ghost.weight": np.zeros(3), "another": np.zeros(2)})
    assert "takes 'another', 'model.diffusion_model.ghost.weight'" in refusal(single, config=tiny_sd)
    write({name: value for name, value in whole.items() if not name.startswith("cond_stage_model")})
    assert "holds no text_encoder" in refusal(single, config=tiny_sd)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    write(whole | {first: np.full_like(whole[first], np.nan)})
    assert f"tensor '{first}' holds NaN" in refusal(single, config=tiny_sd)
    assert "no name of a configuration; there are stable-diffusion-1" in refusal(single, config="stable-diffusion-9")
    assert "is for a single .safetensors file" in refusal(tiny_sd, config="stable-diffusion-1")


def test_a_file_may_say_how_it_was_trained(single: Path, tiny_sd: Path) -> None:
    save_file(load_file(single) | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}, single)
    scheduler = checkpoint.read(single, config=tiny_sd).scheduler
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize(("kind", "pad"), [("stable-diffusion-1", 49407), ("stable-diffusion-2", 0)])
def test_clips_vocabulary(kind: str, pad: int, tmp_path: Path) -> None:
    """Ids as OpenAI's CLIP gives them."""
    folder = single_file.CONFIGS / kind / "tokenizer"
    read = tokenizer.read(folder, "CLIPTokenizer")
    assert (read.pad, read.side, read.limit) == (pad, "right", 77)
    tokenizer.write(read, tmp_path / "t.json")
    made = Tokenizer.from_file(str(tmp_path / "t.json"))
    assert made.get_vocab_size() == 49408
    assert made.encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert made.encode("A diagram").ids == [49406, 320, 22697, 49407]


EXTRAS = (
    "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.transformer.logit_scale", "cond_stage_model.clip_l.logit_scale",
    "cond_stage_model.clip_l.transformer.text_projection.weight", "cond_stage_model.text_projection",
    "cond_stage_model.transformer.vision_model.post_layernorm.weight",
    "cond_stage_model.transformer.visual_projection.weight", "model_ema.decay", "embedding_manager.embedder.weight",
    "first_stage_model.quantize.embedding.weight", "first_stage_model.loss.logvar", "denoiser.sigmas",
    "denoiser.log_sigmas", "model_sampling.sigmas",
)  # fmt: skip
EXTRAS_XL = (
    "conditioner.embedders.0.logit_scale", "conditioner.embedders.0.transformer.text_projection.weight",
    "conditioner.embedders.0.text_projection", "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.0.transformer.vision_model.post_layernorm.weight",
    "conditioner.embedders.1.model.visual.proj",
)  # fmt: skip


@pytest.mark.parametrize("xl", [False, True])
def test_what_others_save_beside_a_checkpoint_is_left_out_and_said(
    single: Path, tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path, xl: bool
) -> None:
    """The other half of CLIP, as ComfyUI has it, and what training left; the rest is as without them."""
    folder, extras = (tiny_sdxl, EXTRAS_XL) if xl else (tiny_sd, EXTRAS)
    file = tmp_path / "merged.safetensors"
    plain = ldm.of_folder(folder)
    save_file(plain, file)
    before = checkpoint.read(file, config=folder)
    assert not before.notes
    save_file(plain | {name: np.zeros((3, 4), np.float16) for name in extras}, file)
    found = checkpoint.read(file, config=folder)
    (note,) = found.notes
    assert note.startswith(f"merged.safetensors: a {found.pipeline} does not use {len(extras)} tensors of its file: ")
    assert sorted(found.unused) == sorted(extras)
    for name, part in before.components.items():
        assert found.components[name].entries.keys() == part.entries.keys() and not found.components[name].unused
    save_file(plain | {"model.ghost.weight": np.zeros(3)}, file)
    assert "no part of a Stable Diffusion takes 'model.ghost.weight'" in refusal(file, config=folder)


def test_a_single_file_in_fp8_is_called_so(single: Path, tiny_sd: Path) -> None:
    narrow = {name: torch.from_numpy(value).to(torch.float8_e4m3fn) for name, value in load_file(single).items()}
    safetensors.torch.save_file(narrow, single)
    assert "is stored in fp8 (F8_E4M3); save the model in fp16 or bf16" in refusal(single, config=tiny_sd)
