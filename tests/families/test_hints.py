"""ControlNet, T2I-Adapter and IP-Adapter: a bundle draws what diffusers' own pipelines draw from the same noise.

One build for Stable Diffusion has all of them and a LoRA in one denoiser; what a pipeline of diffusers has not is given
a scale of 0. One for SDXL is of a pipeline's own folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from exporter import ensemble, hub, steering
from exporter import reference as references
from exporter.checkpoint import Component
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes.accuracy import psnr
from runtimes.bench import bench
from runtimes.errors import DexportError
from runtimes.hints import Hint
from runtimes.image import read_settings
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.verify import RUN, verify
from tests.dexport.conftest import Say
from tests.families.harness import Array, Built, build_all, build_engines, draw, encode, picture, same_noise
from tests.families.small import SCHEDULE, stable_diffusion, stable_diffusion_xl, write_ddpm
from tests.families.small_hints import control, features, write_image_encoder, write_ip_adapter

# torch's arrays and numpy's newest differ on this inside of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LATENTS = 1e-3  # largest difference; both sides round what goes into each call of the model to float32
PICTURES = 45.0  # dB
STEPS = 5
SIDE = 32
ASKED: dict[str, Any] = {"prompts": ("red apple", "a"), "steps": STEPS, "guidance": 6.0}
WORDS = {"prompt": ["red apple", "a"], "num_inference_steps": STEPS, "guidance_scale": 6.0, "output_type": "np"}
LORA = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
NAMES = ("canny", "depth", "sketch", "grey", "ip", "plus")


def shown(seed: int) -> Image.Image:
    """A picture with hard edges."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.NEAREST)


SHOWN = {name: shown(index) for index, name in enumerate(NAMES)}
SHOWN["grey"] = SHOWN["grey"].convert("L")


class Parts:
    """The networks beside a checkpoint, and a pipeline of diffusers with some of them."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        """Where they are, and the checkpoint that they are for."""
        self.folder, self.checkpoint = folder, checkpoint

    def draw(
        self, kind: str, call: Mapping[str, Any], ip: Mapping[str, float] | None = None, **components: Any
    ) -> tuple[Array, Array]:
        """The last latents and the pictures of a pipeline; ``ip``: scale by file of IP-Adapters."""
        if ip:
            encoder = CLIPVisionModelWithProjection.from_pretrained(self.folder / "encoder")
            components["image_encoder"] = encoder
            call = {**call, "ip_adapter_image": [SHOWN[name] for name in ip]}
        pipe = getattr(diffusers, kind).from_pretrained(self.checkpoint, dtype=torch.float32, **components)
        pipe.set_progress_bar_config(disable=True)
        if (self.folder / "lora.safetensors").exists():
            factors = load_file(self.folder / "lora.safetensors")
            added = factors[f"unet.{LORA}.lora_B.weight"] @ factors[f"unet.{LORA}.lora_A.weight"]
            dict(pipe.unet.named_modules())[LORA].weight.data += added
        if ip:
            files = [f"{name}.safetensors" for name in ip]
            pipe.load_ip_adapter([str(self.folder)] * len(ip), subfolder=[""] * len(ip), weight_name=files)
            pipe.set_ip_adapter_scale(list(ip.values()))
        if "strength" in call:
            call = {**call, "image": encode(pipe.vae, call["image"])}
        kept = []

        def keep(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            kept.append(values["latents"])
            return values

        def keep_old(index: int, t: Any, latents: Any) -> None:
            kept.append(latents)

        adapter = "Adapter" in kind  # which has callbacks of the old form alone
        callback = {"callback": keep_old} if adapter else {"callback_on_step_end": keep}
        with same_noise():
            pictures = pipe(**{**WORDS, **call}, **callback).images
        return kept[-1].numpy(), np.asarray(pictures).transpose(0, 3, 1, 2)

    def network(self, name: str) -> Any:
        """A network from its folder."""
        kind = diffusers.ControlNetModel if name in ("canny", "depth") else diffusers.T2IAdapter
        return kind.from_pretrained(self.folder / name)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Built]:
    folder = tmp_path_factory.mktemp("hints")
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    stable_diffusion(folder / "checkpoint", diffusers.StableDiffusionPipeline, scheduler, {})
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "checkpoint/unet")
    control(unet, 1).save_pretrained(folder / "canny")
    control(unet, 2).save_pretrained(folder / "depth")
    features(3).save_pretrained(folder / "sketch")
    features(4, in_channels=1).save_pretrained(folder / "grey")
    write_image_encoder(folder / "encoder")
    write_ip_adapter(folder / "ip.safetensors", unet)
    write_ip_adapter(folder / "plus.safetensors", unet, plus=True)
    torch.manual_seed(5)
    factors = {f"unet.{LORA}.lora_A.weight": torch.randn(2, 32), f"unet.{LORA}.lora_B.weight": torch.randn(64, 2)}
    save_file(factors, folder / "lora.safetensors")
    built = build_all(
        folder / "checkpoint", folder, loras=[folder / "lora.safetensors"], image_encoder=folder / "encoder",
        controls=[folder / "canny", folder / "depth", folder / "sketch", f"grey={folder / 'grey'}"],
        ip_adapters=[folder / "ip.safetensors", folder / "plus.safetensors"],
    )  # fmt: skip
    return Parts(folder, folder / "checkpoint"), built


def hints(**scales: float | tuple[float, tuple[float, float]]) -> dict[str, Hint]:
    """The pictures with these scales, or scales and intervals; 0 for the rest."""
    chosen = {}
    for name in NAMES:
        scale = scales.get(name, 0.0)
        own = scale if isinstance(scale, tuple) else (scale, (0.0, 1.0))
        chosen[name] = Hint(SHOWN[name], *own)
    return chosen


def two(parts: Parts) -> tuple[Array, Array]:
    networks = [parts.network("canny"), parts.network("depth")]
    call = {
        "image": [SHOWN["canny"], SHOWN["depth"]], "controlnet_conditioning_scale": [0.5, 1.0],
        "control_guidance_start": [0.2, 0.0], "control_guidance_end": [0.8, 1.0],
    }  # fmt: skip
    return parts.draw("StableDiffusionControlNetPipeline", call, controlnet=networks)


def with_picture_prompts(parts: Parts) -> tuple[Array, Array]:
    call = {"image": SHOWN["canny"], "controlnet_conditioning_scale": 0.7}
    kind = "StableDiffusionControlNetPipeline"
    return parts.draw(kind, call, {"ip": 0.8, "plus": 0.6}, controlnet=parts.network("canny"))


def two_adapters(parts: Parts) -> tuple[Array, Array]:
    adapter = diffusers.MultiAdapter([parts.network("sketch"), parts.network("sketch")])
    adapter.adapters[1] = parts.network("grey")  # it wants the same factors of all, which nothing needs
    call = {"image": [[SHOWN["sketch"]] * 2, [SHOWN["grey"]] * 2], "adapter_conditioning_scale": [0.8, 0.5]}
    return parts.draw("StableDiffusionAdapterPipeline", call, adapter=adapter)


def one_adapter(parts: Parts) -> tuple[Array, Array]:
    call = {"image": [SHOWN["sketch"]] * 2, "adapter_conditioning_scale": 0.9}  # one for each prompt
    return parts.draw("StableDiffusionAdapterPipeline", call, adapter=parts.network("sketch"))


def from_a_picture(parts: Parts) -> tuple[Array, Array]:
    call = {"image": picture(SIDE), "strength": 0.8, "control_image": SHOWN["depth"]}
    kind = "StableDiffusionControlNetImg2ImgPipeline"
    return parts.draw(kind, {**call, "controlnet_conditioning_scale": 1.0}, controlnet=parts.network("depth"))


CASES: dict[str, tuple[Callable[[Parts], tuple[Array, Array]], dict[str, Any]]] = {
    "none": (lambda parts: parts.draw("StableDiffusionPipeline", {}), {"hints": hints()}),
    "two": (two, {"hints": hints(canny=(0.5, (0.2, 0.8)), depth=1.0)}),
    "picture prompts": (with_picture_prompts, {"hints": hints(canny=0.7, ip=0.8, plus=0.6)}),
    "one adapter": (one_adapter, {"hints": hints(sketch=0.9)}),
    "two adapters": (two_adapters, {"hints": hints(sketch=0.8, grey=0.5)}),
    "image to image": (from_a_picture, {"hints": hints(depth=1.0), "image": picture(SIDE), "strength": 0.8}),
}


OPENVINO = [("two", "openvino"), ("picture prompts", "openvino")]


@pytest.fixture(scope="module")
def expected(sd: tuple[Parts, Built]) -> dict[str, tuple[Array, Array]]:
    return {name: make(sd[0]) for name, (make, _) in CASES.items()}


@cache
def opened(bundle: Path) -> Pipeline:
    """A bundle, opened once for all that is drawn with it."""
    return Pipeline.load(bundle)


def check(theirs: tuple[Array, Array], built: Built, target: str, **asked: Any) -> None:
    latents, pictures = draw(opened(built.bundles[target]), Request(**ASKED, **asked))
    assert np.abs(latents - theirs[0]).max() <= LATENTS
    assert psnr(theirs[1], pictures) >= PICTURES
    assert np.std(theirs[1]) > 0.01 and np.std(latents[0] - latents[1]) > 0.01  # else anything would agree


@pytest.mark.parametrize(("name", "target"), [*((name, "onnxruntime") for name in CASES), *OPENVINO])
def test_pictures_steer_as_in_diffusers(
    sd: tuple[Parts, Built], expected: dict[str, tuple[Array, Array]], name: str, target: str
) -> None:
    check(expected[name], sd[1], target, **CASES[name][1])


def test_each_picture_steers(expected: dict[str, tuple[Array, Array]]) -> None:
    latents = [expected[name][0] for name in CASES if name != "image to image"]
    for index, one in enumerate(latents):
        assert all(np.std(one - other) > 0.01 for other in latents[:index])


def test_a_part_of_a_picture_is_painted_under_control(sd: tuple[Parts, Built]) -> None:
    """With a mask the rest of the picture stays, whatever steers."""
    pipeline = opened(sd[1].bundles["onnxruntime"])
    mask = Image.fromarray(np.repeat(np.uint8([0, 255]), SIDE // 2)[None].repeat(SIDE, 0))
    made = [
        draw(pipeline, Request(**ASKED, image=picture(SIDE), mask=mask, hints=hints(canny=scale)))[0]
        for scale in (0, 1)
    ]
    left, right = np.split(np.abs(made[0] - made[1]), 2, axis=3)
    assert left.max() == 0 and right.min(axis=(1, 2, 3)).max() >= 0 and np.std(right) > 0.01


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Built]:
    """A StableDiffusionXLControlNetPipeline of two ControlNets, as it is saved, with a T2I-Adapter beside it."""
    folder = tmp_path_factory.mktemp("hints-xl")
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE)
    stable_diffusion_xl(folder / "base", diffusers.StableDiffusionXLPipeline, scheduler, blocks=blocks)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "base/unet")
    networks = [control(unet, 1), control(unet, 2)]
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(folder / "base", controlnet=networks)
    pipe.save_pretrained(folder / "checkpoint")
    features(3, "full_adapter_xl", downscale_factor=4).save_pretrained(folder / "sketch")
    write_image_encoder(folder / "encoder")
    write_ip_adapter(folder / "plus.safetensors", unet, plus=True)
    built = build_all(
        folder / "checkpoint", folder, controls=[folder / "sketch"], image_encoder=folder / "encoder",
        ip_adapters=[folder / "plus.safetensors"],
    )  # fmt: skip
    return Parts(folder, folder / "base"), built


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_pipeline_with_controlnets_is_exported_as_it_is(xl: tuple[Parts, Built], target: str) -> None:
    parts, built = xl
    networks = [
        diffusers.ControlNetModel.from_pretrained(built.checkpoint / name) for name in ("controlnet", "controlnet_1")
    ]
    call = {"image": [SHOWN["canny"], SHOWN["depth"]], "controlnet_conditioning_scale": [0.5, 0.7]}
    theirs = parts.draw("StableDiffusionXLControlNetPipeline", call, {"plus": 0.6}, controlnet=networks)
    given = hints(canny=0.5, depth=0.7, plus=0.6)
    names = {"canny": "controlnet", "depth": "controlnet_1", "sketch": "sketch", "plus": "plus"}
    check(theirs, built, target, hints={new: given[old] for old, new in names.items()})


def test_an_adapter_steers_the_first_steps_of_xl(xl: tuple[Parts, Built]) -> None:
    """The latents alone: diffusers' pipeline decodes without the mean and deviation that this autoencoder has."""
    parts, built = xl
    call = {"image": [SHOWN["sketch"]] * 2, "adapter_conditioning_scale": 0.9, "adapter_conditioning_factor": 0.6}
    theirs, _ = parts.draw("StableDiffusionXLAdapterPipeline", call, adapter=parts.network("sketch"))
    rest = dict.fromkeys(("controlnet", "controlnet_1", "plus"), Hint(SHOWN["canny"], 0))
    drawn = []
    for part in (0.6, 1.0):
        request = Request(**ASKED, hints=rest | {"sketch": Hint(SHOWN["sketch"], 0.9, (0, part))})
        drawn.append(draw(opened(built.bundles["onnxruntime"]), request)[0])
    assert np.abs(drawn[0] - theirs).max() <= LATENTS
    assert np.std(drawn[1] - theirs) > 0.01


def test_a_picture_of_any_size_steers(sd: tuple[Parts, Built], tmp_path: Path) -> None:
    """With a free shape; a T2I-Adapter's features have no free size."""
    origin = Origin(sd[0].checkpoint, controls=[sd[0].folder / "canny"])
    model = hub.export(origin, tmp_path / "hub", graphs=["denoiser"], dynamic_shape=True)
    session = onnxruntime.InferenceSession(tmp_path / "hub/denoiser/model.onnx")
    reference = references.load(ensemble.read(origin), "denoiser")
    random = np.random.default_rng(0)
    for height, width in ((16, 16), (15, 22)):
        free = {"batch": 2, "height": height, "width": width, "image_height": 2 * height, "image_width": 2 * width}
        inputs = {
            tensor.name: random.standard_normal([free.get(str(side), side) for side in tensor.shape], np.float32)
            for tensor in model.graphs["denoiser"].inputs
        }
        expected = reference(*map(torch.from_numpy, inputs.values())).numpy()
        np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-5)
    with pytest.raises(DexportError, match="needs its picture's size fixed; leave --dynamic-shape out"):
        ensemble.specs(ensemble.read(Origin(sd[0].checkpoint, controls=[sd[0].folder / "sketch"])), Shape(32, 32, True))


def test_a_bundle_proves_itself_and_is_timed(sd: tuple[Parts, Built]) -> None:
    folder = sd[1].bundles["onnxruntime"]
    checks = verify(folder)
    assert all(found.passed for found in checks)
    graphs = {"text", "denoiser", "decoder", "encoder", "hint_sketch", "hint_grey", "hint_ip", "hint_plus"}
    assert {found.graph for found in checks} - {RUN} == graphs == set(bench(folder, repeats=1)["graphs"])


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_engines_are_built(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    build_engines(request.getfixturevalue(kind)[1], tmp_path)


def test_hints_on_the_command_line(say: Say, sd: tuple[Parts, Built], tmp_path: Path) -> None:
    bundle = sd[1].bundles["onnxruntime"]
    SHOWN["canny"].save(tmp_path / "a.png")
    words = [word for name in NAMES if name != "canny" for word in ("--hint", f"{name}={tmp_path / 'a.png'}:0")]
    said = say(
        "run", bundle, "--prompt", "red", "--steps", 2, *words, "--hint", f"Canny={tmp_path / 'a.png'}:0.8:0,0.5", "-o",
        tmp_path / "x.png",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert read_settings(tmp_path / "x.png")["hints"]["canny"] == {"scale": 0.8, "interval": [0.0, 0.5]}
    for given, line in (
        (words, "no picture for the hint canny; give one with --hint canny=FILE"),
        ([*words, "--hint", "pose=a.png"], "a.png: No such file"),
        (["--hint", f"sd-canny={tmp_path / 'a.png'}"], f"no hint 'sd-canny'; this model takes {', '.join(NAMES)}"),
        ([*words, *words], "two pictures of --hint have the same name"),
        (["--hint", "canny=a.png:x:y:0,z:"], "No such file"),
    ):
        said = say("run", bundle, "--prompt", "red", *given, "-o", tmp_path / "y.png")
        assert said.code == 2 and line in said.err and said.err.count("\n") == 1, said.err


SHAPE = Shape(SIDE, SIDE, free=False)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("canny", {"cross_attention_dim": 48}, "cross_attention_dim is 48, and 32 of the checkpoint's UNet"),
        ("canny", {"global_pool_conditions": True}, "global_pool_conditions: True; only False"),
        ("canny", {"conditioning_embedding_out_channels": [8, 16, 16]}, "pixels for each latent .*: 4; only 2"),
        ("canny", {"_class_name": "UNet2DConditionModel"}, "it must be ControlNetModel or T2IAdapter"),
        ("sketch", {"channels": [32, 48]}, "it is a T2I-Adapter for another model"),
        ("sketch", {"adapter_type": "other"}, "one of full_adapter, light_adapter, full_adapter_xl is exported"),
        ("sketch", {"in_channels": 4}, "in_channels is 4"),
        ("encoder", {"projection_dim": 48}, "projection_dim of the image encoder is 48"),
        ("encoder", {"architectures": ["CLIPVisionModel"]}, "it must be CLIPVisionModelWithProjection"),
    ],
)
def test_networks_that_do_not_fit(
    sd: tuple[Parts, Built], tmp_path: Path, name: str, changes: dict[str, Any], line: str
) -> None:
    parts = sd[0]
    shutil.copytree(parts.folder / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    said: dict[str, Any] = {"controls": [tmp_path / name]}
    if name == "encoder":
        said = {"ip_adapters": [parts.folder / "ip.safetensors"], "image_encoder": tmp_path / name}
    with pytest.raises(DexportError, match=line) as error:
        ensemble.specs(ensemble.read(Origin(parts.checkpoint, **said)), SHAPE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"ip_adapters": ["ip.safetensors"]}, "needs the image encoder that it was trained with"),
        ({"image_encoder": "encoder"}, "an image encoder is for an IP-Adapter"),
        ({"controls": ["canny", "canny"]}, "the name 'canny' is taken"),
        ({"controls": ["unet=canny"]}, "the name 'unet' is taken"),
        ({"controls": ["A b=canny"]}, "'A b' is no name for its picture"),
        ({"controls": ["ghost"]}, "ghost: no such folder"),
        ({"ip_adapters": ["lora.safetensors"], "image_encoder": "encoder"}, "is missing; it is no IP-Adapter"),
        (
            {"ip_adapters": ["more.safetensors"], "image_encoder": "encoder"},
            "no use for 'ip_adapter.0.to_q_lora.weight'",
        ),
    ],
)
def test_what_is_asked_for_wrongly(sd: tuple[Parts, Built], said: dict[str, Any], line: str) -> None:
    folder = sd[0].folder
    tensors = load_file(folder / "ip.safetensors")
    save_file({**tensors, "ip_adapter.0.to_q_lora.weight": torch.zeros(2, 2)}, folder / "more.safetensors")

    def placed(text: str) -> str:
        name, equals, path = text.rpartition("=")
        return f"{name}{equals}{folder / path}"

    full = {key: placed(value) if isinstance(value, str) else [*map(placed, value)] for key, value in said.items()}
    with pytest.raises(DexportError, match=line) as error:
        ensemble.read(Origin(sd[0].checkpoint, **full))
    assert "\n" not in str(error.value)


def test_a_class_that_takes_no_control(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "ddpm")
    with pytest.raises(DexportError, match="a DDPMPipeline takes no ControlNet or adapter"):
        ensemble.read(Origin(tmp_path / "ddpm", controls=[tmp_path / "canny"]))


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter", "full_adapter_xl"])
def test_features_have_the_shapes_of_the_class(kind: str, sd: tuple[Parts, Built]) -> None:
    widths = {"light_adapter": [64, 64], "full_adapter": [64, 64, 64], "full_adapter_xl": [64, 64, 64]}[kind]
    xl = kind == "full_adapter_xl"
    network = features(3, kind, channels=widths, downscale_factor=4 if xl else 2)
    part = Component("it", "T2IAdapter", Path("it"), dict(network.config), {})
    read = ensemble.read(Origin(sd[0].checkpoint))
    first = "DownBlock2D" if xl else "CrossAttnDownBlock2D"
    unet = {"block_out_channels": [64] * 3, "down_block_types": [first, "CrossAttnDownBlock2D", "DownBlock2D"]}
    components = {**read.components, "unet": replace(read.components["unet"], config=unet)}
    spec = steering._feature_adapter(replace(read, components=components), part, Shape(24, 40, free=False))
    with torch.no_grad():
        made = network(torch.zeros(1, 3, 24, 40))
    assert [tensor.shape[1:] for tensor in spec.outputs] == [tuple(value.shape[1:]) for value in made]
