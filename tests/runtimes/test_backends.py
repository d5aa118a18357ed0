"""One suite for all backends: the same graphs, compiled for each, against torch in fp32."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.compile import compile_graph, precisions
from runtimes.backends import onnxruntime
from runtimes.errors import DexportError
from runtimes.manifest import Graph, Tensor
from runtimes.session import Session, backend, require, run_batched
from runtimes.target import DEVICES, Target
from tests.exporter.graphs import SAMPLES, Sample, relative

BANDS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}  # relative L2 distance to torch in fp32
CASES = [(name, precision) for name in DEVICES for precision in precisions(Target.parse(name))]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend and a precision that this machine runs; others are skipped with the reason."""
    name, precision = request.param
    if why := backend(name).missing():
        pytest.skip(why)
    able = backend(name).devices()[0].precisions
    if precision not in able:
        pytest.skip(f"{name} has no {precision} on this device; it has {', '.join(able)}")
    return name, precision


@pytest.fixture(params=list(SAMPLES), scope="module")
def sample(request: pytest.FixtureRequest) -> Sample:
    made: Sample = SAMPLES[request.param]()
    return made


def open_sample(sample: Sample, name: str, precision: str, folder: Path) -> tuple[Session, Graph]:
    target = Target.parse(name)
    output = folder / sample.graph.kind
    output.mkdir()
    graph = compile_graph(sample.source, sample.graph, output, target, precision, max_batch=3)
    return require(name).open(folder / graph.file, graph, target.device, 2, None), graph


@pytest.fixture(scope="module")
def opened(case: tuple[str, str], sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Graph]:
    return open_sample(sample, *case, tmp_path_factory.mktemp("bundle"))


def test_agrees_with_torch(case: tuple[str, str], sample: Sample, opened: tuple[Session, Graph]) -> None:
    session, graph = opened
    for batch in (1, 2, 3):
        inputs = sample.inputs(batch, batch)
        outputs = run_batched(session, inputs)
        expected = sample.expected(inputs)
        (output,) = graph.outputs
        assert list(outputs) == [output.name]
        assert outputs[output.name].dtype == np.dtype(output.dtype) == np.float32
        assert outputs[output.name].shape == expected.shape
        assert relative(outputs[output.name], expected) <= BANDS[case[1]]


def test_same_input_same_bytes(sample: Sample, opened: tuple[Session, Graph]) -> None:
    session, graph = opened
    inputs, others = sample.inputs(2, 5), sample.inputs(2, 6)
    first = session.run(inputs)[graph.outputs[0].name]
    kept = first.copy()
    other = session.run(others)[graph.outputs[0].name]
    again = session.run(inputs)[graph.outputs[0].name]
    assert first.tobytes() == kept.tobytes(), "a later call must not write over an earlier result"
    assert again.tobytes() == first.tobytes()
    assert other.tobytes() != first.tobytes()


def test_leaves_the_callers_arithmetic_alone(sample: Sample, opened: tuple[Session, Graph]) -> None:
    opened[0].run(sample.inputs(1, 0))
    assert np.float32(1e-38) / np.float32(16) > 0, "the runtime flushes denormals to zero in the caller's thread"


def test_takes_arrays_that_are_not_contiguous(sample: Sample, opened: tuple[Session, Graph]) -> None:
    session, graph = opened
    inputs = sample.inputs(2, 7)
    flipped = {name: np.asfortranarray(value) for name, value in inputs.items()}
    expected = session.run(inputs)[graph.outputs[0].name]
    np.testing.assert_array_equal(session.run(flipped)[graph.outputs[0].name], expected)


def test_bad_inputs_are_told_in_one_line(sample: Sample, opened: tuple[Session, Graph]) -> None:
    session, graph = opened
    good = sample.inputs(2, 0)
    first = graph.inputs[0].name
    bad = {
        f"input '{first}' is missing": {name: value for name, value in good.items() if name != first},
        "there is no input 'extra'": good | {"extra": np.zeros(1, np.float32)},
        f"input '{first}' is float64; it must be {graph.inputs[0].dtype}": good
        | {first: good[first].astype(np.float64)},
        f"input '{first}' has shape": good | {first: good[first][..., :-1]},
        f"input '{first}' has shape [0,": good | {first: good[first][:0]},
    }
    if len(good) > 1:
        bad[r"it must be [batch=2"] = good | {graph.inputs[1].name: sample.inputs(3, 0)[graph.inputs[1].name]}
    for message, inputs in bad.items():
        with pytest.raises(DexportError) as caught:
            session.run(inputs)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    session.run(good)  # and it works on


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_damaged_file(name: str, tmp_path: Path) -> None:
    sample = SAMPLES["text"]()
    file = tmp_path / ("model.onnx" if name == "onnxruntime" else "model.xml")
    file.write_bytes(b"this is no model")
    with pytest.raises(DexportError, match=r"cannot (open|read) it") as caught:
        require(name).open(file, sample.graph, "cpu", None, None)
    assert "\n" not in str(caught.value)


def test_missing_says_why() -> None:
    for name in DEVICES:
        module = backend(name)
        assert (module.missing() is None) == bool(module.devices())
        assert module.missing() is None or "\n" not in str(module.missing())


class TestOpenVino:
    def open(self, tmp_path: Path, precision: str, **properties: str) -> Session:
        _, graph = open_sample(SAMPLES["text"](), "openvino", precision, tmp_path)
        graph = replace(graph, properties={**graph.properties, **properties})
        return require("openvino").open(tmp_path / graph.file, graph, "cpu", 2, tmp_path / "cache")

    def test_computes_in_what_the_bundle_says(self, tmp_path: Path) -> None:
        for precision, used in (("fp32", "f32"), ("fp16", "f32"), ("bf16", "bf16")):
            if precision not in backend("openvino").devices()[0].precisions:
                continue
            folder = tmp_path / precision
            folder.mkdir()
            session = self.open(folder, precision)
            session.run(SAMPLES["text"]().inputs(1, 0))
            assert session.precision == used  # type: ignore[attr-defined]
            assert any((folder / "cache").iterdir()), "compiled models are kept in the cache folder"

    def test_computes_in_what_was_asked_for_or_not_at_all(self, tmp_path: Path) -> None:
        """Most CPUs turn f16 into bf16, which has three bits less; some of the latest have f16."""
        session = self.open(tmp_path, "fp32", INFERENCE_PRECISION_HINT="f16")
        try:
            session.run(SAMPLES["text"]().inputs(1, 0))
        except DexportError as error:
            assert "asked for f16, but OpenVINO computes in bf16" in str(error)
        else:
            assert session.precision == "f16"

    def test_a_bundle_sets_no_other_properties(self, tmp_path: Path) -> None:
        with pytest.raises(DexportError, match="sets 'CACHE_DIR'"):
            self.open(tmp_path, "fp32", CACHE_DIR="/somewhere")

    def test_keeps_two_compiled_models(self, tmp_path: Path) -> None:
        session = self.open(tmp_path, "fp32")
        for batch in (1, 2, 3, 2):
            session.run(SAMPLES["text"]().inputs(batch, 0))
        assert [key[0][0] for key in session._requests] == [3, 2]  # type: ignore[attr-defined]

    def test_unknown_device(self, tmp_path: Path) -> None:
        _, graph = open_sample(SAMPLES["text"](), "openvino", "fp32", tmp_path)
        if any(device.name == "npu" for device in backend("openvino").devices()):
            pytest.skip("this machine has an NPU")
        with pytest.raises(DexportError, match="OpenVINO sees no npu here; it sees CPU"):
            require("openvino").open(tmp_path / graph.file, graph, "npu", None, None)

    def test_import_phones_nobody(self) -> None:
        """A fresh interpreter: this one may have imported OpenVINO in another way."""
        code = (
            "import sys; from runtimes.backends import openvino; openvino.load();"
            "assert 'openvino.tools.ovc.telemetry_stub' in sys.modules, 'not the stub';"
            "assert 'openvino_telemetry' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


class TestTensorRt:
    """What can be tested without a GPU: that everything up to the GPU says what is wrong."""

    def open(self, tmp_path: Path, **properties: str) -> Session:
        graph = replace(SAMPLES["text"]().graph, file="model.engine", properties=properties)
        return backend("tensorrt").open(tmp_path / "model.engine", graph, "local", None, None)

    def test_flavour_and_version_must_be_the_builder_s(self, tmp_path: Path) -> None:
        version = backend("tensorrt").version()
        if version is None:
            pytest.skip("TensorRT is not installed")
        name = version.split()[0]
        other = {"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[name]
        with pytest.raises(DexportError, match=r"built with .* 0\.1, and .* is installed"):
            self.open(tmp_path, runtime=name, version="0.1")
        with pytest.raises(DexportError, match="'torch', which is none of tensorrt, tensorrt_rtx"):
            self.open(tmp_path, runtime="torch")
        if name == "tensorrt_rtx":  # then "tensorrt" is not installed: it would have been taken first
            with pytest.raises(DexportError, match=r"needs tensorrt; run: pip install 'dexport\[tensorrt\]'"):
                self.open(tmp_path, runtime=other)

    def test_without_a_gpu(self, tmp_path: Path) -> None:
        module = backend("tensorrt")
        if module.version() is None or module.missing() is None:
            pytest.skip("TensorRT is not installed, or there is a GPU")
        assert module.devices() == []
        with pytest.raises(DexportError, match=r"needs a GPU: (no NVIDIA driver|the NVIDIA driver sees no GPU)"):
            self.open(tmp_path)


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [("fpu avx2 avx512f", True), ("fpu avx2 avx_vnni", False), ("fpu avx512f avx512_vnni", False), (None, True)],
)
def test_which_x86_processors_need_other_integer_kernels(
    flags: str | None, overflow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime.platform, "machine", lambda: "x86_64")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: vnni\n")
    assert onnxruntime.sums_may_overflow(tmp_path / "cpuinfo") is overflow
    monkeypatch.setattr(onnxruntime.platform, "machine", lambda: "aarch64")
    assert not onnxruntime.sums_may_overflow(tmp_path / "cpuinfo")


def test_the_largest_integer_products_are_summed_without_overflow(tmp_path: Path) -> None:
    """255 · 127 twice is more than 16 bits hold: kernels that add pairs of products there would cut it off."""
    inputs = [
        onnx.helper.make_tensor_value_info(name, kind, [4, size])
        for name, kind, size in (("a", onnx.TensorProto.UINT8, 64), ("y", onnx.TensorProto.INT32, 8))
    ]
    weight = onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "b")
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs[:1], inputs[1:], [weight]),
        opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = Graph("denoiser", "d/model.onnx", (Tensor("a", "uint8", (4, 64)),), (Tensor("y", "int32", (4, 8)),))
    session = onnxruntime.OnnxRuntimeSession(tmp_path / "m.onnx", graph, 2, content=model.SerializeToString())
    np.testing.assert_array_equal(session.run({"a": np.full((4, 64), 255, np.uint8)})["y"], 255 * 127 * 64)
