"""int8, w8 and w4 from the command line: what is said and made, and what is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dexport.conftest import Say, Workshop

PROMPTS = ["red apple", "blue apple", "red", "apple", "green apple", "apple pie", "blue", "pie"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


def test_calibrate_then_compile_to_int8_and_draw(say: Say, workshop: Workshop, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics"
    said = say("calibrate", workshop.hub, "--prompts", prompts, "--calibration-steps", 3, "-o", file, "--json")
    assert said.code == 0, said.err
    covered = said.json["coverage"]
    assert covered["calls"] == 3 * 2 * 6 and set(covered["by_prompt"]) == set(PROMPTS[:6])  # the last two are to judge
    assert sum(covered["by_timestep"].values()) == covered["values"] > 20
    words = ("compile", workshop.hub, "--target", "openvino=int8", "--statistics", file, "--prompts", prompts)
    said = say(*words, "--budget", "psnr=15", "-o", tmp_path / "bundle")
    assert said.code == 0, said.err
    assert "layers in 8 bits" in said.out and "median of 2" in said.out
    said = say(*words, "--calibration-steps", 4, "-o", tmp_path / "other")
    assert said.code == 2 and "of 3 steps, not 4" in said.err
    turned = tmp_path / "turned.txt"
    turned.write_text("\n".join(reversed(PROMPTS)))
    said = say(*words[:-1], turned, "-o", tmp_path / "other")
    assert said.code == 2 and "was calibrated with and would be judged by" in said.err
    said = say("run", tmp_path / "bundle", "--prompt", "red apple", "--steps", 2, "-o", tmp_path / "apple.png")
    assert said.code == 0 and (tmp_path / "apple.png").exists(), said.err
    assert say("inspect", tmp_path / "bundle", "--json").json["precision"] == "int8"
    again = say("calibrate", workshop.hub, "-o", file)
    assert again.code == 2 and "exists" in again.err
    own = say("calibrate", workshop.hub, "-o", turned, "--overwrite")
    assert own.code == 2 and "is no file of statistics" in own.err and turned.read_text().startswith("pie")


def test_a_table_says_where_the_ranges_were_reached(
    say: Say, workshop: Workshop, prompts: Path, tmp_path: Path
) -> None:
    said = say("calibrate", workshop.hub, "--prompts", prompts, "--calibration-steps", 2, "-o", tmp_path / "statistics")
    assert said.code == 0, said.err
    assert "ranges reached here" in said.out and "green apple" in said.out and "last quarter of the prompts" in said.out


def test_narrow_weights_are_small_and_pass_their_gate(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    pairs = [f"{target}={precision}" for target in ("onnxruntime", "openvino") for precision in ("w8", "w4")]
    targets = [word for pair in pairs for word in ("--target", pair)]
    said = say("build", workshop.checkpoint, *targets, "-o", tmp_path / "bundles", "--json")
    assert said.code == 0, said.err
    for pair, built in zip(pairs, said.json["bundles"], strict=True):
        assert f"{built['target']}={built['precision']}" == pair and built["accuracy"]["gate"] == "passed"
        sqnr = [call["sqnr_db"] for call in built["accuracy"]["graphs"]["denoiser"]]
        assert (20 if pair.endswith("w8") else 8) <= min(sqnr) < 60  # narrow it is, and near
        (weights,) = (Path(built["folder"]) / "denoiser").glob("*.data" if "onnx" in pair else "*.bin")
        assert weights.stat().st_size < 0.4 * (workshop.hub / "denoiser" / "model.onnx.data").stat().st_size
        said = say("run", built["folder"], "--prompt", "red apple", "--steps", 2, "-o", tmp_path / "apple.png")
        assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--budget", "psnr=36"), "add --precision int8"),
        (("--precision", "int8", "--budget", "loss=1"), "'loss=1' is no budget"),
        (("--precision", "int8", "--observer", "median"), "no observer 'median'; there are min-max"),
        (("--precision", "int8", "--prompts", "nowhere.txt"), "nowhere.txt: cannot be read (No such file"),
        (("--precision", "int8", "--statistics", "no/folder/file"), "name a file in a folder that exists"),
        (("--precision", "int8", "--calibration-steps", "0"), "--calibration-steps"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    say: Say, workshop: Workshop, words: tuple[str, ...], part: str, tmp_path: Path
) -> None:
    said = say("build", workshop.checkpoint, "--target", "openvino", *words, "-o", tmp_path / "bundle")
    assert said.code == 2 and part in said.err and not (tmp_path / "bundle").exists()
    assert "exporting" not in said.err


def test_a_missed_budget_exits_1_and_writes_nothing(
    say: Say, workshop: Workshop, prompts: Path, tmp_path: Path
) -> None:
    said = say(
        "compile", workshop.hub, "--target", "onnxruntime=int8", "--prompts", prompts, "--calibration-steps", 2,
        "--budget", "psnr=190", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert said.code == 1 and "cannot be met: the best found has" in said.err
    assert list(tmp_path.iterdir()) == []
