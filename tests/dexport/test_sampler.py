"""``dexport sampler``: the table of a sampler as text, JSON and picture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from runtimes.presets import PRESETS
from runtimes.samplers import compile_table
from runtimes.samplers.describe import _row, describe, formula, spread

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
        (["euler", "--steps", "1000000"], "too many"),
        ([""], "no sampler ''"),
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


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m_karras", "flow_heun", "dpmpp_sde"])
def test_sigma_is_that_of_a_start_from_an_image_at_each_step(name: str) -> None:
    rows = describe(name, steps=9)["rows"]
    mixes = [compile_table({}, 9, sampler=name, begin=begin).mix for begin in range(9)]
    told = [row["sigma"] for row in rows if row["sigma"] is not None]
    assert told == [noise / signal if signal else None for signal, noise in mixes if signal]


def test_a_long_table_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes import samplers

    made: list[object] = []
    compiled = samplers.compile_table
    monkeypatch.setattr(samplers, "compile_table", lambda *args, **more: made.append(1) or compiled(*args, **more))
    assert len(describe("dpmpp_2m_karras", steps=999)["rows"]) == 999
    assert len(made) == 1


def test_rows_without_a_call_are_told_apart(say: Say) -> None:
    said = say("sampler", "RePaintScheduler", "--steps", 15, "--json").json
    table = compile_table({"_class_name": "RePaintScheduler"}, 15)
    assert [row["calls"] for row in said["rows"]] == [row.calls for row in table.rows]
    assert said["calls"] == sum(row.calls for row in table.rows) < len(table.rows)
    text = say("sampler", "RePaintScheduler", "--steps", 15).out
    assert text.count("no call") == len(table.rows) - said["calls"]
    assert f"{said['calls']} calls of the model" in text.splitlines()[0]


def test_learned_variance_and_thresholding_are_shown(say: Say, tmp_path: Path) -> None:
    for options, told, words in (
        ({"variance_type": "learned"}, ("deviation", [0.0, 0.0, 0.5]), "V^0.5"),
        ({"variance_type": "learned_range"}, ("deviation", None), " V)"),
        ({"thresholding": True, "sample_max_value": 1.5}, ("threshold", 0.995), "quantile 0.995 (at most 1.5)"),
    ):
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"_class_name": "DDPMScheduler", **options}))
        row = say("sampler", "ddpm", "--steps", 4, "--of", file, "--json").json["rows"][0]
        assert row[told[0]] == told[1] if told[1] else row[told[0]]
        assert words in say("sampler", "ddpm", "--steps", 4, "--of", file).out
    assert spread((-4.25, 1.5, 0.0)) == "exp(-4.25 + 1.5 V)" and spread((-4.25, -1.5, 0.0)) == "exp(-4.25 - 1.5 V)"


def test_there_is_no_sigma_where_there_is_no_signal() -> None:
    first, second = describe("SCMScheduler", steps=2)["rows"]
    assert first["sigma"] is None
    assert second["sigma"] == pytest.approx(0.5 * math.tan(1.3))


def test_rounding_noise_is_left_out() -> None:
    terms = [abs(weight) for row in describe("ddim", steps=50)["rows"] for weight in row["X"].values()]
    assert min(terms) > 1e-6
    rows = compile_table({}, 50, sampler="ddim").rows
    noisy = dataclasses.replace(rows[0], x_x=1e-16)
    assert "X" not in _row(noisy)["X"] and _row(noisy)["X"]["H0"] == rows[0].x_h[0]


def test_formulas_read_as_people_write_them() -> None:
    assert formula({"X": 0.98, "M": -0.125}) == "0.98 X - 0.125 M"
    assert formula({"X": -1.0, "H0": 1.0}) == "-X + H0"
    assert formula({}) == "0"


def test_options_are_given_by_name(say: Say) -> None:
    words = ("sampler", "euler", "--steps", "4", "--json", "--scheduler")
    rows = json.loads(say(*words, "timestep_spacing=trailing").out)["rows"]
    assert [row["t"] for row in rows] == [999.0, 749.0, 499.0, 249.0]
    for option, error in (
        ("spacing=trailing", "EulerDiscreteScheduler has no option 'spacing'; it has num_train_timesteps, "),
        ("trailing", "'trailing' is not NAME=VALUE, like timestep_spacing=trailing"),
    ):
        said = say(*words, option)
        assert said.code == 2 and error in said.err
    assert "give each option once" in say(*words, "shift=1", "--scheduler", "shift=2").err


def test_presets_are_listed_where_they_are_asked_for(say: Say) -> None:
    for command in ("build", "export", "run"):
        text = " ".join(say(command, "--help").out.split())
        assert all(name in text.replace(" ", "") for name in PRESETS)
    assert "'x' is not one of 'lcm', " in say("build", "c", "--target", "onnxruntime", "-o", "b", "--preset", "x").err
