"""Weighted words, long prompts and learned words, against diffusers' own pipelines given the states that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import checkpoint, hub, tokenizer
from exporter import compile as compilers
from exporter.checkpoint import Checkpoint
from exporter.ensemble import Origin
from exporter.families import Shape
from runtimes.accuracy import psnr
from runtimes.backends import onnxruntime
from runtimes.errors import DexportError
from runtimes.pipeline import Pipeline
from runtimes.prompts import Piece, parse
from runtimes.request import Request
from runtimes.session import backend
from runtimes.target import Target
from runtimes.verify import verify
from tests.families.harness import Built, build_all, draw, picture, same_noise, untraced
from tests.families.small import sd_2, sdxl, write_ddpm
from tests.families.test_families import LATENTS, PICTURES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STEPS, GUIDANCE = 3, 6.0
CHUNKS = 3
LONG = "red apple, " * 40 + "(a:1.6) a <style>"  # 126 tokens
Pieces = Sequence[tuple[str, float]]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("red apple", [("red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("a [red] apple", [("a ", 1.0), ("red", 1 / 1.1), (" apple", 1.0)]),
        ("(red:1.3)((apple))", [("red", 1.3), ("apple", 1.1 * 1.1)]),
        ("(a (red: .5 ) b:-2)", [("a ", -2.0), ("red", -1.0), (" b", -2.0)]),
        ("a \\(b\\) \\[c\\] d\\e \\\\", [("a (b) [c] d\\e \\", 1.0)]),
        ("(a (b", [("a ", 1.1), ("b", 1.1 * 1.1)]),  # what is not closed goes to the end
        (":) a: b ]", [(":) a: b ]", 1.0)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),  # the web UI has another use for it
        ("(a:1.3.3)", [("a:1.3.3", 1.1)]),
        ("()", [("", 1.0)]),
    ],
)
def test_weights_are_read_as_the_community_writes_them(prompt: str, pieces: Pieces) -> None:
    found = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


def test_a_year_is_no_weight() -> None:
    with pytest.raises(DexportError, match=r"gives 'art' the weight 2020, beyond 100; write \\\( for a bracket"):
        parse("(art:2020)")
    assert parse("\\(art:2020\\)") == [Piece("(art:2020)")]


@dataclass(frozen=True)
class Encoder:
    """One of diffusers' text encoders with its tokenizer, and which of its states a pipeline takes."""

    tokenizer: Any
    module: Any
    penultimate: bool

    def __call__(self, pieces: Pieces, chunks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [1, 77 chunks, D], their weights, and the pooled state of the first chunk."""
        words, own, states, weights = self.tokenizer, [], [], torch.ones(1, 77 * chunks, 1)
        for text, weight in pieces:
            ids = words(words_of(text, words), add_special_tokens=False).input_ids
            own += [(number, weight) for number in ids]
        pooled = []
        for index in range(chunks):
            part = own[75 * index : 75 * index + 75]
            row = [words.bos_token_id, *(number for number, _ in part), words.eos_token_id]
            out = self.module(torch.tensor([row + [words.pad_token_id] * (77 - len(row))]), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.penultimate else out.last_hidden_state)
            pooled.append(getattr(out, "text_embeds", None))
            weights[0, 77 * index + 1 : 77 * index + 1 + len(part), 0] = torch.tensor([w for _, w in part])
        return torch.cat(states, dim=1), weights, pooled[0]


def words_of(text: str, words: Any) -> str:
    return str(diffusers.loaders.TextualInversionLoaderMixin().maybe_convert_prompt(text, words))


@torch.no_grad()
def embeds(encoders: Sequence[Encoder], pieces: Pieces, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What lpw_stable_diffusion gives a UNet: each state times its weight, and the mean of all as it was."""
    found = [encoder(pieces, chunks) for encoder in encoders]
    states, weights = torch.cat([own for own, _, _ in found], dim=2), found[0][1]
    weighed = states * weights
    return weighed * (states.mean() / weighed.mean()), found[-1][2]


@dataclass(frozen=True)
class Theirs:
    """diffusers' pipeline with its encoders, words learned."""

    pipe: Any
    encoders: Sequence[Encoder]

    def draw(self, prompts: Sequence[Pieces], negative: Pieces, chunks: int) -> tuple[np.ndarray[Any, Any], ...]:
        rows = [embeds(self.encoders, own, chunks) for own in prompts]
        without = embeds(self.encoders, negative, chunks)
        asked = {"prompt_embeds": torch.cat([states for states, _ in rows])}
        asked["negative_prompt_embeds"] = without[0].repeat(len(rows), 1, 1)
        if rows[0][1] is not None:
            asked["pooled_prompt_embeds"] = torch.cat([pooled for _, pooled in rows])
            asked["negative_pooled_prompt_embeds"] = without[1].repeat(len(rows), 1)
        kept = []
        with same_noise():
            pictures = self.pipe(
                **asked, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
                callback_on_step_end=lambda pipe, index, t, values: kept.append(values["latents"]) or values,
            ).images  # fmt: skip
        return kept[-1].numpy(), pictures.transpose(0, 3, 1, 2)


def opened(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Theirs]:
    """SDXL with a word of two vectors, for prompts of three chunks."""
    folder = tmp_path_factory.mktemp("prompts-xl")
    sdxl(folder / "checkpoint")
    torch.manual_seed(5)
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(vectors, folder / "a style.safetensors")
    said = [f"{folder / 'a style.safetensors'}:<style>"]
    built = build_all(folder / "checkpoint", folder, long_prompts=CHUNKS, embeddings=said)
    pipe = opened(folder / "checkpoint")
    pairs = [(pipe.tokenizer, pipe.text_encoder, "clip_l"), (pipe.tokenizer_2, pipe.text_encoder_2, "clip_g")]
    for words, encoder, name in pairs:
        pipe.load_textual_inversion(vectors[name], token="<style>", tokenizer=words, text_encoder=encoder)
    return built, Theirs(pipe, [Encoder(words, encoder, True) for words, encoder, _ in pairs])


SHORT = [("a ", 1.0), ("red", 1.5), (" apple, ", 1.0), ("a", 1 / 1.1)]
NEGATIVE = [("apple ", 1.0), ("a", 1.4)]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_short_weighted_prompt(xl: tuple[Built, Theirs], name: str) -> None:
    built, theirs = xl
    request = Request(["a (red:1.5) apple, [a]"], "apple (a:1.4)", steps=STEPS, guidance=GUIDANCE)
    latents, pictures = draw(built.pipeline(name), request)
    expected, drawn = theirs.draw([SHORT], NEGATIVE, 1)
    assert np.abs(latents - expected).max() <= LATENTS and psnr(drawn, pictures) >= PICTURES
    plain = theirs.draw([[("a red apple, a", 1.0)]], NEGATIVE, 1)[0]
    assert np.abs(latents - plain).max() > 20 * LATENTS  # else the weights would say nothing


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_long_prompt_beside_short_ones(xl: tuple[Built, Theirs], name: str) -> None:
    """With weights and a learned word in its second chunk; what is shorter is filled with empty chunks."""
    built, theirs = xl
    request = Request([LONG, "a (red:1.5) apple, [a]"], "apple (a:1.4)", steps=STEPS, guidance=GUIDANCE)
    pipeline = built.pipeline(name)
    latents, pictures = draw(pipeline, request)
    long = [("red apple, " * 40, 1.0), ("a", 1.6), (" a <style>", 1.0)]
    expected, drawn = theirs.draw([long, SHORT], NEGATIVE, 2)
    assert np.abs(latents - expected).max() <= LATENTS and psnr(drawn, pictures) >= PICTURES
    cut = theirs.draw([[("red apple, " * 25, 1.0)], SHORT], NEGATIVE, 1)[0]
    assert np.abs(latents - cut).max() > 20 * LATENTS


def test_a_prompt_without_weights_is_what_it_was(xl: tuple[Built, Theirs]) -> None:
    """To the bit, in a bundle for long prompts too; brackets that are to be text are so in two ways."""
    pipeline = xl[0].pipeline("onnxruntime")
    stage = pipeline.model.stages[0]
    plain = pipeline.prompts.encode(stage, ["red (apple)"], weighted=False)
    for prompt in ("red \\(apple\\)", "red \\(apple)"):
        found = pipeline.prompts.encode(stage, [prompt])
        assert all(np.array_equal(plain[name], found[name]) for name in plain)
    assert plain["encoder_hidden_states"].shape == (1, 77, 80)
    weighed = pipeline.prompts.encode(stage, ["red (apple)"])["encoder_hidden_states"]
    assert np.abs(weighed - plain["encoder_hidden_states"]).max() > 0.01
    result = pipeline("red (apple)", steps=1, prompt_weights=False)
    assert result.settings[0]["prompt_weights"] is False and not result.warnings


def test_what_is_beyond_the_last_chunk_is_cut(xl: tuple[Built, Theirs]) -> None:
    pipeline = xl[0].pipeline("onnxruntime")
    result = pipeline("red apple " * 112 + "(red a <style> red)", steps=1)  # 226 tokens with the first red
    assert result.warnings == ["the prompt is longer than the model's context: 'a <style> red' was cut off"]
    bundle = xl[0].bundles["onnxruntime"]
    assert all(check.passed for check in verify(bundle))
    assert [adapter.word for adapter in pipeline.model.adapters] == ["<style>"]


def test_an_engine_takes_every_number_of_chunks(xl: tuple[Built, Theirs], tmp_path: Path) -> None:
    if backend("tensorrt").version() is None:
        pytest.skip("TensorRT is not installed")
    graph = hub.load(xl[0].hub).graphs["denoiser"]
    assert graph.sizes == {"sequence": (77, 3 * 77)}
    (tmp_path / "denoiser").mkdir()
    target = Target.parse("tensorrt:sm89")
    built = compilers.compile_graph(xl[0].hub / graph.file, graph, tmp_path / "denoiser", target, "fp32")
    assert (tmp_path / built.file).stat().st_size > 10_000


def test_break_starts_another_chunk(xl: tuple[Built, Theirs]) -> None:
    """Each chunk is filled up by itself; the pooled state is the first one's."""
    built, theirs = xl
    pipeline = built.pipeline("onnxruntime")
    prompts = ["red apple BREAK (a:1.0) table BREAK", "BREAK a"]
    latents, _ = draw(pipeline, Request(prompts, "a", steps=STEPS, guidance=GUIDANCE))
    rows = []
    for chunks in (("red apple", "a table"), ("", "a")):
        found = [embeds(theirs.encoders, [(text, 1.0)], 1) for text in chunks]
        rows.append((torch.cat([states for states, _ in found], dim=1), found[0][1]))
    states, pooled = embeds(theirs.encoders, [("a", 1.0)], 2)
    kept = []
    with same_noise():
        theirs.pipe(
            prompt_embeds=torch.cat([own for own, _ in rows]), negative_prompt_embeds=states.repeat(2, 1, 1),
            pooled_prompt_embeds=torch.cat([own for _, own in rows]), num_inference_steps=STEPS,
            negative_pooled_prompt_embeds=pooled.repeat(2, 1), guidance_scale=GUIDANCE, output_type="latent",
            callback_on_step_end=lambda pipe, index, t, values: kept.append(values["latents"]) or values,
        )  # fmt: skip
    assert np.abs(latents - kept[-1].numpy()).max() <= LATENTS
    assert not pipeline(prompts[0], steps=1).warnings
    assert pipeline.prompts.tokenize(pipeline.model.stages[0], ["a BREAK b BREAK c BREAK d"]).cut == ["d"]


@pytest.fixture(scope="module", params=["sd", "xl"])
def changing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Any]:
    """The torch model behind our pipeline, and diffusers' own."""
    folder = tmp_path_factory.mktemp(f"changing-{request.param}")
    {"sd": sd_2, "xl": sdxl}[request.param](folder / "checkpoint")
    return untraced(folder / "checkpoint", folder / "tokenizers", Shape(32, 32, free=False)), opened(
        folder / "checkpoint"
    )


# What is asked, and the prompt and the negative prompt at each call of the model.
CHANGES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "a count": ({"prompts": ["a [red:green:1] apple"]}, [("a red apple", "")] + [("a green apple", "")] * 3),
    "a share": ({"prompts": ["a [red::0.5] apple"]}, [("a red apple", "")] * 2 + [("a  apple", "")] * 2),
    "by turns": (
        {"prompts": ["[red|green] apple"], "negative_prompt": "[a:table:3]"},
        [("red apple", "a"), ("green apple", "a"), ("red apple", "a"), ("green apple", "table")],
    ),
    "two calls a step": (
        {"prompts": ["[red:green:2] apple"], "sampler": "heun"},
        [("red apple", "")] * 4 + [("green apple", "")] * 3,
    ),
    "text": (
        {"prompts": ["[red:green:2] apple"], "prompt_weights": False},
        [("[red:green:2] apple", "")] * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_words_change_at_their_step(changing: tuple[Pipeline, Any], case: str) -> None:
    """As diffusers draws if the prompt's states are exchanged after each of its steps."""
    ours, pipe = changing
    asked, words = CHANGES[case]
    latents, _ = draw(ours, Request(**asked, steps=4, guidance=GUIDANCE))
    own = pipe.scheduler
    if asked.get("sampler") == "heun":
        if ours.model.stages[0].scheduler.get("rescale_betas_zero_snr"):
            pytest.skip("diffusers' has no step from a sample without signal")
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(own.config)
    kept: list[Any] = []
    told = [encoded(pipe, *one) for one in words]

    def change(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(values["latents"])
        return told[min(index + 1, len(told) - 1)]

    try:
        with same_noise():
            pipe(
                words[0][0], negative_prompt=words[0][1] or None, num_inference_steps=4, guidance_scale=GUIDANCE,
                output_type="latent", callback_on_step_end=change, height=32, width=32,
            )  # fmt: skip
    finally:
        pipe.scheduler = own
    assert len(kept) == len(words)
    assert np.abs(latents - kept[-1].numpy()).max() <= LATENTS


def encoded(pipe: Any, prompt: str, negative: str) -> dict[str, torch.Tensor]:
    """What the loop of a pipeline knows of a prompt, the negative one first."""
    with torch.no_grad():
        if hasattr(pipe, "text_encoder_2"):
            states, without, pooled, pooled_without = pipe.encode_prompt(prompt, negative_prompt=negative or None)
            return {
                "prompt_embeds": torch.cat([without, states]), "add_text_embeds": torch.cat([pooled_without, pooled])
            }  # fmt: skip
        states, without = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
        return {"prompt_embeds": torch.cat([without, states])}


def test_of_an_image_the_steps_that_are_made_count(changing: tuple[Pipeline, Any]) -> None:
    """And shares are of all that were asked for, as in the web UI."""
    ours, _ = changing
    begun: dict[str, Any] = {"image": picture(), "strength": 0.5, "steps": 8, "guidance": 1.0}
    plain = {word: draw(ours, Request([f"{word} apple"], **begun))[0] for word in ("red", "green")}
    assert np.abs(plain["red"] - plain["green"]).max() > LATENTS
    for prompt, same in (
        ("[red:green:0.5] apple", "red"),
        ("[red:green:4] apple", "red"),
        ("[red:green:0] apple", "green"),
    ):
        assert np.array_equal(draw(ours, Request([prompt], **begun))[0], plain[same])
    for prompt in ("[red:green:3] apple", "[red:green:0.25] apple"):
        mixed, _ = draw(ours, Request([prompt], **begun))
        assert all(np.abs(mixed - other).max() > LATENTS / 10 for other in plain.values())


def test_marks_that_are_not_followed_are_said(changing: tuple[Pipeline, Any]) -> None:
    ours, _ = changing
    lora = "<lora:style:0.8>"
    result = ours(f"red {lora} apple AND a BREAK table", steps=1, negative_prompt=lora)
    left = "it was left out, since a bundle's networks are merged when it is built (--lora)"
    assert result.warnings == [
        f"the prompt holds {lora}: {left}",
        "the prompt holds AND, which is drawn as a word: prompts are not composed",
        "the prompt holds BREAK: it was left out, since this bundle takes one chunk; see --long-prompts",
        f"the negative prompt holds {lora}: {left}",
    ]
    plain = ours("red  apple AND a table", steps=1, negative_prompt=" ")
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(plain.images[0]))
    assert result.settings[0]["prompt"] == f"red {lora} apple AND a BREAK table"
    assert not ours(f"red {lora} apple AND", steps=1, prompt_weights=False).warnings


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Theirs]:
    """Stable Diffusion 2, whose padding is no end mark, with a word in diffusers' way and one in the web UI's."""
    folder = tmp_path_factory.mktemp("prompts-sd")
    sd_2(folder / "checkpoint")
    torch.manual_seed(6)
    file = folder / "checkpoint" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("final_layer_norm.bias")]
    tensors[name].normal_()  # as it is, the mean of all states is 0
    save_file(tensors, file, {"format": "pt"})
    files = {"<style>": torch.randn(3, 32)}, {"emb_params": torch.randn(1, 32)}
    save_file(files[0], folder / "one.safetensors")
    save_file(files[1], folder / "Blurry.safetensors")
    said = [folder / "one.safetensors", folder / "Blurry.safetensors"]
    model = hub.export(Origin(folder / "checkpoint", embeddings=said, long_prompts=2), folder / "hub")
    sessions = {
        name: onnxruntime.open(folder / "hub" / graph.file, graph, "cpu", None, None)
        for name, graph in model.graphs.items()
    }
    pipe = opened(folder / "checkpoint")
    pipe.load_textual_inversion(str(folder / "one.safetensors"))
    pipe.load_textual_inversion(files[1]["emb_params"], token="Blurry")
    theirs = Theirs(pipe, [Encoder(pipe.tokenizer, pipe.text_encoder, False)])
    return Pipeline(model, folder / "hub", sessions.__getitem__), theirs


def test_learned_words_are_those_of_diffusers(sd: tuple[Pipeline, Theirs]) -> None:
    """In its own pipeline, which is given the prompt itself."""
    pipeline, theirs = sd
    prompts, negative = ["a <style> apple", "red"], "blurry, a"
    latents, _ = draw(pipeline, Request(prompts, negative, steps=STEPS, guidance=GUIDANCE))
    kept = []
    with same_noise():
        theirs.pipe(
            prompts, negative_prompt=[negative] * 2, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            callback_on_step_end=lambda pipe, index, t, values: kept.append(values["latents"]) or values,
        )  # fmt: skip
    assert np.abs(latents - kept[-1].numpy()).max() <= LATENTS
    without, _ = draw(pipeline, Request(["a  apple", "red"], negative, steps=STEPS, guidance=GUIDANCE))
    assert np.abs(latents - without)[0].max() > 20 * LATENTS


def test_a_word_of_several_vectors_is_weighted_as_one(sd: tuple[Pipeline, Theirs]) -> None:
    pipeline, theirs = sd
    long = "apple " * 74
    request = Request([f"{long}(<style>:1.3)"], "(blurry)", steps=STEPS, guidance=GUIDANCE)
    latents, _ = draw(pipeline, request)
    expected, _ = theirs.draw([[(long, 1.0), ("<style>", 1.3)]], [("Blurry", 1.1)], 2)
    assert np.abs(latents - expected).max() <= LATENTS


def read(folder: Path, tensors: dict[str, torch.Tensor], word: str = "", name: str = "word.safetensors") -> Checkpoint:
    file = folder / name
    save_file(tensors, file)
    return checkpoint.read(folder / "checkpoint", embeddings=[f"{file}:{word}" if word else file], check=False)


ONE, TWO = {"emb_params": torch.ones(32)}, {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}


@pytest.mark.parametrize(
    ("tensors", "word", "words"),
    [
        ({"emb_params": torch.ones(2, 48)}, "", r"'emb_params' is F32 \[2, 48\], and the text_encoder takes floats"),
        ({"emb_params": torch.ones(2, 32).int()}, "", r"'emb_params' is I32"),
        ({"emb_params": torch.ones(80, 32)}, "", "80 vectors for a word, and a prompt has place for 75"),
        ({"emb_params": torch.full((32,), torch.nan)}, "", "NaN"),
        (TWO, "", "for SDXL's two text encoders, of which this model has one"),
        ({"a": torch.ones(32), "b": torch.ones(32)}, "", "'a', 'b': not an embedding"),
        ({"clip_l": torch.ones(32)}, "", "'clip_l': not an embedding"),
        ({"red": torch.ones(32)}, "", "'red' is a word of the tokenizer already; name another with FILE:WORD"),
        (ONE, "Apple", "'Apple' is a word of the tokenizer already"),
        (ONE, "two words", "'two words' cannot be a word of a prompt"),
        (ONE, "(v2)", r"'\(v2\)' cannot be a word of a prompt"),
    ],
)
def test_embeddings_that_do_not_fit(
    tiny_sd: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], word: str, words: str
) -> None:
    (tmp_path / "checkpoint").symlink_to(tiny_sd)
    with pytest.raises(DexportError, match=words) as caught:
        read(tmp_path, tensors, word)
    assert "\n" not in str(caught.value)


def test_other_embeddings_that_do_not_fit(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(tiny_sdxl)
    with pytest.raises(DexportError, match="vectors for one text encoder, and this model has 2"):
        read(tmp_path, ONE)
    with pytest.raises(DexportError, match=r"it has \[2, 1\] vectors"):
        read(tmp_path, {**TWO, "clip_g": torch.ones(48)})
    (tmp_path / "word.pt").write_bytes(b"")
    for name, words in (("word.pt", "no pickle is opened"), ("ghost.safetensors", "no such file")):
        with pytest.raises(DexportError, match=words):
            checkpoint.read(tiny_sd, embeddings=[tmp_path / name], check=False)
    with pytest.raises(DexportError, match="'word' is a word of the tokenizer already"):
        save_file(ONE, tmp_path / "word.safetensors")
        checkpoint.read(tiny_sd, embeddings=[tmp_path / "word.safetensors"] * 2, check=False)


def test_a_model_without_words_learns_none(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "checkpoint")
    with pytest.raises(DexportError, match="take embeddings; leave --embedding out for a DDPMPipeline"):
        read(tmp_path, ONE)


def test_the_end_mark_stays_what_the_pooled_state_is_of(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Old configs have 2 there, by which transformers takes the highest id; that would be the learned word's."""
    (tmp_path / "checkpoint").symlink_to(tiny_sdxl)
    made = read(tmp_path, TWO)
    known, end = tokenizer.extend(made.tokenizers["tokenizer_2"].made, (), (), "")
    config = made.components["text_encoder_2"].config
    assert config["vocab_size"] == known + 2 and config["eos_token_id"] == end == known - 1


def test_long_prompts_that_there_are_none_of(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="may have 1 to 64 chunks, not 65"):
        hub.export(Origin(tiny_sd, long_prompts=65), tmp_path / "hub")
    write_ddpm(tmp_path / "checkpoint")
    with pytest.raises(DexportError, match="are for models of CLIP's states; leave them out for a DDPMPipeline"):
        hub.export(Origin(tmp_path / "checkpoint", long_prompts=2), tmp_path / "hub")
