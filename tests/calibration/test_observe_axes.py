"""Statistics along each axis that a layer's channels may lie on, over calls of any batch, and their file's refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration import observe
from calibration.observe import BINS, HALF, KINDS, OCTAVE, Call, Observed, Observer, Statistics
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.safetensors import read_header, write
from tests.calibration.small import Array, graph, run

RANDOM = np.random.default_rng(9)


def watched(shape: str, axis: int) -> ir.Model:
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ h = Neg(x) y = Relu(h) }}"
    return observe.watch(graph(text, {}), {"h": axis})[0]


def reduced(model: ir.Model, x: Array) -> Observed:
    outputs = run(model, {"x": x})
    return Observed(*(outputs[f"{kind}/h"] for kind in KINDS))


@pytest.mark.parametrize(
    "shape, axis", [((5, 3), 1), ((2, 7, 3), 2), ((2, 3, 7), 1), ((2, 3, 4, 4), 1), ((2, 4, 5, 3), 3), ((2, 5, 3), -1)]
)
def test_channels_on_any_axis(shape: tuple[int, ...], axis: int) -> None:
    x = RANDOM.standard_normal(shape).astype(np.float32)
    model = watched(",".join(map(str, shape)), axis)
    found, h = reduced(model, x), np.moveaxis(-x, axis, -1).reshape(-1, 3).astype(np.float64)
    np.testing.assert_array_equal(found.bounds, [(-x).min(), (-x).max()])
    np.testing.assert_array_equal(found.peaks, np.abs(h).max(0).astype(np.float32))
    np.testing.assert_allclose(found.means, h.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.powers, np.square(h).mean(0), rtol=1e-5)
    assert found.histogram.sum() == x.size and found.histogram[HALF:].sum() == (-x < 0).sum()
    np.testing.assert_array_equal(run(model, {"x": x})["y"], np.maximum(-x, 0))  # the graph's own output


@pytest.mark.parametrize("power", [-40, -24, -23, -1, 0, 10, 23, 24, 60])
def test_a_magnitude_falls_into_its_bin_or_the_last(power: int) -> None:
    x = np.full((1, 3), 2.0**power * 2 ** (0.5 / OCTAVE), np.float32)  # the middle of its octave's first bin
    place = min(max((power + 24) * OCTAVE, 0), HALF - 1)
    for sign in (1, -1):
        counts = reduced(watched("1,3", 1), -sign * x).histogram
        assert counts[place + (HALF if sign < 0 else 0)] == 3 and counts.sum() == 3
    if 0 < place < HALF - 1:
        np.testing.assert_allclose(observe.magnitudes()[place], x[0, 0], rtol=1e-6)


def statistics(batches: list[Array]) -> Statistics:
    class Session:
        max_batch = None
        model = watched("B,3", 1)

        def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
            return run(self.model, inputs)

    described = Graph("g", "model.onnx", (Tensor("x", "float32", ("batch", 3)),), (Tensor("y", "float32", (3,)),))
    observer = Observer(Session(), described, ["h"])
    for batch in batches:
        observer.run({"x": batch})
    return observer.statistics("abc", {})


def test_calls_add_up() -> None:
    batches = [(RANDOM.standard_normal((4, 3)) * size).astype(np.float32) for size in (1, 8, 0.1)]
    found, alone = statistics(batches).values["h"], [statistics([batch]).values["h"] for batch in batches]
    np.testing.assert_array_equal(found.histogram, sum(one.histogram for one in alone))
    np.testing.assert_array_equal(found.bounds, np.concatenate([one.bounds for one in alone]))
    every = -np.concatenate(batches)
    np.testing.assert_array_equal(found.peaks, np.abs(every).max(0))
    np.testing.assert_allclose(found.means, every.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.powers, np.square(every).mean(0), rtol=1e-5)
    assert found.peak == np.abs(every).max() and found.histogram.dtype == np.int64
    with pytest.raises(DexportError, match="nothing was observed"):
        statistics([])


ABOUT = {"version": 1, "source": "abc", "settings": {}, "calls": [{"prompt": "p", "timestep": 3.0}]}
NAN = np.full(3, np.nan, np.float32)


@pytest.mark.parametrize(
    "about, tensors",
    [
        (ABOUT, {"peaks/h": None}),
        (ABOUT, {"peaks/h": NAN}),
        (ABOUT, {"means/h": NAN}),
        (ABOUT, {"bounds/h": np.zeros((2, 2), np.float32)}),
        (ABOUT, {"histogram/h": np.zeros(BINS - 1, np.int64)}),
        (ABOUT, {"weights/h": NAN}),
        (ABOUT | {"version": 2}, {}),
        (ABOUT | {"calls": [{"prompt": "p", "timestep": 10**400}]}, {}),
        (ABOUT | {"calls": [{"prompt": "p", "timestep": float("inf")}]}, {}),
        (ABOUT | {"calls": 3}, {}),
        (ABOUT | {"settings": 3}, {}),
        ([ABOUT], {}),
        ("[" * 100_000, {}),
    ],
)
def test_damaged_statistics_are_refused_with_one_line(about: object, tensors: dict[str, Array], tmp_path: Path) -> None:
    file = tmp_path / "statistics"
    each = np.ones(3, np.float32)
    whole = Observed(np.array([[-1, 1]], np.float32), each, each, each, np.ones(BINS, np.int64))
    Statistics("abc", {}, (Call("p", 3.0),), {"h": whole}).save(file)
    assert observe.load(file, "abc").values["h"].peak == 1
    stored = {name: entry.load() for name, entry in read_header(file).items()}
    said = about if isinstance(about, str) else json.dumps(about)
    stored |= {"about": np.frombuffer(said.encode(), np.uint8)} | tensors
    write(file, {name: value for name, value in stored.items() if value is not None})
    with pytest.raises(DexportError) as error:
        observe.load(file, "abc")
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "statistics"
    statistics([RANDOM.standard_normal((4, 3)).astype(np.float32)]).save(file)
    data = file.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(DexportError) as error:
            observe.load(file, "abc")
        assert "\n" not in str(error.value)
