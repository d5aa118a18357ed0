"""Statistics taken inside a graph are numpy's of the same values; their file is exact, and refuses what is not its."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibration import observe
from calibration.coverage import coverage, reached
from calibration.observe import BINS, HALF, Observer, Statistics, magnitudes
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.safetensors import read_header, write
from tests.calibration.small import Array, graph, run

TEXT = "g (float[B,3,4,4] sample, float[B] timestep) => (float[B,3,4,4] output) { h = Tanh(sample) output = Mul(h, h) }"
GRAPH = Graph(
    "denoiser", "model.onnx",
    (Tensor("sample", "float32", ("batch", 3, 4, 4)), Tensor("timestep", "float32", ("batch",))),
    (Tensor("output", "float32", ("batch", 3, 4, 4)),),
)  # fmt: skip


class Watched:
    """The watched graph as a session."""

    max_batch = None

    def __init__(self, names: dict[str, int]) -> None:
        self.model, _ = observe.watch(graph(TEXT, {}), names)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return run(self.model, inputs)


def seen(samples: list[Array]) -> Statistics:
    names = {"sample": 1, "h": 1}
    observer = Observer(Watched(names), GRAPH, list(names))
    for index, sample in enumerate(samples):
        observer.prompt = f"prompt {index // 2}"
        outputs = observer.run({"sample": sample, "timestep": np.full(len(sample), 900 - index, np.float32)})
        assert list(outputs) == ["output"]
        np.testing.assert_allclose(outputs["output"], np.tanh(sample) ** 2, rtol=1e-5, atol=1e-7)
    return observer.statistics("abc", {"steps": 4})


@pytest.fixture(scope="module")
def samples() -> list[Array]:
    random = np.random.default_rng(0)
    return [(random.standard_normal((2, 3, 4, 4)) * 10.0 ** (index - 2)).astype(np.float32) for index in range(4)]


def test_the_figures_are_those_of_numpy(samples: list[Array]) -> None:
    found, every = seen(samples).values["sample"], np.stack(samples)
    np.testing.assert_array_equal(found.bounds, [[sample.min(), sample.max()] for sample in samples])
    np.testing.assert_array_equal(found.peaks, np.abs(every).max((0, 1, 3, 4)))
    np.testing.assert_allclose(found.means, every.mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.powers, np.square(every).mean((0, 1, 3, 4)), rtol=1e-5)
    edges = 2.0 ** (observe.LOWEST + np.arange(HALF + 1) / observe.OCTAVE)
    edges[0] = 0
    positive = np.histogram(every[every >= 0], edges)[0]
    negative = np.histogram(-every[every < 0], edges)[0]
    assert found.histogram.sum() == every.size and found.histogram.shape == (BINS,)
    # The logarithm is float32's: what lies on an edge may fall to either side.
    assert np.abs(np.cumsum(found.histogram[:HALF]) - np.cumsum(positive)).max() <= 1
    assert np.abs(np.cumsum(found.histogram[HALF:]) - np.cumsum(negative)).max() <= 1


def test_zeros_are_counted_as_zeros() -> None:
    found = seen([np.zeros((1, 3, 4, 4), np.float32)]).values["sample"]
    assert found.histogram[0] == 48 and magnitudes()[0] == 0 and found.peak == 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(wrong: float) -> None:
    sample = np.zeros((1, 3, 4, 4), np.float32)
    sample[0, 1, 2, 3] = wrong
    with pytest.raises(DexportError, match="'sample' is not finite at timestep 900") as error:
        seen([sample])
    assert "\n" not in str(error.value)


def test_a_file_gives_back_every_bit(samples: list[Array], tmp_path: Path) -> None:
    made = seen(samples)
    made.save(tmp_path / "statistics")
    read = observe.load(tmp_path / "statistics", "abc")
    assert read.calls == made.calls and read.settings == made.settings and set(read.values) == set(made.values)
    for name, value in made.values.items():
        for kind in observe.KINDS:
            np.testing.assert_array_equal(getattr(read.values[name], kind), getattr(value, kind))
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]


def test_files_that_are_refused(samples: list[Array], tmp_path: Path) -> None:
    file = tmp_path / "statistics"
    seen(samples).save(file)
    with pytest.raises(DexportError, match="of another model"):
        observe.load(file, "def")
    tensors = {name: entry.load() for name, entry in read_header(file).items()}
    about = json.loads(tensors["about"].tobytes())

    def damaged(change: dict[str, Array], match: str) -> None:
        write(tmp_path / "damaged", {name: value for name, value in (tensors | change).items() if value is not None})
        with pytest.raises(DexportError, match=match):
            observe.load(tmp_path / "damaged", "abc")

    def said(**changes: object) -> dict[str, Array]:
        return {"about": np.frombuffer(json.dumps(about | changes).encode(), np.uint8)}

    damaged(said(version=99), "version 99")
    damaged(said(calls=[{"prompt": "x"}]), "damaged")
    damaged(said(calls=about["calls"][:2]), "'sample' are damaged|'h' are damaged")
    damaged({"about": np.frombuffer(b"{", np.uint8)}, "damaged")
    damaged({"peaks/h": tensors["peaks/h"][:2]}, "'h' are damaged")
    damaged({"bounds/h": tensors["bounds/h"] * np.nan}, "damaged|finite")
    damaged(said(calls=[]), "damaged; calibrate again")
    damaged({"powers/h": tensors["powers/h"] * np.nan}, "'h' are damaged; calibrate again")
    damaged({"histogram/h": -tensors["histogram/h"]}, "'h' are damaged; calibrate again")
    damaged({"histogram/h": 0 * tensors["histogram/h"]}, "'h' are damaged; calibrate again")
    damaged({"bounds/h": tensors["bounds/h"] > 0}, "'h' are damaged; calibrate again")
    write(tmp_path / "other", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(DexportError, match="no calibration statistics"):
        observe.load(tmp_path / "other", "abc")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DexportError):
        observe.load(file, "abc")


def test_coverage_says_where_a_range_was_reached(samples: list[Array]) -> None:
    statistics = seen(samples)  # each call's values are ten times the last one's
    found = coverage(statistics)
    assert found.values == 2 and found.calls == 4
    assert found.by_timestep == {900.0: 0, 899.0: 0, 898.0: 0, 897.0: 2}
    assert found.by_prompt == {"prompt 0": 0, "prompt 1": 2}
    assert found.late == 0.5 + 0.5 * (np.abs(np.tanh(samples[3])).max() > 1.1 * np.abs(np.tanh(samples[1])).max())
    where = reached(statistics, "sample")
    assert where.high == samples[3].max() and where.high_at == (897.0, "prompt 1")
