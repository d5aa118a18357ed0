"""The hub's files: the same bytes every time, no trace of the machine, little memory, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file

from exporter import hub
from runtimes.errors import DexportError
from runtimes.manifest import to_json

ROOT = Path(__file__).resolve().parents[2]
Copy = Callable[[], Path]


def run(program: str, *arguments: object) -> str:
    """Run a program in a fresh interpreter with the project on its path, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


EXPORT = """
import sys
from pathlib import Path
from exporter import hub
hub.export(Path(sys.argv[1]), Path(sys.argv[2]), graphs=sys.argv[3].split(","))
"""


def test_the_same_input_gives_the_same_bytes(tiny_sd: Path, tiny_hub: Path, tmp_path: Path) -> None:
    """Another process, another hash seed, another place of the checkpoint, another order of graphs."""
    shutil.copytree(tiny_sd, tmp_path / "elsewhere")
    assert os.environ.get("PYTHONHASHSEED") in (None, "random")
    run(EXPORT, tmp_path / "elsewhere", tmp_path / "hub", "denoiser,text")
    again, first = hashes(tmp_path / "hub"), hashes(tiny_hub)
    names = ("denoiser/model.onnx", "denoiser/model.onnx.data", "text/model.onnx", "text/model.onnx.data")
    assert {name: again[name] for name in names} == {name: first[name] for name in names}
    assert again["tokenizer/tokenizer.json"] == first["tokenizer/tokenizer.json"]


def test_the_files_are_those_of_the_contract(tiny_hub: Path) -> None:
    graphs = [f"{name}/model.onnx{end}" for name in ("text", "denoiser", "decoder", "encoder") for end in ("", ".data")]
    assert sorted(hashes(tiny_hub)) == sorted([*graphs, "hub.json", "tokenizer/tokenizer.json"])


def test_no_paths_and_no_stack_traces(tiny_sd: Path, tiny_hub: Path) -> None:
    here = [str(tiny_sd), str(tiny_hub), str(ROOT), os.path.dirname(onnx.__file__), str(Path.home())]
    words = ["site-packages", ".py", 'File "', "stack_trace", "pkg.torch", "torch.nn", os.uname().nodename]
    for path in [*tiny_hub.rglob("*.onnx"), tiny_hub / "hub.json"]:
        text = path.read_bytes()
        found = [word for word in [*here, *words] if len(word) > 2 and word.encode() in text]
        assert not found, f"{path.name} holds {found}"
    for path in tiny_hub.rglob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert not model.metadata_props and not model.graph.metadata_props and not model.graph.doc_string
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert {item.value for t in model.graph.initializer for item in t.external_data if item.key == "location"} == {
            "model.onnx.data"
        }


@pytest.mark.parametrize("name", ["text", "denoiser", "decoder", "encoder"])
def test_each_weight_is_there_once(tiny_sd: Path, tiny_hub: Path, name: str) -> None:
    """The bytes of the graph's weights are four times the count of its parameters, and little more."""
    model = onnx.load(tiny_hub / name / "model.onnx", load_external_data=False)
    named = [tensor.name for tensor in model.graph.initializer]
    assert len(named) == len(set(named))
    used = {value for node in model.graph.node for value in node.input}
    assert set(named) <= used
    tensors = {
        "text": load_file(tiny_sd / "text_encoder/model.safetensors"),
        "denoiser": load_file(tiny_sd / "unet/diffusion_pytorch_model.safetensors"),
    }
    vae = load_file(tiny_sd / "vae/diffusion_pytorch_model.safetensors")
    for half, other in (("decoder", "post_quant_conv"), ("encoder", "quant_conv")):
        tensors[half] = {key: value for key, value in vae.items() if key.split(".")[0] in (half, other)}
    values = tensors[name].values()
    # Small tensors that are equal, such as the biases of zeros here, may share a place.
    small = {(tuple(value.shape), value.numpy().tobytes()): value.numel() for value in values if value.numel() <= 1024}
    count = sum(small.values()) + sum(value.numel() for value in values if value.numel() > 1024)
    weights = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("constant_")]
    assert sum(int(onnx.numpy_helper.np.prod(tensor.dims)) for tensor in weights) == count
    data = (tiny_hub / name / "model.onnx.data").stat().st_size
    inline = (tiny_hub / name / "model.onnx").stat().st_size
    assert 4 * count - inline <= data <= 4 * count * 1.05


def test_hub_json_describes_the_graphs(tiny_hub: Path) -> None:
    model = hub.load(tiny_hub)
    assert (tiny_hub / "hub.json").read_text() == to_json(model)
    for graph in model.graphs.values():
        found = onnx.load(tiny_hub / graph.file, load_external_data=False).graph
        for described, values in ((graph.inputs, found.input), (graph.outputs, found.output)):
            shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
            assert [(t.name, t.shape) for t in described] == [(v.name, s) for v, s in zip(values, shapes, strict=True)]
            types = [onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in values]
            assert [tensor.dtype for tensor in described] == [str(dtype) for dtype in types]


PEAK = """
import sys
from pathlib import Path
from exporter import hub
hub.export(Path(sys.argv[1]), Path(sys.argv[2]), graphs=["text"])
# Not ru_maxrss, which a child inherits from the process that started it.
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_model(copy_checkpoint: Copy, tiny_sd: Path, tmp_path: Path) -> None:
    """A text encoder with 330 MB of fp32 weights takes hardly more than one with 0.3 MB."""
    from transformers import CLIPTextConfig, CLIPTextModel

    small = int(run(PEAK, tiny_sd, tmp_path / "small"))
    folder = copy_checkpoint()
    old = json.loads((folder / "text_encoder/config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = CLIPTextConfig(**{key: old[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}, **sizes)
    shutil.rmtree(folder / "text_encoder")
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder")
    large = int(run(PEAK, folder, tmp_path / "large"))
    written = (tmp_path / "large/text/model.onnx.data").stat().st_size / 1024
    assert written > 300_000  # kB, as the peaks are
    assert large - small < written / 3, f"{small} kB and {large} kB for {written:.0f} kB of weights"


FULL = """
import resource, sys
from pathlib import Path
from exporter import hub
from runtimes.errors import DexportError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    hub.export(Path(sys.argv[1]), Path(sys.argv[2]), graphs=["text"])
except DexportError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(tiny_sd: Path, tmp_path: Path) -> None:
    assert "the disk is full" in run(FULL, tiny_sd, tmp_path / "new" / "hub")
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_an_interrupt_leaves_nothing_behind(copy_checkpoint: Copy, tiny_sd: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint()
    (folder / "tokenizer" / "merges.txt").unlink()
    output = tmp_path / "outputs" / "hub"
    with pytest.raises(DexportError, match=r"merges\.txt"):
        hub.export(folder, output, graphs=["text"])
    assert not output.parent.exists()

    def interrupt(what: str, share: float) -> None:
        if what == "text: writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.export(tiny_sd, output, graphs=["text"], progress=interrupt)
    assert not output.parent.exists()


def test_wrong_choices(tiny_sd: Path, tiny_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="no graph 'unet'; there are text, denoiser, decoder, encoder"):
        hub.export(tiny_sd, tmp_path / "hub", graphs=["unet"])
    with pytest.raises(DexportError, match="multiples of 4"):
        hub.export(tiny_sd, tmp_path / "hub", shape=(64, 66))
    with pytest.raises(DexportError, match="multiples of 4"):
        hub.export(tiny_sd, tmp_path / "hub", shape=(0, 64))
    before = hashes(tiny_hub)
    with pytest.raises(DexportError, match="exists"):
        hub.export(tiny_sd, tiny_hub, graphs=["text"])
    assert hashes(tiny_hub) == before
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_what_is_no_hub(tiny_sd: Path, tiny_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DexportError, match="no such folder"):
        hub.load(tmp_path / "nothing")
    with pytest.raises(DexportError, match=r"not a hub: it has no hub.json"):
        hub.load(tiny_sd)
    copy = Path(shutil.copytree(tiny_hub, tmp_path / "hub"))
    (copy / "decoder" / "model.onnx").unlink()
    with pytest.raises(DexportError, match=r"decoder/model.onnx is missing"):
        hub.load(copy)
    text = (copy / "hub.json").read_text()
    (copy / "hub.json").write_text(text.replace("decoder/model.onnx", "../../model.onnx"))
    with pytest.raises(DexportError, match="not a plain path inside its folder"):
        hub.load(copy)
    (copy / "hub.json").write_text("{}")
    with pytest.raises(DexportError, match="is missing"):
        hub.load(copy)
