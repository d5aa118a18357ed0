"""int8 bundles of the reference model: within their budget, with reasons, or refused with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from calibration import mixed, observe, quantize, recipe, sensitivity
from calibration.calibrate import calibrate, instrument, source
from calibration.graph import Array
from calibration.numbers import NUMBERS, with_half_scales
from calibration.observe import Statistics
from calibration.quality import SEED, Budget, Quality, draw_float
from calibration.recipe import Done
from exporter import build, hub, quantized
from exporter.compile import check
from exporter.quantized import Quantization
from exporter.report import quantization
from exporter.spread import FLOORS
from runtimes import bundle
from runtimes.errors import DexportError, GateError
from runtimes.manifest import Model
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.target import Target

EMOJI = Path(__file__).parents[2] / "examples/emoji/model"
PROMPTS = (
    "red apple", "rocket", "dog face", "umbrella", "smiling face", "house with garden", "ice cream", "blue heart",
)  # fmt: skip
GRAPH = "denoiser"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, Path]:
    """The reference model's hub, and statistics of it."""
    folder = tmp_path_factory.mktemp("quantized")
    model = hub.export(EMOJI, folder / "hub")
    quantized.calibrate_hub(folder / "hub", folder / "statistics", prompts=PROMPTS, steps=6)
    return model, folder / "hub", folder / "statistics"


def loaded(made: tuple[Model, Path, Path]) -> Statistics:
    model, folder, statistics = made
    return observe.load(statistics, source(model, folder))


@pytest.mark.parametrize(("target", "least"), [("openvino", 42), ("onnxruntime", 30)])
def test_a_bundle_meets_its_budget_and_says_how(
    made: tuple[Model, Path, Path], target: str, least: int, tmp_path: Path
) -> None:
    """For OpenVINO the budget is above what int8 alone reaches, so blocks must be kept; for the other it is below."""
    _, folder, statistics = made
    asked = Quantization(budget=f"psnr={least}", prompts=PROMPTS, statistics=statistics)
    manifest = build.compile_hub(folder, tmp_path / "bundle", target=target, precision="int8", quantization=asked)
    report = manifest.accuracy["quantization"]
    assert np.median(report["psnr_db"]) >= least and report["prompts"] == list(PROMPTS[-2:])
    if target == "openvino":
        assert report["attempts"][0]["psnr_median_db"] < least and report["kept"]
        check_the_plan(report)
    else:  # nothing was timed, so the same input gives the same manifest
        assert len(report["attempts"]) == 1 and report["kept"] == report["not_faster"] == []
        assert report["quantized"] > 150 and all(set(one) == {"name", "precision"} for one in report["blocks"])
    assert "unet.conv_in" in report["left"]
    assert min(report["sqnr_db"]) > 16
    assert manifest.model.graphs["decoder"].properties["precision"] == quantized.BESIDE[target]
    assert json.loads((tmp_path / "bundle" / bundle.MANIFEST).read_text())["precision"] == "int8"
    pipeline = Pipeline.load(tmp_path / "bundle")
    exact = draw_float(hub.load(folder), folder, ["red apple"], steps=10).pictures[0]
    *_, last = pipeline.generate(Request(["red apple"], steps=10, seed=SEED, guidance_batch="sequential"))
    error = np.square(pipeline.decode(last.sample) - exact).mean()
    assert 25 < -10 * np.log10(error) < 60  # int8 it is, and near
    weights = sum(path.stat().st_size for path in (tmp_path / "bundle" / GRAPH).iterdir())
    assert weights < (0.58 if target == "openvino" else 0.5) * sum(  # what is kept is stored in fp16 there
        path.stat().st_size for path in (folder / GRAPH).iterdir()
    )


def check_the_plan(report: dict[str, Any]) -> None:
    """Every block has its figures, a reason where it is kept, and a row in the report."""
    good = [one for one in report["attempts"] if one["psnr_median_db"] >= 42]
    assert len(report["kept"]) in {one["kept"] for one in good}
    assert sum("saved_seconds" in one for one in good) == len(good) - 1  # beside the one that keeps the fewest
    blocks = {one["name"]: one for one in report["blocks"]}
    kept = {name for name, one in blocks.items() if one["precision"] != "int8"}
    assert kept == {*report["kept"], *report["not_faster"]} == {name for name, one in blocks.items() if "why" in one}
    assert len(blocks) > 25 and all(len(one["sqnr_db"]) == sensitivity.CALLS for one in blocks.values())
    for one in blocks.values():
        ratios = 10 ** (-np.array(list(one["sqnr_db"].values())) / 10)
        assert one["noise"] == pytest.approx(ratios.mean(), rel=0.02) and "saved_seconds" in one
    assert len(report["sqnr_db"]) == len(report["timesteps"]) == 2 * len(report["latents_sqnr_db"]) == 20
    assert 15 < min(report["latents_sqnr_db"]) < 60 and report["latents_sqnr_db"][0] > report["latents_sqnr_db"][-1]
    page = ElementTree.fromstring(f"<div>{quantization(report)}</div>")
    lines = [line.attrib["points"].split() for line in page.iter("polyline")]
    assert [len(line) for line in lines] == [20, 10]
    rows = [[cell.text or "" for cell in row] for row in page.iter("tr")]
    for name, one in blocks.items():
        row = next(row for row in rows if row[0] == name and len(row) == 6)
        assert row[1] == one["precision"] and float(row[4]) == pytest.approx(one["saved_seconds"] * 1e3, rel=0.01)
        assert row[5] == one.get("why", "")


def test_a_budget_that_cannot_be_met_fails_with_the_best(made: tuple[Model, Path, Path], tmp_path: Path) -> None:
    _, folder, statistics = made
    asked = Quantization(budget="psnr=90", prompts=PROMPTS, statistics=statistics)
    with pytest.raises(
        GateError,
        match=r"budget of 90 dB cannot be met: the best found has \d+\.\d+ dB, .*share of the noise: unet\S+ \d+%, ",
    ) as error:
        build.compile_hub(folder, tmp_path / "bundle", target="openvino", precision="int8", quantization=asked)
    assert error.value.exit_code == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_engine_is_built_from_a_quantized_graph_that_was_judged(
    made: tuple[Model, Path, Path], precision: str, tmp_path: Path
) -> None:
    """By simulation, since no engine runs here; what it is made of can be seen: weights of a byte each."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    _, folder, statistics = made
    asked = Quantization("psnr=15", PROMPTS, statistics)
    manifest = build.compile_hub(
        folder, tmp_path / "bundle", target="tensorrt:sm89", precision=precision, quantization=asked
    )
    engine = (tmp_path / "bundle" / manifest.model.graphs[GRAPH].file).read_bytes()
    tensor = ir.load(folder / GRAPH / "model.onnx").graph.initializers["unet.mid_block.resnets.0.conv1.weight"]
    assert tensor.const_value is not None
    weight, numbers = tensor.const_value.numpy(), with_half_scales(NUMBERS[precision])
    held = quantize.round_weight(weight, quantize.weight_scale(weight, 0, numbers), 0, numbers)
    assert any(np.ascontiguousarray(order).tobytes()[:64] in engine for order in (held, held.transpose(0, 2, 3, 1)))
    assert weight.astype(np.float16).tobytes()[:64] not in engine
    report = manifest.accuracy["quantization"]
    assert report["simulated"].startswith("simulated on ONNX Runtime") and 15 < np.median(report["psnr_db"]) < 60
    assert report["quantized"] > 80 and min(report["sqnr_db"]) > FLOORS[precision].graph
    assert manifest.model.graphs["decoder"].properties["precision"] == "fp16"
    assert set(manifest.accuracy["fp16"]["graphs"]) == set(manifest.model.graphs)


@pytest.mark.parametrize("target", ["tensorrt:sm75", "tensorrt:sm86", "openvino", "openvino:gpu", "onnxruntime"])
def test_fp8_is_refused_where_nothing_multiplies_it(target: str) -> None:
    if target.startswith("tensorrt"):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        for newer in ("tensorrt:sm89", "tensorrt:sm120", "tensorrt:sm121"):
            check(Target.parse(newer), "fp8")
    with pytest.raises(DexportError, match=f"^{target} has no precision 'fp8': .*; it has fp32, .*int8") as error:
        check(Target.parse(target), "fp8")
    assert "\n" not in str(error.value)


def test_statistics_of_another_model_and_bad_settings_are_refused_before_the_work(
    made: tuple[Model, Path, Path], tmp_path: Path
) -> None:
    _, folder, _ = made
    other = replace(loaded(made), source="0" * 64)
    other.save(tmp_path / "other")

    def refused(match: str, precision: str = "int8", **settings: object) -> None:
        with pytest.raises(DexportError, match=match) as error:
            build.compile_hub(
                folder, tmp_path / "bundle", target="openvino", precision=precision,
                quantization=Quantization(**settings),  # type: ignore[arg-type]
            )  # fmt: skip
        assert "\n" not in str(error.value) and not (tmp_path / "bundle").exists()

    refused("of another model", statistics=tmp_path / "other")
    refused("2 different prompts are too few", prompts=["a", "b", "a"])
    refused("5 different prompts are too few", prompts=["a", "b", "c", "d", "e", "e"])
    refused("a prompt is no text", prompts=[1, 2, 3, 4, 5, 6])
    refused("whole number from 1", steps=2.5)
    refused("a prompt is empty", prompts=["a", "b", "c", "d", " "])
    refused("no such file|cannot be read", prompts=tmp_path / "none.txt")
    refused("is no budget", budget="ssim=1")
    refused("is no budget", budget="psnr=nan")
    refused("is no budget", budget=36)
    refused("no observer 'median'", observer="median")
    refused("steps of a calibration must be a whole number from 1", steps=0)
    refused("no place for statistics", statistics=tmp_path / "no" / "folder")
    refused("none is asked for; add --precision int8", precision="bf16", budget="psnr=36")
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1") * 9)
    refused("not UTF-8", prompts=tmp_path / "latin.txt")


def test_a_calibration_sees_every_timestep_with_and_without_the_prompt(made: tuple[Model, Path, Path]) -> None:
    found = loaded(made)
    assert len(found.calls) == 6 * 6 * 2 and len({call.timestep for call in found.calls}) == 6
    assert {call.prompt for call in found.calls} == set(PROMPTS[:6])
    again = calibrate(*made[:2], PROMPTS[:4], steps=2)
    np.testing.assert_array_equal(
        again.values["sample"].bounds[0], found.values["sample"].bounds[0]
    )  # the same noise, and the sampler's first timestep
    with pytest.raises(DexportError, match="too few to calibrate"):
        calibrate(*made[:2], PROMPTS[:2])


def test_what_was_only_zeros_is_left_and_reported(made: tuple[Model, Path, Path]) -> None:
    model, folder, _ = made
    found = loaded(made)
    file = folder / model.graphs[GRAPH].file
    layers, _ = recipe.candidates(ir.load(file))
    name = str(layers[3].input.name)
    nothing = replace(found.values[name], bounds=np.zeros_like(found.values[name].bounds))
    _, done = recipe.apply(ir.load(file), replace(found, values={**found.values, name: nothing}), recipe.Recipe())
    assert done.left[layers[3].name] == "its input was only zeros"
    assert layers[3].name not in done.quantized


def test_each_blocks_noise_is_what_the_output_shows(made: tuple[Model, Path, Path]) -> None:
    """Noise of all blocks together is about the sum of each one's: what the search of a plan rests on."""
    model, folder, _ = made
    file, found = folder / model.graphs[GRAPH].file, loaded(made)
    judged = draw_float(model, folder, PROMPTS[:1], steps=4)
    apart = "unet.mid_block.resnets.0.conv1"
    noise = sensitivity.noise(file, model.graphs[GRAPH], found, recipe.Recipe(), judged.calls, apart=[apart])
    shares = {name: float(np.mean(list(by_timestep.values()))) for name, by_timestep in noise.items()}
    assert {"unet.mid_block.resnets.0", apart} <= set(shares)
    _, values = instrument(file)
    assert len(shares) > 25 and min(shares.values()) > 0 and len(values) > 100
    switched, blocks = sensitivity.switched(file, found, recipe.Recipe())
    folder_ = str(file.parent)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder_)
    session = onnxruntime.InferenceSession(ir.to_proto(switched).SerializeToString(), options)

    def output(inputs: dict[str, Array], on: float) -> Array:
        feed = {**inputs, sensitivity.SWITCHES: np.full(len(blocks), on, np.float32)}
        return np.asarray(session.run(["output"], feed)[0], np.float64)

    chosen = [judged.calls[int(place)][0] for place in np.linspace(0, len(judged.calls) - 1, sensitivity.CALLS)]
    both = [(output(inputs, 0), output(inputs, 1)) for inputs in chosen]
    together = np.mean([np.square(b - a).sum() / np.square(a).sum() for a, b in both])
    assert 0.4 < together / sum(shares.values()) < 2.5


NOISE = {"a": 1.0, "b": 8.0, "c": 2.0, "d": 4.0, "s": 1.5}
SAVED = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 100.0, "s": -0.5}


class Attempts:
    """Builds whose noise adds up, and whose seconds are 200 less what 8 bits save."""

    def __init__(self, names: str, saved: Mapping[str, float] = SAVED, error: float = 0.0) -> None:
        self.names, self.saved, self.error, self.tried = names, saved, error, list[frozenset[str]]()

    def __call__(self, keep: frozenset[str]) -> Quality:
        self.tried.append(keep)
        return Quality((40 - sum(NOISE[name] for name in self.names if name not in keep),), (), ())

    def seconds(self, keep: frozenset[str]) -> float:
        return 200 - sum(self.saved[name] for name in self.names if name not in keep)

    def race(self, first: frozenset[str], second: frozenset[str]) -> mixed.Gain:
        assert first in self.tried and second in self.tried
        return mixed.Gain(self.seconds(first), self.seconds(first) - self.seconds(second), self.error)

    def search(self, budget: float, *slow: str) -> mixed.Plan:
        costs = mixed.Costs({name: {1.0: NOISE[name]} for name in self.names}, SAVED, slow)
        return mixed.search(Budget(budget), self, lambda: costs, self.race)


def test_the_search_finds_the_fastest_assignment() -> None:
    attempts = Attempts("abcd")
    plan = attempts.search(34.0)
    # By the noise for each second saved, b, c, a: d would cost most of the speed.
    assert plan.chosen.blocks == ("b", "c") and plan.costs is not None and plan.chosen.layers == ()
    every = [frozenset(some) for count in range(5) for some in combinations("abcd", count)]
    good = [keep for keep in every if Attempts("abcd")(keep).median >= 34]
    assert attempts.seconds(plan.chosen.keep) == min(map(attempts.seconds, good))
    assert attempts.tried[0] == frozenset() and len(plan.attempts) == len(attempts.tried) <= 5
    quick = Attempts("abcd").search(20.0)
    assert quick.chosen.keep == frozenset() and quick.costs is None and len(quick.attempts) == 1
    with pytest.raises(GateError, match=r"best found has 36.00 dB, with 3 of 4 blocks .*noise: b 53%, d 27%, c 13%"):
        Attempts("abcd").search(41.0)


@pytest.mark.parametrize(
    ("names", "slow", "said"),
    [
        ("a", (), "has 39.00 dB, and there is nothing but for a that could be left in floating point; this bundle"),
        ("", (), "has 40.00 dB, and there is nothing of what 8 bits make faster that could be left"),
        ("s", ("s",), "has 38.50 dB, and there is nothing of what 8 bits make faster that could be left"),
        ("as", ("s",), "has 39.00 dB, and there is nothing but for a that could be left"),
    ],
)
def test_where_there_is_nothing_to_keep_the_line_says_so(names: str, slow: tuple[str, ...], said: str) -> None:
    with pytest.raises(GateError, match=said):
        Attempts(names).search(50.0, *slow)


def test_a_denoiser_without_a_layer_for_8_bits_is_refused_before_it_is_calibrated(
    made: tuple[Model, Path, Path], tmp_path: Path
) -> None:
    """Of the first and the last layer alone, which stay in floating point."""
    model, folder, _ = made
    copy = Path(shutil.copytree(folder, tmp_path / "hub"))
    file = copy / model.graphs[GRAPH].file
    graph = ir.load(file)
    layers = recipe.candidates(graph)[0]
    for layer in layers:  # a product of activations, as far as can be seen
        layer.node.op_type = "Einsum"
    ir.save(graph, file.with_name("other.onnx"))
    file.unlink()
    file.with_name("other.onnx").rename(file)
    with pytest.raises(DexportError, match=r"has no layer for 8 bits: .* take fp32, bf16 or fp16"):
        quantized.calibrate_hub(copy, tmp_path / "statistics")
    assert not (tmp_path / "statistics").exists()


def test_what_is_no_faster_is_kept_from_the_first_try_on() -> None:
    attempts = Attempts("abcds")
    plan = attempts.search(24.5, "s")
    assert plan.chosen.blocks == () and plan.chosen.layers == ("s",)  # enough without any block
    assert all("s" in keep for keep in attempts.tried[1:]) and not plan.attempts[0].layers
    plan = Attempts("abcds").search(34.0, "s")
    assert plan.chosen.blocks == ("b", "c") and plan.chosen.keep == {"b", "c", "s"}


@pytest.mark.parametrize(
    ("saved", "error", "kept"),
    [
        (-30.0, 1.0, 3),  # together with its neighbours, a in 8 bits costs time: it kept too is faster, and good
        (-30.0, 16.0, 2),  # who knows
        (-3.0, 0.1, 2),  # as fast
    ],
)
def test_in_the_end_the_good_tries_race(saved: float, error: float, kept: int) -> None:
    plan = Attempts("abcd", {**SAVED, "a": saved}, error).search(34.0)
    assert len(plan.chosen.blocks) == kept and list(plan.races) == [3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet.down_blocks.0.resnets.1.conv1", "unet.down_blocks.0.resnets.1"),
        ("unet.up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj", "unet.up_blocks.2.attentions.0"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0"),
        ("transformer.transformer_blocks.3.attn1.to_out.0", "transformer.transformer_blocks.3"),
        ("unet.conv_out", "unet.conv_out"),
    ],
)
def test_blocks(name: str, expected: str) -> None:
    assert recipe.block(name) == expected


def test_a_report_has_seconds_only_where_something_was_timed() -> None:
    quality, done = Quality((35.0,), (), ()), Done((), (), {})
    for timed in (True, False):
        costs = mixed.Costs({"a": {1.0: 0.5}, "b": {1.0: 0.1}}, {"a": 2e6, "b": 1e6}, timed=timed)
        chosen = mixed.Attempt(("a",), (), quality)
        kept, other = quantized.blocks(mixed.Plan(chosen, (chosen,), costs), done, "fp32", "int8")
        assert (kept["precision"], other["precision"]) == ("fp32", "int8") and "why" not in other
        assert ("saved_seconds" in kept, "second" in kept["why"], "multiplications" in kept["why"]) == (
            timed,
            timed,
            not timed,
        )
