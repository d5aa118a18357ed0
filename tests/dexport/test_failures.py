"""What goes wrong, each ending as one line that says what to do, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.dexport.conftest import Said, Say, Workshop

ROOT = Path(__file__).resolve().parents[2]


def refused(said: Said, *parts: str, code: int = 2) -> None:
    """Assert one line of error with ``parts`` in it, on stdout nothing or the same as JSON, and the exit code."""
    assert said.code == code, (said.out, said.err)
    lines = [line for line in said.err.splitlines() if line]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert said.out == "" or said.json == {"error": lines[0].removeprefix("error: "), "exit_code": code}
    for part in parts:
        assert part in lines[0]


def build(say: Say, checkpoint: Path, output: Path) -> Said:
    """Build for ONNX Runtime; then assert that nothing was left beside the checkpoint's copy."""
    said = say("build", checkpoint, "--target", "onnxruntime", "-o", output, "--no-cache", "--json")
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]
    return said


# Wrong words


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nothing"], "No such command"),
        (["build", "here", "-o", "there"], "--target"),
        (["build", "here", "--target", "onnxruntime"], "--output"),
        (["build", "here", "-o", "there", "--target", "abacus"], "onnxruntime, openvino, tensorrt"),
        (["build", "here", "-o", "there", "--target", "openvino:tpu"], "cpu, gpu, npu"),
        (["build", "here", "-o", "there", "--target", "openvino", "--shape", "big"], "512x512"),
        (["build", "here", "-o", "there", "--target", "openvino", "--shape", "0x8"], "512x512"),
        (["build", "x", "-o", "y", "--target", "openvino", "--shape", "8x8", "--dynamic-shape"], "--dynamic-shape"),
        (["build", "x", "-o", "y", "--target", "openvino", "--cache", "z", "--no-cache"], "--no-cache"),
        (["export", "x", "-o", "y", "--shape", "8x8", "--dynamic-shape"], "--dynamic-shape"),
        (["run", "bundle", "--prompt", "x", "--steps", "0"], "--steps"),
        (["run", "bundle", "--prompt", "x", "--steps", "prior=x"], "--steps"),
        (["run", "bundle", "--prompt", "x", "--steps", "2", "--steps", "3"], "once for each stage"),
        (["run", "bundle", "--prompt", "x", "--guidance", "prior=2", "--guidance", "prior=3"], "once for each stage"),
        (["run", "bundle", "--prompt", "x", "--threads", "1000000"], "--threads"),
        (["build", "here", "-o", "there", "--target", "onnxruntime", "--max-batch", "100000"], "--max-batch"),
        (["bench", "bundle", "--repeats", "none"], "--repeats"),
        (["run", "bundle", "--prompt", "x", "--guidance-interval", "0,0.5,1"], "2 numbers"),
        (["completion", "dos"], "bash"),
    ],
)
def test_wrong_words(say: Say, words: list[str], part: str) -> None:
    refused(say(*words), part, "--help")


def test_no_words_at_all_show_the_help(say: Say) -> None:
    said = say()
    assert said.code == 2
    assert "Commands:" in said.err


def test_with_json_a_failure_is_json_too(say: Say, tmp_path: Path) -> None:
    said = say("verify", tmp_path / "nowhere", "--json")
    refused(said, "no such folder")
    assert said.json["exit_code"] == 2
    assert say("verify", "--nonsense", "--json").json["exit_code"] == 2


# A checkpoint that is none


@pytest.mark.parametrize("command", ["export", "build", "inspect"])
def test_no_such_folder(say: Say, tmp_path: Path, command: str) -> None:
    more = {
        "export": ["-o", tmp_path / "out"],
        "build": ["-o", tmp_path / "out", "--target", "onnxruntime"],
        "inspect": [],
    }
    refused(say(command, tmp_path / "nowhere", *more[command]), "nowhere", "no such folder")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint(say: Say, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refused(build(say, tmp_path / "photos", tmp_path / "out"), "photos", "model_index.json")
    refused(say("inspect", tmp_path / "photos"), "model_index.json")


def test_an_unsupported_pipeline(say: Say, copy_checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    checkpoint = copy_checkpoint()
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionPAGPipeline"}))
    refused(
        build(say, checkpoint, tmp_path / "out"), "StableDiffusionPAGPipeline", "nearest to it: StableDiffusionPipeline"
    )


def test_a_pickle(say: Say, copy_checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    checkpoint = copy_checkpoint()
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(build(say, checkpoint, tmp_path / "out"), ".bin", "pickle", "convert", "safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    refused(build(say, tmp_path / "model.ckpt", tmp_path / "out"), "model.ckpt", "pickle", "convert", "safetensors")


def test_truncated_weights(say: Say, copy_checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    checkpoint = copy_checkpoint()
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = build(say, checkpoint, tmp_path / "out")
    refused(said, str(weights), "cut short", "tensor")


def test_weights_with_nan(say: Say, copy_checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    from runtimes.safetensors import read_header

    checkpoint = copy_checkpoint()
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    name, entry = sorted(read_header(weights).items())[3]
    assert entry.dtype == "F16"
    with weights.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write((0x7E00).to_bytes(2, "little"))  # a NaN in half precision
    refused(build(say, checkpoint, tmp_path / "out"), repr(name), "NaN")


# A bundle that is not as built


@pytest.mark.parametrize("words", [["verify"], ["bench"], ["run", "--prompt", "red"]])
@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "link"])
def test_a_changed_bundle(say: Say, copy_bundle: Path, tmp_path: Path, words: list[str], damage: str) -> None:
    victim = next(copy_bundle.glob("denoiser/*.onnx"))
    if damage == "flipped":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "missing":
        victim.unlink()
    elif damage == "extra":
        victim = copy_bundle / "denoiser" / "extra.onnx"
        victim.write_bytes(b"")
    else:
        victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    where = ["-o", tmp_path / "image.png"] if words[0] == "run" else []
    refused(say(words[0], copy_bundle, *words[1:], *where), str(victim.relative_to(copy_bundle)))
    assert not (tmp_path / "image.png").exists()


def test_a_folder_that_is_no_bundle(say: Say, tmp_path: Path) -> None:
    refused(say("verify", tmp_path / "nowhere"), "no such folder")
    refused(say("verify", tmp_path), "dexport.json", "dexport build")


# Outputs and runtimes


def test_an_output_that_exists_is_kept(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    words = ("build", workshop.checkpoint, "--target", "onnxruntime", "-o")
    refused(say(*words, tmp_path / "thesis", "--overwrite"), "thesis", "dexport did not make")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    refused(say(*words, workshop.bundle), "--overwrite")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("tensorrt:sm75=bf16", ("tensorrt:sm75 has no precision 'bf16'", "fp32, fp16")),
        ("openvino=int1", ("int1", "fp32, fp16, bf16")),
        ("openvino=", ("name a precision", "openvino=bf16")),
    ],
)
def test_what_a_target_cannot_do_is_said_before_the_work(
    say: Say, tmp_path: Path, target: str, parts: tuple[str, ...]
) -> None:
    """Before the checkpoint is even looked at."""
    refused(say("build", tmp_path / "nowhere", "--target", target, "-o", tmp_path / "out"), *parts)


def test_a_gpu_that_is_not_here_is_said_before_the_work(say_fresh: Say, tmp_path: Path) -> None:
    block = "import runtimes.cuda as cuda; cuda.missing = lambda: 'no driver'"
    words = ("build", tmp_path / "nowhere", "--target", "tensorrt", "-o", tmp_path / "out")
    refused(say_fresh(*words, first=block), "no driver", "tensorrt:sm89")
    block = "import sys; sys.modules['tensorrt_rtx'] = None"
    words = ("build", tmp_path / "nowhere", "--target", "tensorrt:sm89", "-o", tmp_path / "out")
    refused(say_fresh(*words, first=block), "pip install 'dexport[tensorrt-rtx]'")


def test_a_picture_that_could_not_be_written_is_said_before_the_work(
    say: Say, workshop: Workshop, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    words = ("run", workshop.bundle, "--prompt", "x", "-o")
    refused(say(*words, tmp_path / "picture.jpg"), ".png")
    refused(say(*words, tmp_path / "file" / "sub" / "a.png"), "file", "cannot be written")
    (tmp_path / "folder" / "000.png").mkdir(parents=True)
    refused(say(*words, tmp_path / "folder"), "000.png", "a folder of this name")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--guidance", "-1"], "from 0 to 1000"),
        (["--guidance", "1e300"], "from 0 to 1000"),
        (["--guidance", "nan"], "from 0 to 1000"),
        (["--images", "5000"], "4096"),
        (["--strength", "0.5"], "give --image too"),
        (["--sampler", ""], "no sampler ''"),
        (["--sampler", "ipndm"], "this checkpoint is a diffusion model"),
        (["--guidance-interval", "0.2,0.21"], "holds none of"),
        (["--size", "99999x64"], "16384"),
    ],
)
def test_a_request_beyond_reason_is_one_line(
    say: Say, workshop: Workshop, tmp_path: Path, words: list[str], part: str
) -> None:
    refused(say("run", workshop.bundle, "--prompt", "red", "-o", tmp_path / "x.png", *words), part)
    assert not list(tmp_path.iterdir())


def test_what_a_model_takes_is_said(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    refused(say("run", workshop.bundle, "-o", tmp_path / "x.png"), "no prompt given; give one with --prompt")
    refused(say("run", workshop.bundle, "--prompt", "red", "--class", "3", "-o", tmp_path / "x.png"), "has no classes")


def test_a_picture_of_too_many_pixels_is_said_to_be_too_large(say: Say, tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "wide.png")
    words = ("run", tmp_path, "--prompt", "red", "-o", tmp_path / "x.png", "--image", tmp_path / "wide.png")
    refused(say(*words), "wide.png: the image is too large; make it smaller")


def test_a_picture_that_is_too_large_is_said_before_the_work(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    for shape in ("320000x64", "20000x20000"):
        refused(say("export", workshop.checkpoint, "-o", tmp_path / "hub", "--shape", shape), shape, "too large")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_a_file(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    words = ("run", workshop.bundle, "--prompt", "x", "-o", tmp_path / "x.png", "--cache", tmp_path / "cache")
    refused(say(*words), "cache", "must be a folder")


def test_prompts_that_are_no_text(say: Say, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(b"\xff\xfe\x00")
    refused(say("run", "bundle", "--prompts", tmp_path / "prompts"), "prompts", "UTF-8")


def test_a_bug_of_ours_says_so_and_exits_70(say_fresh: Say, tmp_path: Path) -> None:
    said = say_fresh("doctor", "--json", first="import runtimes.doctor as d; d.doctor = lambda: 1 / 0")
    assert said.code == 70
    assert "Traceback" in said.err and said.err.splitlines()[-1].startswith("error: this is a bug of dexport")
    assert said.json["exit_code"] == 70
    memory = "import runtimes.doctor as d\ndef full(): raise MemoryError\nd.doctor = full"
    refused(say_fresh("doctor", first=memory), "not enough memory")


def test_an_unsupported_precision_says_why(say: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("build", workshop.checkpoint, "--target", "onnxruntime", "--precision", "bf16", "-o", tmp_path / "out")
    refused(say(*words), "bf16", "fp32")


def test_a_missing_runtime_says_which_extra(say_fresh: Say, workshop: Workshop, tmp_path: Path) -> None:
    block = "import sys; sys.modules['onnxruntime'] = None"
    extra = "pip install 'dexport[onnxruntime]'"
    refused(say_fresh("verify", workshop.bundle, first=block), extra)
    refused(say_fresh("run", workshop.bundle, "--prompt", "x", "-o", tmp_path / "x.png", first=block), extra)


def test_a_missing_exporter_says_which_extra(say_fresh: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("build", workshop.checkpoint, "--target", "onnxruntime", "-o", tmp_path / "out")
    refused(say_fresh(*words, first="import sys; sys.modules['torch'] = None"), "pip install 'dexport[export]'")


def test_a_missing_tokenizer_package_says_which_extra(say_fresh: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("run", workshop.bundle, "--prompt", "x", "-o", tmp_path / "x.png")
    refused(say_fresh(*words, first="import sys; sys.modules['tokenizers'] = None"), "pip install 'dexport[text]'")


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"
"""A process whose files cannot grow past a limit: what a writer sees is the same as on a full disk, an OSError."""


def test_a_full_disk_leaves_nothing(say_fresh: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("build", workshop.checkpoint, "--target", "onnxruntime", "-o", tmp_path / "new" / "out", "--no-cache")
    refused(say_fresh(*words, first=FULL.format(limit=300_000)), "disk is full")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_picture(say_fresh: Say, workshop: Workshop, tmp_path: Path) -> None:
    words = ("run", workshop.bundle, "--prompt", "red", "--steps", 1, "-o", tmp_path / "image.png")
    refused(say_fresh(*words, first=FULL.format(limit=1000)), "image.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("moment", "stop", "code"),
    [
        (".dexport-*/.hub.*", signal.SIGINT, 130),
        (".out.*", signal.SIGINT, 130),
        (".out.*", signal.SIGTERM, 143),
        (".dexport-*/.hub.*", signal.SIGHUP, 129),
    ],
    ids=["Ctrl-C while exporting", "Ctrl-C while compiling", "TERM while compiling", "HUP while exporting"],
)
def test_a_stop_leaves_nothing(
    workshop: Workshop, tmp_path: Path, moment: str, stop: signal.Signals, code: int
) -> None:
    """A real process and a real signal, sent when the work has come to a certain file."""
    words = ["build", workshop.checkpoint, "--target", "onnxruntime", "-o", tmp_path / "out", "--no-cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dexport", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL),  # a shell's job may have it ignored
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob(moment)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, err
    told = "interrupted" if stop == signal.SIGINT else f"stopped by {stop.name}"
    assert (out, err.splitlines()[-1]) == ("", f"error: {told}")  # a slow machine has said how far it is before
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


SWALLOWED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may have it ignored
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from exporter import hub
def export(*args, **options):
    try:
        signal.raise_signal(signal.{stop})
    except BaseException as error:
        raise RuntimeError("Python error details: " + type(error).__name__) from None
hub.export = export
"""


@pytest.mark.parametrize(
    ("stop", "code", "told"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "stopped by SIGTERM")]
)
def test_a_stop_that_cplusplus_makes_an_error_of_is_a_stop(
    say_fresh: Say, workshop: Workshop, tmp_path: Path, stop: str, code: int, told: str
) -> None:
    """As torch's exporter does, whose C++ calls back into Python."""
    words = ("build", workshop.checkpoint, "--target", "onnxruntime", "-o", tmp_path / "out", "--no-cache")
    done = say_fresh(*words, first=SWALLOWED.format(stop=stop))
    assert (done.code, done.err.splitlines()[-1]) == (code, f"error: {told}")
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def shell(line: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash") or "sh"
    return subprocess.run([bash, "-c", line], cwd=ROOT, capture_output=True, text=True)


def test_a_reader_that_leaves_is_no_failed_gate(workshop: Workshop, tmp_path: Path) -> None:
    """The exit code is that of a process that SIGPIPE ends; or where all was written before it left, the true one."""
    command = f"{sys.executable} -m dexport inspect"
    done = shell(f"{command} {workshop.hub} --json | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    done = shell(f"{command} {tmp_path / 'nowhere'} --json | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["/dev/full", "&-"])
def test_a_stdout_that_takes_nothing_is_one_line(workshop: Workshop, where: str) -> None:
    done = shell(f"{sys.executable} -m dexport inspect {workshop.hub} --json >{where}")
    assert done.returncode == (2 if where == "/dev/full" else 0)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    done = shell(f"{sys.executable} -m dexport inspect nowhere --json >{where}")
    assert done.returncode == 2
    assert "no such folder" in done.stderr and done.stderr.count("\n") == 1


def test_without_a_stderr_work_goes_on(workshop: Workshop) -> None:
    done = shell(f"{sys.executable} -m dexport verify {workshop.bundle} --json 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["passed"] is True


def test_a_console_without_our_signs_shows_others(workshop: Workshop) -> None:
    done = shell(f"PYTHONIOENCODING=cp1252 {sys.executable} -m dexport verify {workshop.bundle}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\? \d+\.\d+ +ok", done.stdout)


def test_no_error_ever_prints_a_path_of_the_source(say: Say, tmp_path: Path) -> None:
    said = say("verify", tmp_path)
    assert not re.search(r"\.py\b|Traceback", said.err)
