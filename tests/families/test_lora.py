"""LoRA of transformers, in the names that each family's is shared in, against the closed form on every weight.

What a name stands for is asked of diffusers, on tensors with values: of its converters of LoRA and of checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from exporter import checkpoint, lora
from runtimes.errors import DexportError

SCALE, RANK, ALPHA = 0.7, 3, 2.0
FAMILIES = ("flux", "sd_3", "qwen_image", "z_image", "pixart_alpha", "sana", "aura_flow", "lumina2")
Tensors = dict[str, torch.Tensor]
Saved = Callable[[str], Path]
# What a file calls the two factors and the alpha of a transformer's module; "_" for its dots, where it has none.
FORMS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", ""),
    "diffusers with its settings": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", ""),
    "diffusers with alphas": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha"),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", ""),
    "PEFT": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", ""),
    "kohya's factors": (
        "transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight", "transformer.{}.alpha"
    ),
    "bare": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),  # as Qwen-Image-Lightning
    "OneTrainer": (
        "lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight", "lora_transformer_{_}.alpha"
    ),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight", "lora_unet_{_}.alpha"),
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "diffusion_model.{}.alpha"),
}  # fmt: skip
# Without diffusers' prefix, names are those of a model's first code, which in these families are others.
OTHERS = {"flux": ("bare", "kohya", "ComfyUI"), "sd_3": (), "lumina2": ("ComfyUI",)}


def factors(shape: tuple[int, ...], rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, *shape[1:]) / 4, torch.randn(shape[0], rank, *[1] * (len(shape) - 2))


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def weights(read: checkpoint.Checkpoint, component: str = "transformer") -> Tensors:
    """Every weight by today's name, as an export reads it."""
    entries = read.components[component].entries
    named = {read.family.rename(component, key): torch.from_numpy(entry.load()) for key, entry in entries.items()}
    return {str(name): value.float() for name, value in named.items() if name is not None}


def check(folder: Path, file: Path, added: Mapping[str, torch.Tensor], component: str = "transformer") -> None:
    """That a file adds this at scale 1 to a component's weights, and nothing else."""
    plain = weights(checkpoint.read(folder), component)
    merged = weights(checkpoint.read(folder, loras=[f"{file}:{SCALE}"]), component)
    assert set(added) <= set(plain) == set(merged)
    for name, weight in plain.items():
        expected = weight + SCALE * added[name] if name in added else weight
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6 if name in added else 0)


@pytest.mark.parametrize(
    ("family", "form"), [(name, form) for name in FAMILIES for form in FORMS if form not in OTHERS.get(name, ())]
)
def test_every_layer_of_every_family(family: str, form: str, saved: Saved, tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = weights(checkpoint.read(saved(family)))
    tensors, added = {}, {}
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if weight.ndim < 2 or module == name:
            continue
        down, up = factors(tuple(weight.shape))
        names = [text.replace("{_}", module.replace(".", "_")).format(module) for text in FORMS[form]]
        tensors |= dict(zip(names, (down, up, torch.tensor(ALPHA)), strict=True))
        added[name] = product(down, up) * (ALPHA / RANK if names[2] or "settings" in form else 1)
    tensors.pop("", None)
    settings = {"transformer.lora_alpha": ALPHA, "transformer.r": RANK} if "settings" in form else {}
    save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    assert len(added) >= 10
    check(saved(family), tmp_path / "style.safetensors", added)


FLUX = {
    "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn", "to_q to_k to_v"),
    "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn", "add_q_proj add_k_proj add_v_proj"),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn", "to_out.0"),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn", "to_add_out"),
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net", "0.proj"),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net", "2"),
    "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1", "linear"),
    "single_blocks.0.linear2": ("single_transformer_blocks", "0.proj_out"),
    "single_blocks.0.modulation.lin": ("single_transformer_blocks", "0.norm.linear"),
    "img_in": ("", "x_embedder"),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder", "linear_1"),
    "final_layer.linear": ("", "proj_out"),
    "final_layer.adaLN_modulation.1": ("norm_out", "linear"),
}
FLUX_FORMS = {
    "kohya": lambda name, side: f"lora_unet_{name.replace('.', '_')}.lora_{side}.weight",
    "ComfyUI": lambda name, side: f"diffusion_model.{name}.lora_{side}.weight",
    "PEFT": lambda name, side: f"base_model.model.{name}.lora_{'A' if side == 'down' else 'B'}.weight",
}


@pytest.mark.parametrize("form", FLUX_FORMS)
@pytest.mark.parametrize("block_diagonal", [False, True], ids=["", "block-diagonal"])
def test_names_of_flux_itself(form: str, block_diagonal: bool, saved: Saved, tmp_path: Path) -> None:
    """Fused queries, keys and values among them, also where each has a third of the ranks to itself."""
    torch.manual_seed(8)
    plain = weights(checkpoint.read(saved("flux")))
    tensors: Tensors = {}
    added: Tensors = {}
    for name, (level, ends) in FLUX.items():
        targets = [f"{level}.{end}.weight".removeprefix(".") for end in ends.split()]
        rows, columns = plain[targets[0]].shape
        down, up = factors((rows * len(targets), columns))
        if block_diagonal and len(targets) == RANK:
            up = torch.block_diag(*(up[i * rows : (i + 1) * rows, :1] for i in range(RANK)))
        tensors |= {FLUX_FORMS[form](name, side): value for side, value in (("down", down), ("up", up))}
        tensors[FLUX_FORMS[form](name, "").partition(".lora_.")[0].partition(".lora_")[0] + ".alpha"] = torch.tensor(
            ALPHA
        )
        parts = list((product(down, up) * ALPHA / RANK).chunk(len(targets)))
        if "adaLN" in name:  # there the shift comes first
            parts = [parts[0].roll(rows // 2, 0)]
        added |= dict(zip(targets, parts, strict=True))
    save_file(tensors, tmp_path / "style.safetensors")
    check(saved("flux"), tmp_path / "style.safetensors", added)


def full_size(kind: str) -> Tensors:
    """A LoRA of one or two layers of the real widths, which diffusers' converters count on."""
    torch.manual_seed(9)
    if kind == "kohya's single block of Flux":
        shapes = {"lora_unet_single_blocks_3_linear1": (21504, 3072)}
        names = ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
    elif kind == "xlabs":
        shapes = {f"double_blocks.2.processor.qkv_lora{i}": (9216, 3072) for i in (1, 2)}
        shapes |= {f"double_blocks.2.processor.proj_lora{i}": (3072, 3072) for i in (1, 2)}
        shapes |= {
            "single_blocks.1.processor.qkv_lora": (9216, 3072),
            "single_blocks.1.processor.proj_lora": (3072, 15360),
        }
        names = ("{}.down.weight", "{}.up.weight", "")
    else:
        layer = {
            "attention.qkv": (3840, 2304), "attention.out": (2304, 2304), "adaLN_modulation.1": (9216, 1024),
            "feed_forward.w1": (9216, 2304), "feed_forward.w2": (2304, 9216), "feed_forward.w3": (9216, 2304),
        }  # fmt: skip
        shapes = {f"diffusion_model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
        names = ("{}.lora_A.weight", "{}.lora_B.weight", "")
    tensors: Tensors = {}
    for module, shape in shapes.items():
        tensors |= {n.format(module): v for n, v in zip(names, (*factors(shape, 4), torch.tensor(ALPHA)), strict=True)}
    tensors.pop("", None)
    return tensors


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [("flux", "kohya's single block of Flux", 4), ("flux", "xlabs", 12), ("lumina2", "Lumina's own", 16)],
)
def test_what_only_fits_the_real_widths(family: str, kind: str, count: int, saved: Saved, tmp_path: Path) -> None:
    tensors, read = full_size(kind), checkpoint.read(saved(family))
    save_file(tensors, tmp_path / "style.safetensors")
    named = getattr(diffusers, read.pipeline).lora_state_dict(dict(tensors))
    found = lora._read(tmp_path / "style.safetensors", read)
    assert {f"{name}.lora_{side}.weight" for name in found for side in "AB"} == set(named) and len(found) == count
    for name, update in found.items():
        down, up = (torch.from_numpy(np.array(factor.load())) for factor in (update.down, update.up))
        vector = torch.randn(down.shape[1])
        expected = named[f"{name}.lora_B.weight"] @ (named[f"{name}.lora_A.weight"] @ vector)
        torch.testing.assert_close(update.scale * (up @ (down @ vector)), expected, rtol=1e-5, atol=1e-4)


def stability(width: int = 16, layers: int = 2) -> Tensors:
    """A tiny SD 3 in the names of its first code, attention twice in the first block."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 144, width), "x_embedder.proj": (width, 4, 2, 2)}
    shapes |= {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "context_embedder": (width, 48)}
    shapes |= {"y_embedder.mlp.0": (width, 24), "y_embedder.mlp.2": (width, width), "final_layer.linear": (16, width)}
    shapes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for layer in range(layers):
        for part in ("x_block", "context_block"):
            last, name = part == "context_block" and layer == layers - 1, f"joint_blocks.{layer}.{part}"
            twice = part == "x_block" and layer == 0
            shapes[f"{name}.adaLN_modulation.1"] = ((2 if last else 9 if twice else 6) * width, width)
            for attention in ("attn", "attn2") if twice else ("attn",):
                shapes |= {f"{name}.{attention}.qkv": (3 * width, width), f"{name}.{attention}.ln_q": (8,)}
                shapes |= {f"{name}.{attention}.proj": (width, width), f"{name}.{attention}.ln_k": (8,)}
            shapes |= {f"{name}.mlp.fc1": (4 * width, width), f"{name}.mlp.fc2": (width, 4 * width)}
    return {name if name == "pos_embed" else f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", ["kohya", "ComfyUI"])
def test_names_of_stable_diffusion_3_itself(form: str, saved: Saved, tmp_path: Path) -> None:
    """A converter of diffusers for whole checkpoints says what the sum in the first code's names is in its own."""
    torch.manual_seed(10)
    before = stability()
    unused = ("ln_q", "ln_k", "pos_embed", "1.context_block.attn.proj", "1.context_block.mlp")
    tensors, after = {}, dict(before)
    for name, weight in before.items():
        if any(part in name for part in unused):
            continue
        module = name.removesuffix(".weight")
        down, up = factors(tuple(weight.shape))
        after[name] = weight + ALPHA / RANK * product(down, up)
        own = f"diffusion_model.{module}" if form == "ComfyUI" else f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up, f"{own}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, tmp_path / "style.safetensors")
    converted = []
    for state in (before, after):
        biases = {name.replace("weight", "bias"): torch.zeros(len(value)) for name, value in state.items()}
        converted.append(convert_sd3_transformer_checkpoint_to_diffusers(biases | state))
    changes = {name: converted[1][name] - value for name, value in converted[0].items()}
    added = {name: change for name, change in changes.items() if change.any()}
    assert len(added) > len(tensors) // 3
    plain, merged = (
        weights(checkpoint.read(saved("sd_3"), loras=files)) for files in ([], [tmp_path / "style.safetensors"])
    )
    for name, weight in plain.items():
        torch.testing.assert_close(merged[name], weight + added.pop(name, 0), rtol=1e-5, atol=1e-5)
    assert not added


CLIP, CLIP_FLAT = "encoder.layers.0.self_attn.q_proj", "encoder_layers_0_self_attn_q_proj"
T5, T5_FLAT = "encoder.block.0.layer.0.SelfAttention.q", "encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize(
    ("family", "component", "name"),
    [
        ("flux", "text_encoder", f"lora_te1_text_model_{CLIP_FLAT}"),
        ("flux", "text_encoder", f"text_encoders.clip_l.transformer.text_model.{CLIP}"),
        ("flux", "text_encoder", f"text_encoder.text_model.{CLIP}"),
        ("flux", "text_encoder_2", f"lora_te2_{T5_FLAT}"),
        ("flux", "text_encoder_2", f"lora_te3_{T5_FLAT}"),
        ("sd_3", "text_encoder", f"lora_te1_text_model_{CLIP_FLAT}"),
        ("sd_3", "text_encoder_2", f"lora_te2_text_model_{CLIP_FLAT}"),
        ("sd_3", "text_encoder_2", f"text_encoders.clip_g.transformer.text_model.{CLIP}"),
        ("sd_3", "text_encoder_2", f"text_encoder_2.text_model.{CLIP}"),
        ("sd_3", "text_encoder_3", f"lora_te3_{T5_FLAT}"),
        ("sd_3", "text_encoder_3", f"text_encoders.t5xxl.transformer.{T5}"),
        ("sd_3", "text_encoder_3", f"text_encoder_3.{T5}"),
    ],
)
def test_text_encoders(family: str, component: str, name: str, saved: Saved, tmp_path: Path) -> None:
    """Beside a layer of the transformer, in kohya's names and the others."""
    torch.manual_seed(11)
    plain, end = checkpoint.read(saved(family)), T5 if "SelfAttention" in name else CLIP
    (target,) = (key for key in weights(plain, component) if key.endswith(f"{end}.weight"))
    down, up = factors(tuple(weights(plain, component)[target].shape))
    beside = factors(tuple(weights(plain)["proj_out.weight"].shape))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    tensors |= {f"transformer.proj_out.lora_{side}.weight": value for side, value in zip("AB", beside, strict=True)}
    save_file(tensors, tmp_path / "style.safetensors")
    check(saved(family), tmp_path / "style.safetensors", {target: ALPHA / RANK * product(down, up)}, component)
    check(saved(family), tmp_path / "style.safetensors", {"proj_out.weight": product(*beside)})


def pair(module: str, down: tuple[int, ...], up: tuple[int, ...], sides: str = "lora_A lora_B") -> dict[str, Any]:
    return {f"{module}.{side}.weight": shape for side, shape in zip(sides.split(), (down, up), strict=True)}


KOHYA = "lora_down lora_up"
PLAIN = pair("transformer.proj_out", (3, 32), (16, 3))
OF_SD = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_SD = pair(f"lora_unet_{OF_SD.replace('.', '_')}", (3, 8), (8, 3), KOHYA)


@pytest.mark.parametrize(
    ("family", "tensors", "words"),
    [
        ("flux", KOHYA_SD, "or one for another model than a FluxPipeline"),
        ("flux", pair(f"unet.{OF_SD}", (3, 8), (8, 3)), f"no weight for 'unet.{OF_SD}'"),
        ("sd_3", KOHYA_SD, "no weight for 'transformer.down_blocks_0_attentions_0"),
        ("qwen_image", KOHYA_SD, "it is a LoRA for another model"),
        ("sd_3", pair("transformer.single_transformer_blocks.0.proj_mlp", (3, 8), (8, 3)), "for another model"),
        ("flux", PLAIN | {"transformer.proj_out.lora_B.bias": (16,)}, "proj_out.lora_B.bias' belongs to no LoRA"),
        (
            "flux",
            PLAIN | {"transformer.transformer_blocks.0.attn.norm_q.weight": (16,)},
            "norm_q.weight' belongs to no",
        ),
        (
            "flux",
            pair("img_in", (3, 16), (32, 3)) | {"double_blocks.0.img_attn.norm.query_norm.scale": (16,)},
            "query_norm.scale' belongs to no LoRA",
        ),
        (
            "flux",
            pair("lora_unet_img_in", (3, 16), (32, 3), KOHYA) | {"lora_unet_img_in.diff_b": (32,)},
            "'lora_unet_img_in.diff_b' belongs to no LoRA",
        ),
        ("flux", pair("transformer.x_embedder", (3, 32), (32, 3)), "'x_embedder.weight' is [32, 16]"),
        ("flux", PLAIN | {"transformer.proj_out.alpha": (2,)}, "'transformer.proj_out.alpha' is no number beside"),
        ("flux", PLAIN | {"transformer.x_embedder.alpha": ()}, "'transformer.x_embedder.alpha' is no number beside"),
        ("sana", {"lora_unet_no.lokr_w1": (3, 3)}, "is of LoKr"),
    ],
)
def test_what_does_not_fit(family: str, tensors: dict[str, Any], words: str, saved: Saved, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(DexportError) as caught:
        checkpoint.read(saved(family), loras=[file])
    said = str(caught.value)
    assert words in said and "style.safetensors" in said and "\n" not in said and len(said) < 400 + len(str(file))


def test_zeros_have_nothing_to_add(saved: Saved, tmp_path: Path) -> None:
    """What a converter leaves out need have no use where it is zero, as trainers write what they did not train."""
    torch.manual_seed(13)
    down, up = factors((32, 16))
    tensors = {"lora_unet_img_in.lora_down.weight": down, "lora_unet_img_in.lora_up.weight": up}
    save_file(tensors | {"lora_unet_img_in.diff_b": torch.zeros(32)}, tmp_path / "style.safetensors")
    check(saved("flux"), tmp_path / "style.safetensors", {"x_embedder.weight": product(down, up)})
