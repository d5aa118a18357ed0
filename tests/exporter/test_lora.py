"""LoRA merged at export, in every spelling, against W + scale · alpha / rank · up · down on the modules themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from exporter import checkpoint, reference
from exporter.lora import Lora
from runtimes.errors import DexportError
from tests.exporter import ldm

SCALE, RANK, ALPHA = 0.7, 3, 2.0
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = {
    "unet": [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"],
}
REST = {
    "unet": [
        "mid_block.attentions.0.proj_in", "up_blocks.1.attentions.0.proj_out",
        "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "conv_in", "down_blocks.1.resnets.0.conv1", "mid_block.resnets.1.conv2", "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut", "up_blocks.0.resnets.0.time_emb_proj", "time_embedding.linear_2",
    ],
    "text_encoder": ["encoder.layers.1.mlp.fc1"],
}  # fmt: skip
OLD = {
    "q_proj": "to_q_lora", "out_proj": "to_out_lora", "to_q": "to_q_lora", "to_v": "to_v_lora",
    "to_out.0": "to_out_lora",
}  # fmt: skip


def kohya(component: str, module: str) -> tuple[str, str, str]:
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    name = prefix + module.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(component: str, module: str) -> tuple[str, str, str]:
    name = f"{component}.{'text_model.' * (component != 'unet')}{module}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", ""


def diffusers_(component: str, module: str) -> tuple[str, str, str]:
    name = f"unet.{module}.lora" if component == "unet" else f"text_encoder.text_model.{module}.lora_linear_layer"
    return f"{name}.down.weight", f"{name}.up.weight", ""


def attention_processors(component: str, module: str) -> tuple[str, str, str]:
    """diffusers' first form, of attention alone."""
    where, layer = module.rsplit(".to_out.0", 1)[0], "to_out.0"
    if not module.endswith(layer):
        where, _, layer = module.rpartition(".")
    processor = f"{where}.processor" if component == "unet" else f"text_model.{where}"
    name = f"{component}.{processor}.{OLD[layer]}"
    return f"{name}.down.weight", f"{name}.up.weight", ""


def kohya_xl(component: str, module: str) -> tuple[str, str, str]:
    """kohya's form for SDXL: the UNet's names are its training code's, "lora_te1_" is the first text encoder."""
    config = {"layers_per_block": 1, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    name = "lora_te1_text_model_" + module.replace(".", "_")
    if component == "unet":
        own = ldm.unet_name(f"{module}.weight", config).removesuffix(".weight")
        name = "lora_unet_" + own.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


FORMS = {
    "kohya": (kohya, [ATTENTION, REST], ALPHA / RANK),
    "kohya for SDXL": (kohya_xl, [ATTENTION, REST], ALPHA / RANK),
    "PEFT": (peft, [ATTENTION, REST], 1.0),
    "PEFT with its settings": (peft, [ATTENTION, REST], ALPHA / RANK),
    "diffusers": (diffusers_, [ATTENTION, REST], 1.0),
    "attention processors": (attention_processors, [ATTENTION], 1.0),
}


@pytest.fixture(scope="module")
def modules(tiny_sd: Path) -> dict[str, torch.nn.Module]:
    """The text encoder and the UNet in fp32, as diffusers and transformers load them."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd / "unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd / "text_encoder", torch_dtype=torch.float32),
    }


def factors(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    down = torch.randn(RANK, *shape[1:]) / 4
    return down, torch.randn(shape[0], RANK, *[1] * (len(shape) - 2))


def write(file: Path, form: str, modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Write a LoRA with random factors; return what it adds, at scale 1, to each weight."""
    name_of, groups, scaling = FORMS[form]
    torch.manual_seed(7)
    tensors, added = {}, {}
    for component, module in [(c, m) for group in groups for c, names in group.items() for m in names]:
        down, up = factors(modules[component].get_submodule(module).weight.shape)
        names = name_of(component, module)
        tensors |= dict(zip(names[:2], (down, up), strict=True))
        if names[2]:
            tensors[names[2]] = torch.tensor(ALPHA)
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        added[f"{component}.{module}.weight"] = scaling * product
    settings = {f"{c}.{key}": value for c in modules for key, value in (("lora_alpha", ALPHA), ("r", RANK))}
    own = {"lora_adapter_metadata": json.dumps(settings)} if "settings" in form else {}
    save_file(tensors, file, metadata={"format": "pt", **own})
    return added


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_the_closed_form(form: str, tiny_sd: Path, tmp_path: Path, modules: Any) -> None:
    file = tmp_path / "style.safetensors"
    added = write(file, form, modules)
    assert len(added) >= 5
    read = checkpoint.read(tiny_sd, loras=[f"{file}:{SCALE}"])
    assert [(adapter.path, adapter.scale) for adapter in read.adapters] == [("lora1/style.safetensors", SCALE)]
    assert "lora1/style.safetensors" in {item.path for item in read.source()}
    for component, module in modules.items():
        part = read.components[component].entries
        entries = {read.family.rename(component, key): entry for key, entry in part.items()}
        for name, weight in module.state_dict().items():
            if name.endswith("position_ids"):
                continue
            update = added.pop(f"{component}.{name}", None)
            expected = weight if update is None else weight + SCALE * update
            loaded = torch.from_numpy(entries[name].load()).float()
            torch.testing.assert_close(loaded, expected, rtol=1e-6, atol=1e-6 if update is not None else 0)
    assert not added


DORA = {
    "kohya": ("kohya", "dora_scale", lambda rows: (rows, 1)),
    "PEFT": ("PEFT", "lora_magnitude_vector", lambda rows: (rows,)),
    "PEFT for convolutions": ("PEFT", "lora_magnitude_vector.weight", lambda rows: (1, rows, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("form", DORA)
def test_dora_is_the_closed_form(form: str, tiny_sd: Path, tmp_path: Path, modules: Any) -> None:
    """m (W + s·B·A) / ‖W + s·B·A‖, the norm over all axes but the first: Liu et al. (2024), equation 5."""
    plain, word, shape = DORA[form]
    name_of, groups, _ = FORMS[plain]
    file = tmp_path / "style.safetensors"
    added = write(file, plain, modules)
    tensors, expected = load_file(file), {}
    for component, module in [(c, m) for group in groups for c, names in group.items() for m in names]:
        weight = modules[component].get_submodule(module).weight
        lengths = torch.rand(len(weight)) + 0.5
        stem = name_of(component, module)[0].removesuffix(".weight").rpartition(".")[0]
        tensors[f"{stem}.{word}"] = lengths.reshape(shape(len(lengths)))
        total = weight.detach() + SCALE * added[f"{component}.{module}.weight"]
        norm = total.flatten(1).norm(dim=1)
        expected[component, f"{module}.weight"] = total * (lengths / norm).reshape(-1, *[1] * (total.ndim - 1))
    save_file(tensors, file)
    read = checkpoint.read(tiny_sd, loras=[f"{file}:{SCALE}"])
    for (component, name), weight in expected.items():
        entries = {read.family.rename(component, key): one for key, one in read.components[component].entries.items()}
        torch.testing.assert_close(torch.from_numpy(entries[name].load()), weight, rtol=1e-5, atol=1e-6)


XL = {
    "kohya": ("lora_te{}_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight", ("down", "up"), (1, 2)),
    "PEFT": (
        "text_encoder{}.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight", ("A", "B"), ("", "_2")
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", XL)
def test_both_text_encoders_of_sdxl(form: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    pattern, sides, names = XL[form]
    plain, tensors, added = checkpoint.read(tiny_sdxl), {}, {}
    torch.manual_seed(7)
    for component, name in zip(("text_encoder", "text_encoder_2"), names, strict=True):
        weight = {plain.family.rename(component, key): key for key in plain.components[component].entries}
        end = "encoder.layers.0.self_attn.q_proj.weight"
        (key,) = (key for renamed, key in weight.items() if str(renamed).endswith(end))
        down, up = factors(torch.Size(plain.components[component].entries[key].shape))
        tensors |= {pattern.format(name, side): value for side, value in zip(sides, (down, up), strict=True)}
        added[component, key] = up @ down
    save_file(tensors, tmp_path / "style.safetensors")
    read = checkpoint.read(tiny_sdxl, loras=[f"{tmp_path / 'style.safetensors'}:{SCALE}"])
    for (component, key), update in added.items():
        before, after = (
            torch.from_numpy(one.components[component].entries[key].load()).float() for one in (plain, read)
        )
        torch.testing.assert_close(after, before + SCALE * update, rtol=1e-6, atol=1e-6)


def test_the_reference_is_merged_and_adapters_add_up(tiny_sd: Path, tmp_path: Path, modules: Any) -> None:
    """Two files, the second taken away: the torch model that the gate compares with has both."""
    added = [write(tmp_path / f"{i}.safetensors", form, modules) for i, form in enumerate(("kohya", "diffusers"))]
    read = checkpoint.read(tiny_sd, loras=[tmp_path / "0.safetensors", f"{tmp_path / '1.safetensors'}:-0.5"])
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet", torch_dtype=torch.float32)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([900.0, 3.0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        plain = unet(*inputs).sample
        for name, weight in unet.named_parameters():
            for scale, updates in zip((1.0, -0.5), added, strict=True):
                weight += scale * updates.get(f"unet.{name}", torch.zeros(()))
        expected, found = unet(*inputs).sample, reference.load(read, "denoiser")(*inputs)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (plain - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_no.lora_down.weight": (3, 8), "lora_unet_no.lora_up.weight": (8, 3)}, "no weight for 'unet.no'"),
        ({"unet.conv_in.lora_A.weight": (3, 8), "unet.conv_in.lora_B.weight": (8, 3)}, "'conv_in.weight' is [32, 4, "),
        ({"unet.conv_in.lora_A.weight": (3, 4, 3, 3)}, "'unet.conv_in' has only one of its two factors"),
        ({"lora_unet_conv_in.hada_w1_a": (3, 4)}, "is of LoHa; only LoRA"),
        ({"lora_unet_conv_in.dora_scale": (3,)}, "'lora_unet_conv_in.dora_scale' stands beside no factors"),
        ({"unet.conv_in.lora_A.weight": (3, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 3, 1, 1),
          "unet.conv_in.dora_scale": (1, 4, 1, 1)}, "is [1, 4, 1, 1], where the weight has 32 rows; of DoRA, only"),
        ({"lora_unet_conv_in.lora_down.weight": (3, 4)}, "not a LoRA that can be read"),
        ({"unet.conv_in.diff_b": (3,)}, "'unet.conv_in.diff_b' belongs to no LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (3, 4)}, "belongs to no LoRA"),
        ({}, "it holds no LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tiny_sd: Path, tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    file = tmp_path / "style.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(DexportError) as caught:
        checkpoint.read(tiny_sd, loras=[file])
    assert words in str(caught.value) and "style.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_nan_and_no_file(tiny_sd: Path, tmp_path: Path, modules: Any) -> None:
    names = peft("unet", "conv_in")
    tensors = {names[0]: torch.full((3, 4, 3, 3), torch.nan), names[1]: torch.ones(32, 3, 1, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DexportError, match="holds NaN"):
        checkpoint.read(tiny_sd, loras=[tmp_path / "a.safetensors"])
    with pytest.raises(DexportError, match=r"b.safetensors: no such file"):
        checkpoint.read(tiny_sd, loras=[f"{tmp_path / 'b.safetensors'}:0.5"])


def test_a_scale_follows_the_file(tmp_path: Path) -> None:
    parse: Callable[[str], Lora] = Lora.parse
    assert parse("a.safetensors") == Lora(Path("a.safetensors"), 1.0)
    assert parse("x/a.safetensors:-0.25") == Lora(Path("x/a.safetensors"), -0.25)
    assert parse("C:/a.safetensors") == Lora(Path("C:/a.safetensors"), 1.0)
    for wrong in ("a.safetensors:nan", "a.safetensors:1e9"):
        with pytest.raises(DexportError, match="a number up to 100"):
            parse(wrong)
