"""``dexport sampler``: the table of a sampler as text, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from runtimes.samplers import compile_table
from runtimes.samplers.describe import formula

if TYPE_CHECKING:
    from tests.dexport.conftest import Say, Workshop


def test_json_is_the_table(say: Say) -> None:
    said = say("sampler", "euler_karras", "--steps", 7, "--json")
    assert said.code == 0, said.err
    config = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    table = compile_table(config, 7)
    assert (said.json["sampler"], said.json["calls"]) == ("EulerDiscreteScheduler", 7)
    assert said.json["init_scale"] == table.init_scale
    for told, row in zip(said.json["rows"], table.rows, strict=True):
        assert (told["t"], told["scale"], told["X"]["M"]) == (row.t, row.scale, row.x_m)
    sigmas = [row["sigma"] for row in said.json["rows"]]
    np.testing.assert_allclose([row["scale"] for row in said.json["rows"]], 1 / np.hypot(sigmas, 1), rtol=1e-12)


def test_the_schedule_may_be_anothers(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(
        (workshop.checkpoint / "scheduler/scheduler_config.json").read_text()
    )
    places = (workshop.checkpoint, workshop.hub, workshop.bundle, tmp_path / "scheduler_config.json")
    told = [say("sampler", "ddim", "--of", place, "--json").json["rows"] for place in places]
    assert told[0] == told[1] == told[2] == told[3]
    assert told[0] != say("sampler", "ddim", "--json").json["rows"]


def test_text_shows_each_call(say: Say) -> None:
    said = say("sampler", "DPM++ 2M", "--steps", 3)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].startswith("DPMSolverMultistepScheduler, 3 steps")
    assert len([line for line in lines if line.strip()]) == 5
    assert "H1" in lines[3] and "yes" in lines[3]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_draws(say: Say, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"euler.{ending}"
    said = say("sampler", "euler", "--plot", file)
    assert said.code == 0, said.err
    if ending == "png":
        with Image.open(file) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
    else:
        assert file.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_wrong_words_are_one_line(say: Say, say_fresh: Say, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text("{")
    for words, part in (
        (["magic"], "no sampler 'magic'"),
        (["euler_ancestral_karras"], "no form with karras sigmas"),
        (["euler", "--of", tmp_path / "nowhere"], "nowhere"),
        (["euler", "--of", tmp_path / "list.json"], "not a scheduler's config"),
        (["euler", "--of", tmp_path / "half.json"], "not valid JSON"),
        (["euler", "--plot", tmp_path / "a.gif"], ".png, .svg, .pdf"),
        (["euler", "--plot", tmp_path / "no" / "a.png"], "cannot be written"),
    ):
        said = say("sampler", *words, "--json")
        assert said.code == 2
        assert part in said.err and json.loads(said.out)["exit_code"] == 2
    said = say_fresh(
        "sampler", "euler", "--plot", tmp_path / "a.png", first="import sys; sys.modules['matplotlib'] = None"
    )
    assert (said.code, "dexport[plot]" in said.err) == (2, True)


def test_formulas_read_as_people_write_them() -> None:
    assert formula({"X": 0.98, "M": -0.125}) == "0.98 X - 0.125 M"
    assert formula({"X": -1.0, "H0": 1.0}) == "-X + H0"
    assert formula({}) == "0"
