"""Our strict reader against the safetensors package, and the files that it must not let pass."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from runtimes.errors import DexportError
from runtimes.safetensors import check_finite, read_header, write

RANDOM = np.random.default_rng(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_reads_what_safetensors_writes(file: Path) -> None:
    tensors = {
        "f32": torch.randn(3, 4), "f16": torch.randn(5).half(), "bf16": torch.randn(2, 3).bfloat16(),
        "i64": torch.arange(7), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "flag": torch.tensor([True]),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    entries = read_header(file)
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert entries[name].load().dtype == expected.dtype
        np.testing.assert_array_equal(entries[name].load(), expected)
    check_finite(iter(entries.values()))


def test_safetensors_reads_what_we_write(file: Path) -> None:
    tensors = {
        "b": RANDOM.standard_normal((2, 3)).astype(np.float32),
        "a": np.arange(4),
        "c": np.float16([1, 2]),
        "s": np.array(1.0),
    }
    write(file, tensors)
    loaded = safetensors.numpy.load_file(file)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    one, other = {"x": np.zeros(3), "y": np.ones(2)}, {"y": np.ones(2), "x": np.zeros(3)}
    write(tmp_path / "one", one)
    write(tmp_path / "other", other)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_names_the_tensor_that_is_not_finite(file: Path, dtype: str, bad: float) -> None:
    value = RANDOM.standard_normal(1000).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    value[777] = bad
    tensor = torch.from_numpy(value.astype(np.float64)).to(getattr(torch, dtype))
    safetensors.torch.save_file({"fine": torch.ones(3), "unet.broken": tensor}, file)
    with pytest.raises(DexportError, match=r"'unet\.broken' holds NaN or infinity"):
        check_finite(iter(read_header(file).values()))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole"),
        (b"\x10\0\0\0\0\0\0\0{}", "not a whole"),
        (b"\xff" * 64, "not a whole"),
        (raw(b"{not json", b""), "header is damaged"),
        (raw([1, 2], b""), "header is damaged"),
        (raw({"w": F32}, b"\0" * 7), "cut short: tensor 'w' ends at byte"),
        (raw({"w": F32}, b"\0" * 9), "1 bytes follow the last tensor"),
        (raw({"w": {**F32, "shape": [3]}}, b"\0" * 8), "'w' has 8 bytes where its shape"),
        (raw({"w": {**F32, "shape": [-2]}}, b"\0" * 8), "'w' has a wrong shape"),
        (raw({"w": {**F32, "dtype": "F4X"}}, b"\0" * 8), "'w' has the unsupported dtype 'F4X'"),
        (b"GGUF\x03\0\0\0" + b"\0" * 64, "a GGUF file, whose weights are quantized; save the model in fp16 or bf16"),
        (raw({"w": F32, "v": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12), "'v' leaves a gap or overlaps"),
        (raw({"w": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12), "'w' leaves a gap"),
        (raw(b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", b"\0" * 8), "twice"),
        (raw({"w": {"dtype": "F32"}}, b"\0" * 8), "header is damaged"),
        (raw(b"[" * 200_000), "header is damaged .nested too deep"),
        (raw(b'{"w":' + b"[" * 200_000), "nested too deep"),
        (raw(b'{"w": NaN}'), "NaN is no number"),
        (raw({"w": {**F32, "shape": [0, 2**70], "data_offsets": [0, 0]}}), "'w' has a wrong shape"),
        (raw({"w": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}), "'w' has a shape that is too large"),
        (raw({"w": {**F32, "shape": [1] * 100, "data_offsets": [0, 4]}}, b"\0" * 4), "'w' has 100 dimensions"),
        (raw({"w": {**F32, "shape": [True, 2]}}, b"\0" * 8), "'w' has a wrong shape"),
    ],
)
def test_refuses_damaged_files(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(DexportError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_of_endless_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    shape = ",".join([str(2**62)] * 100_000)
    header = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    begin = time.monotonic()
    with pytest.raises(DexportError, match="100000 dimensions"):
        read_header(tmp_path / "a.safetensors")
    assert time.monotonic() - begin < 10  # the product of the sides took minutes


@pytest.mark.parametrize("header", ["[]", "3", "null"])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(DexportError, match="no JSON object"):
        read_header(tmp_path / "a.safetensors")
