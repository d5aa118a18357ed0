"""What a text encoder is given, ids and masks, against diffusers' own pipeline, whatever the tokenizers' files say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import diffusers
import pytest
import torch
import transformers
from numpy.typing import NDArray

from exporter import checkpoint, ensemble, tokenizer
from exporter.families import GENERIC_TOKENIZERS, Shape, text_encoders
from runtimes import manifest
from runtimes.errors import DexportError
from runtimes.tokenizer import PromptTokenizer
from tests.families import small, small_cascades, small_flow, small_ldm, small_transformers

WRITERS: Mapping[str, Callable[[Path], Any]] = {
    "sd": small.sd_2, "lcm": small.latent_consistency, "sdxl": small.sdxl, "refiner": small.refiner,
    "sd_3": small_flow.sd_3, "flux": small_flow.flux, "qwen_image": small_flow.qwen_image,
    "z_image": small_flow.z_image, "pixart": small_transformers.pixart_sigma, "sana": small_transformers.sana,
    "aura_flow": small_transformers.aura_flow, "lumina2": small_transformers.lumina2,
    "kandinsky": small_cascades.kandinsky, "unclip": small_cascades.unclip,
    "stable_cascade": small_cascades.stable_cascade, "wuerstchen": small_cascades.wuerstchen,
    "ldm_text": small_ldm.ldm_text,
}  # fmt: skip
PROMPTS = (
    "",
    "a red apple",
    "two! apples, a<|endoftext|> table!",
    "RED apple and </s><eos> pear",
    "red apple, " * 200,
)


Array = NDArray[Any]


class EnoughError(Exception):
    """The text encoders have been called."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("tokens") / name
        WRITERS[name](folder)
        return folder

    return made


def tokenizers_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*tokenizer*/tokenizer_config.json"))


def change(folder: Path, **options: Any) -> None:
    for place in tokenizers_of(folder):
        file = place / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))


def generic(folder: Path) -> None:
    """The names that transformers 5 writes."""
    index = json.loads((folder / "model_index.json").read_text())
    for count, place in enumerate(tokenizers_of(folder)):
        index[place.name][1] = GENERIC_TOKENIZERS[count % 2]
    (folder / "model_index.json").write_text(json.dumps(index))
    change(folder, tokenizer_class="TokenizersBackend")


def slow(folder: Path) -> None:
    """CLIP's and Qwen's as transformers 4 saved them: a vocabulary, merges, and learned words beside them."""
    for place in tokenizers_of(folder):
        saved = json.loads((place / "tokenizer.json").read_text())
        if saved["model"]["type"] != "BPE" or saved["model"].get("byte_fallback"):
            continue
        (place / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        (place / "tokenizer.json").unlink()
        words = {word["content"]: word["id"] for word in saved["added_tokens"]}
        (place / "added_tokens.json").write_text(json.dumps(words))


WAYS: Mapping[str, Callable[[Path], None]] = {
    "plain": lambda folder: None, "generic": generic, "slow": slow,
    "left": lambda folder: change(folder, padding_side="left"),
    "right": lambda folder: change(folder, padding_side="right"),
}  # fmt: skip


def opened(folder: Path) -> Any:
    """diffusers' own pipeline of a folder."""
    if folder.name in ("unclip", "stable_cascade", "wuerstchen"):  # of modules that it loads from no folder any more
        pipe = WRITERS[folder.name](folder.with_name(f"{folder.name}-again"))
        index = json.loads((folder / "model_index.json").read_text())
        words = {
            place.name: getattr(transformers, index[place.name][1]).from_pretrained(place)
            for place in tokenizers_of(folder)
        }
        pipe = type(pipe)(**pipe.components | words)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given(folder: Path) -> list[dict[str, tuple[Array, Array | None]]]:
    """What diffusers gives each text encoder for each of ``PROMPTS``: ids [S], and the mask where it gives one."""
    pipe = opened(folder)
    options = {"use_resolution_binning": False} if folder.name in ("pixart", "sana") else {}
    found: list[dict[str, tuple[Array, Array | None]]] = []

    def stop(*_: Any) -> None:
        raise EnoughError

    def record(name: str) -> Callable[..., None]:
        def take(module: Any, args: Any, kwargs: Any) -> None:
            ids, mask = kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs.get("attention_mask")
            found[-1].setdefault(name, (ids[-1].numpy(), None if mask is None else mask[-1].numpy().astype(bool)))

        return take

    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            if "text_encoder" in name or name == "bert":
                part.register_forward_pre_hook(record(name), with_kwargs=True)
            elif "image_encoder" not in name:
                part.register_forward_pre_hook(stop)
    for prompt in PROMPTS:
        found.append({})
        if "refiner" in folder.name:  # it asks for an image first
            pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        else:
            with pytest.raises(EnoughError):
                pipe([prompt], **options)
    return found


def compare(folder: Path) -> None:
    """Our ids of each prompt are those that diffusers gives its encoders, and so are the masks."""
    read = checkpoint.read(folder)
    tokenizer.check(read)
    shape = Shape(*read.family.default_shape(read), free=False)
    builders = {name: make for spec in read.family.specs(read, shape).values() for name, make in spec.builders.items()}
    for prompt, wanted in zip(PROMPTS, given(folder), strict=True):
        for name, tokens in read.family.token_inputs(read).items():
            encoder = "bert" if "bert" in wanted else name.replace("tokenizer", "text_encoder")
            if encoder not in wanted:  # of a stage that was not come to
                continue
            files = read.tokenizers[name]
            tokenizer.write(files.made, folder / "written.json")
            said = manifest.Tokenizer(
                "written.json", tokens.input, tokens.length, files.made.pad, tokens.template, tokens.negative,
                tokens.lower, tokens.side or files.made.side,
            )  # fmt: skip
            ids = PromptTokenizer(folder, said)([prompt])[0]
            expected, mask = wanted[encoder]
            if "qwen" in folder.name:  # which fills up a batch alone
                # It looks back alone, and what is beyond our length is thrown away after it.
                assert ids[0, : len(expected)].tolist() == expected[: tokens.length].tolist()
                assert (ids[0, len(expected) :] == files.made.pad).all()
                continue
            if "z_image" in folder.name:  # it takes the states of a text, wherever that stands
                expected = expected[mask]
                assert ids[0, : len(expected)].tolist() == expected.tolist()
                assert (ids[0, len(expected) :] == files.made.pad).all()
                continue
            assert ids[0].tolist() == expected.tolist()
            if mask is not None:
                module = builders[encoder]()
                assert text_encoders.there(module, torch.from_numpy(ids))[0].tolist() == mask.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITERS)
def test_ids_and_masks_are_those_of_diffusers(
    written: Callable[[str], Path], tmp_path: Path, name: str, way: str
) -> None:
    folder = Path(copytree(written(name), tmp_path / name))
    WAYS[way](folder)
    compare(folder)


@pytest.mark.parametrize("name", ["sd", "lcm", "sdxl", "sd_3", "flux", "stable_cascade", "wuerstchen"])
def test_fewer_tokens_than_the_encoder_has_positions(written: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = Path(copytree(written(name), tmp_path / name))
    change(folder, model_max_length=20)
    compare(folder)
    read = checkpoint.read(folder)
    specs = ensemble.specs(read, Shape(*read.family.default_shape(read), free=False))
    assert specs["text"].inputs[0].shape == ("batch", 20)


@pytest.mark.parametrize("name", ["kandinsky", "unclip"])
def test_a_prior_is_of_one_length(written: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = Path(copytree(written(name), tmp_path / name))
    change(folder, model_max_length=20)
    read = checkpoint.read(folder)
    with pytest.raises(DexportError, match="num_embeddings must be the 20 tokens"):
        read.family.specs(read, Shape(*read.family.default_shape(read), free=False))


def test_encoders_whose_states_are_joined_take_as_many_tokens(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(copytree(written("sdxl"), tmp_path / "sdxl"))
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 20}))
    read = checkpoint.read(folder)
    with pytest.raises(DexportError, match=r"model_max_length is 77 in .* and 20 in that of tokenizer_2"):
        read.family.specs(read, Shape(64, 64, free=False))


def test_a_chat_is_the_tokenizers_own(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(copytree(written("z_image"), tmp_path / "z_image"))
    (folder / "tokenizer" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    compare(folder)
    for text in ("{{ messages[0].content * 2 }}", "none", "{% broken"):
        (folder / "tokenizer" / "chat_template.jinja").write_text(text)
        read = checkpoint.read(folder)
        with pytest.raises(DexportError, match=r"chat_template|cannot read it"):
            read.family.token_inputs(read)
