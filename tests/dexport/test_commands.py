"""Every command on real input: what it prints, as text and as JSON, and the exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import pytest
from PIL import Image

from dexport import console
from dexport.cli import main
from runtimes.image import read_settings

if TYPE_CHECKING:
    from tests.dexport.conftest import Say, Workshop

BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r}))"
NOT_ON_A_DEVICE = ["torch", "diffusers", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "safetensors"]
DEVICE = BLOCK.format(names=NOT_ON_A_DEVICE)


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_says_what_it_does_and_gives_an_example(say: Say, name: str) -> None:
    said = say(*filter(None, [name, "--help"]))
    assert said.code == 0
    _, found, example = said.out.partition("Example:")
    assert found
    assert example.strip().startswith(f"dexport {name}".strip())


@pytest.mark.parametrize("name", main.commands)
def test_every_example_is_a_valid_command_line(name: str) -> None:
    """The words of each example are parsed by the command itself; nothing is run."""
    import shlex

    command = main.commands[name]
    text = (command.help or "").partition("Example:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("dexport ")]
    assert lines
    for line in lines:
        words = shlex.split(line.replace(">>", "&&").partition("&&")[0])
        assert words[1] == name
        command.make_context(name, words[2:])


def test_build_says_where_and_how_exact(workshop: Workshop) -> None:
    (built,) = workshop.said.json["bundles"]
    assert built["folder"] == str(workshop.bundle)
    assert (built["target"], built["precision"]) == ("onnxruntime", "fp32")
    assert built["accuracy"]["gate"] == "passed"
    files = [path for path in workshop.bundle.rglob("*") if path.is_file() and path.name != "dexport.json"]
    assert built["size"] == sum(path.stat().st_size for path in files)


def test_build_of_several_makes_a_folder_of_bundles(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    said = say(
        "build", workshop.checkpoint, "--target", "onnxruntime", "--target", "openvino=bf16", "-o", tmp_path / "all",
        "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["onnxruntime-fp32", "openvino-bf16"]
    for name in ("onnxruntime-fp32", "openvino-bf16"):
        assert str(tmp_path / "all" / name) in said.out
        assert say("verify", tmp_path / "all" / name).code == 0


def test_export_then_compile_gives_a_bundle_without_a_proof(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("--shape", "32x48", "--sampler", "euler", "--steps", 7, "--guidance", 3, "--json")
    exported = say("export", workshop.checkpoint, "-o", tmp_path / "hub", *words)
    assert exported.code == 0, exported.err
    described = say("inspect", tmp_path / "hub", "--json").json
    assert (described["sampler"], described["steps"]) == ("EulerDiscreteScheduler", 7)
    assert described["guidance"] == "cfg, scale 3"
    assert set(exported.json["graphs"]) == {"text", "denoiser", "decoder", "encoder"}
    assert say("inspect", tmp_path / "hub", "--json").json["image"] == "32x48 pixels"
    words = ("compile", tmp_path / "hub", "--target", "onnxruntime", "-o", tmp_path / "bundle", "--no-cache", "--json")
    compiled = say(*words)
    assert compiled.code == 0, compiled.err
    assert compiled.json["target"] == "onnxruntime"
    checked = say("verify", tmp_path / "bundle", "--json")
    assert (checked.code, checked.json) == (1, {"passed": None, "checks": []})
    assert "nothing is proven" in checked.err
    drawn = say("run", tmp_path / "bundle", "--prompt", "red apple", "--steps", 2, "-o", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (48, 32)


def test_a_compiled_hub_draws_the_same_as_the_built_bundle(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("compile", workshop.hub, "--target", "onnxruntime", "-o", tmp_path / "bundle", "--no-cache")
    assert say(*words).code == 0
    for bundle, name in ((tmp_path / "bundle", "a.png"), (workshop.bundle, "b.png")):
        assert say("run", bundle, "--prompt", "red apple", "--steps", 2, "-o", tmp_path / name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_run_draws_the_same_as_the_library(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    import dexport

    said = say(
        "run", workshop.bundle, "--prompt", "red apple", "--negative-prompt", "blue", "--steps", 3, "--guidance", 5,
        "--seed", 7, "--images", 2, "--sampler", "euler", "-o", tmp_path / "apple.png", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    expected = dexport.load(workshop.bundle)(
        "red apple", negative_prompt="blue", steps=3, guidance=5, seed=7, images=2, sampler="euler"
    )
    for index, (made, image) in enumerate(zip(said.json["images"], expected.images, strict=True)):
        assert made["file"] == str(tmp_path / f"apple-{index:03d}.png")
        assert made["seed"] == 7 + index
        with Image.open(made["file"]) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(image))
            assert json.loads(drawn.info["dexport"])["prompt"] == "red apple"
            assert json.loads(drawn.info["dexport"])["size"] == [64, 64]


def test_run_reads_prompts_from_a_file(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red\n\n  apple \n", encoding="utf-8-sig")  # as some editors save it
    words = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--prompt",
        "red apple",
        "--steps",
        1,
        "-o",
        tmp_path / "new" / "all",
    )
    said = say("run", workshop.bundle, *words)
    assert said.code == 0, said.err
    assert said.out.split() == [str(tmp_path / "new" / "all" / f"{index:03d}.png") for index in range(3)]
    prompts = [read_settings(Path(file))["prompt"] for file in said.out.split()]
    assert prompts == ["red apple", "red", "apple"]


def test_a_prompt_beyond_the_context_is_a_warning_with_what_was_cut(
    say: Say, workshop: Workshop, tmp_path: Path
) -> None:
    words = ("--steps", 1, "-o", tmp_path / "a.png", "--json")
    said = say("run", workshop.bundle, "--prompt", "red apple " * 37 + "red zebra", *words)
    assert said.code == 0, said.err
    assert "warning" in said.err and "'zebra' was cut off" in said.err
    assert "zebra" in said.json["warnings"][0]
    said = say("run", workshop.bundle, "--prompt", "red apple " * 37 + "red zebra" + " apple" * 1000, *words)
    assert "'zebra apple" in said.json["warnings"][0] and "(1001 words)" in said.json["warnings"][0]
    assert len(said.json["warnings"][0]) < 200


def test_a_bundle_runs_where_nothing_but_its_runtime_is_installed(
    say: Say, say_fresh: Say, workshop: Workshop, tmp_path: Path
) -> None:
    words = ("run", workshop.bundle, "--prompt", "red apple", "--steps", 2, "--seed", 3, "-o")
    assert say(*words, tmp_path / "here.png").code == 0
    said = say_fresh(*words, tmp_path / "there.png", first=DEVICE)
    assert said.code == 0, said.err
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    for name in ("verify", "inspect"):
        assert say_fresh(name, workshop.bundle, "--json", first=DEVICE).code == 0
    assert say_fresh("bench", workshop.bundle, "--repeats", 1, "--json", first=DEVICE).json["repeats"] == 1


def test_verify_shows_each_graph_against_its_band(say: Say, workshop: Workshop) -> None:
    said = say("verify", workshop.bundle, "--json")
    assert said.code == 0, said.err
    assert said.json["passed"] is True
    assert {check["graph"] for check in said.json["checks"]} == {"text", "denoiser", "decoder", "encoder", "run"}
    assert all(check["agreement"]["sqnr_db"] >= check["least_db"] and check["passed"] for check in said.json["checks"])
    text = say("verify", workshop.bundle)
    assert "MISSED" not in text.out and "denoiser" in text.out


def test_verify_holds_one_graph_at_a_time(say: Say, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes.backends import onnxruntime as backend

    alive: WeakSet[object] = WeakSet()

    class Watched(backend.OnnxRuntimeSession):
        def __init__(self, *arguments: Any) -> None:
            assert not alive, "a graph is opened while another is"
            super().__init__(*arguments)
            alive.add(self)

    monkeypatch.setattr(backend, "OnnxRuntimeSession", Watched)
    said = say("verify", workshop.bundle)
    assert said.code == 0, said.err


def test_verify_fails_a_bundle_whose_outputs_are_not_golden(say: Say, copy_bundle: Path) -> None:
    """Golden outputs a hundredth off, with hashes that fit: only running the graph can tell."""
    from runtimes import bundle
    from runtimes.manifest import Manifest, from_json, to_json
    from runtimes.safetensors import read_header, write

    tensors = {name: entry.load() for name, entry in read_header(copy_bundle / "golden.safetensors").items()}
    write(
        copy_bundle / "golden.safetensors",
        {name: value * np.float32(1.01) if "/outputs/" in name else value for name, value in tensors.items()},
    )
    file = copy_bundle / "dexport.json"
    fields = from_json(Manifest, file.read_text(), "manifest").__dict__
    file.write_text(to_json(Manifest(**fields | {"files": bundle.list_files(copy_bundle, without=(file.name,))})))
    said = say("verify", copy_bundle, "--json")
    assert said.code == 1
    assert said.json["passed"] is False and said.json["checks"][0]["passed"] is False
    # An error of one part in a hundred is 40 dB, and SQNR's reference is the golden one: 20 log10(1.01 / 0.01).
    assert said.json["checks"][0]["agreement"]["sqnr_db"] == pytest.approx(20 * math.log10(101), abs=0.01)
    assert "MISSED" in say("verify", copy_bundle).out


def test_bench_times_every_graph(say: Say, workshop: Workshop) -> None:
    said = say("bench", workshop.bundle, "--repeats", 2, "--images", 2, "--json")
    assert said.code == 0, said.err
    times = said.json
    assert {name: graph["batch"] for name, graph in times["graphs"].items()} == {
        "text": 2, "denoiser": 4, "decoder": 2, "encoder": 2,
    }  # fmt: skip
    assert all(0 < graph["best_seconds"] <= graph["seconds"] for graph in times["graphs"].values())
    # A step is at least a call of the denoiser, and the image at least its steps but the first.
    assert times["step_seconds"] > 0.5 * times["graphs"]["denoiser"]["best_seconds"]
    assert times["image_seconds"] > 0.5 * times["step_seconds"] * (times["steps"] - 1)
    text = say("bench", workshop.bundle, "--repeats", 1)
    assert text.code == 0 and "denoiser" in text.out and "image" in text.out


def test_a_bundle_of_free_size_draws_and_is_timed(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    hub, bundle = tmp_path / "hub", tmp_path / "bundle"
    assert say("export", workshop.checkpoint, "-o", hub, "--dynamic-shape").code == 0
    made = say("compile", hub, "--target", "openvino=bf16", "-o", bundle, "--no-cache", "--json")
    assert (made.code, made.json["precision"]) == (0, "bf16"), made.err
    times = say("bench", bundle, "--repeats", 1, "--json")
    assert times.code == 0, times.err
    assert set(times.json["graphs"]) == {"text", "denoiser", "decoder", "encoder"}
    drawn = say("run", bundle, "--prompt", "red", "--steps", 1, "--size", "48x80", "-o", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (80, 48)


def test_inspect_knows_a_checkpoint_a_hub_and_a_bundle(say: Say, workshop: Workshop) -> None:
    found = {path: say("inspect", path, "--json").json for path in (workshop.checkpoint, workshop.hub, workshop.bundle)}
    assert [item["kind"] for item in found.values()] == ["checkpoint", "hub", "bundle"]
    for path in found:
        text = say("inspect", path)
        assert text.code == 0 and "StableDiffusionPipeline" in text.out


def test_doctor_agrees_with_the_runtimes(say: Say) -> None:
    import onnxruntime

    said = say("doctor", "--json")
    assert said.code == 0
    assert said.json["backends"]["onnxruntime"]["version"] == onnxruntime.__version__
    assert said.json["backends"]["onnxruntime"]["devices"]["cpu"]["precisions"] == ["fp32"]
    assert said.json["extras"]["export"]["packages"]["torch"]
    text = say("doctor")
    assert text.code == 0 and onnxruntime.__version__ in text.out


def test_doctor_says_what_to_install(say_fresh: Say) -> None:
    said = say_fresh(
        "doctor", "--json", first=BLOCK.format(names=["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"])
    )
    assert said.code == 0, said.err
    for name, found in said.json["backends"].items():
        assert found["version"] is None and found["devices"] == {}
        assert f"dexport[{name}" in found["advice"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(say: Say, shell: str) -> None:
    said = say("completion", shell)
    assert said.code == 0
    assert "_DEXPORT_COMPLETE" in said.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dexport ver", {"verify"}),
        ("dexport build --target tensorrt:sm8", {"tensorrt:sm80", "tensorrt:sm86", "tensorrt:sm89"}),
        ("dexport build --precision b", {"bf16"}),
        ("dexport run --sampler dpmpp", {"dpmpp_2m"}),
    ],
)
def test_completion_completes(words: str, expected: set[str]) -> None:
    from click.shell_completion import BashComplete

    *before, last = words.split()[1:]
    found = BashComplete(main, {}, "dexport", "_DEXPORT_COMPLETE").get_completions(before, last)
    assert expected <= {item.value for item in found}
    assert all(item.value.startswith(last) for item in found)


def test_progress_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 59.0, 61.0, 61.0, 90.0, 200.0, 200.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.working() as progress:
        for index, share in enumerate((0.1, 0.2, 0.3, 0.4)):
            progress(f"step {index}", share)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", " 20%  step 1\n 40%  step 3\n")
