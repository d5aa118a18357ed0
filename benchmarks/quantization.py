"""Quantization beside its peers, on the same model, in the same run.

    python benchmarks/quantization.py pictures [--count 256]  # the emoji model: quality and speed, beside the peers
    python benchmarks/quantization.py speed CHECKPOINT        # a UNet of SD 1.5's size: seconds a call
    python benchmarks/quantization.py cost CHECKPOINT         # seconds and memory of calibrating and quantizing it
    python benchmarks/quantization.py engines CHECKPOINT      # TensorRT-RTX engines: seconds and size

``benchmarks/checkpoints.py`` makes CHECKPOINT. The peers are nncf and onnxruntime.quantization; ``pip install nncf``.
Times are medians of calls that take turns. Pictures are compared with those of the hub in fp32, at the same seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples" / "emoji"))

import onnx_ir as ir  # the paths above come first

from calibration import recipe
from calibration.calibrate import calibrate, source
from calibration.observe import load as load_statistics
from calibration.quality import Recorder
from exporter import compile as compilers
from exporter import hub as hubs
from exporter.build import compile_hub
from exporter.latency import race
from exporter.quantized import Quantization
from runtimes.backends import openvino
from runtimes.backends.onnxruntime import OnnxRuntimeSession
from runtimes.manifest import Graph, Model
from runtimes.pipeline import Pipeline
from runtimes.request import Request
from runtimes.session import Session, require
from runtimes.target import Target

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "examples" / "emoji" / "model"
STEPS, GUIDANCE = 20, 4.0
CALIBRATED = 32  # prompts, none of which is judged
BATCH = 32  # pictures that are drawn together
REPEATS = 21


def compiled(source_: Path, graph: Graph, folder: Path, target: str, precision: str) -> Session:
    """A graph compiled for a target and opened."""
    folder.mkdir(parents=True)
    where = Target.parse(target)
    made = compilers.compile_graph(source_, graph, folder, where, precision)
    sessions = [
        require(where.backend).open(folder.parent / one.file, one, where.device, None, None)
        for one in (made, *compilers.alternatives(made, where, precision))
    ]
    return sessions[0] if len(sessions) == 1 else sessions[race(sessions, random_inputs(graph)).faster]


def random_inputs(graph: Graph, batch: int = 1) -> dict[str, Any]:
    """Inputs of a denoiser's call in the middle of a run."""
    random = np.random.default_rng(0)
    inputs = {
        tensor.name: random.standard_normal([batch if isinstance(n, str) else n for n in tensor.shape], np.float32)
        for tensor in graph.inputs
    }
    return inputs | {"timestep": np.full(batch, 500, np.float32)}


def quantized(hub: Path, model: Model, statistics_: Path, output: Path, target: str = "onnxruntime") -> Path:
    """Our quantized hub graph of a denoiser, as a build for the target makes it."""
    graph = model.graphs[model.stages[0].denoiser]
    found = load_statistics(statistics_, source(model, hub))
    made, _ = recipe.apply(
        ir.load(hub / graph.file), found, recipe.Recipe(scores=compilers.integer_scores(Target.parse(target)))
    )
    output.mkdir(parents=True)
    ir.save(made, output / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    return output / "model.onnx"


def nncf_model(file: Path, calls: list[Any], output: Path, kind: str | None) -> Path:
    """The same graph, quantized by NNCF with all of the calls that it was given."""
    import nncf

    nncf.set_log_level(40)
    ov = openvino.load()
    model = ov.Core().read_model(file)
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if kind == "transformer" else {}
    dataset = nncf.Dataset(calls, lambda call: call[0])
    made = nncf.quantize(model, dataset, subset_size=len(calls), **options)
    output.mkdir(parents=True)
    ov.save_model(made, output / "model.xml", compress_to_fp16=False)
    return output / "model.xml"


def ort_model(file: Path, calls: list[Any], output: Path) -> Path:
    """The same graph, quantized by onnxruntime.quantization: QDQ, u8 activations, s8 weights for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([inputs for inputs, _ in calls])

        def get_next(self) -> Any:
            return next(self.left, None)

    output.mkdir(parents=True)
    made = output / "model.onnx"
    quantize_static(
        str(file), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "MatMul"],
        use_external_data_format=True,
    )  # fmt: skip
    return made


def take_turns(sessions: Mapping[str, Session], inputs: Mapping[str, Any], repeats: int = REPEATS) -> dict[str, float]:
    """The median of each session's seconds a call."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(inputs)
    for _ in range(repeats):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(inputs)
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def built(hub: Path, output: Path, target: str, how: Quantization) -> Session:
    """The denoiser of an int8 bundle as ``dexport compile`` makes it."""
    manifest = compile_hub(hub, output, target=target, precision="int8", quantization=how)
    found, graph = manifest.accuracy["quantization"], manifest.model.graphs["denoiser"]
    print(
        f"{target}: {found['quantized']} layers in 8 bits, {len(found['kept'])} blocks and {len(found['not_faster'])} "
        f"layers in floating point, {dict(graph.properties)}",
        flush=True,
    )
    where = Target.parse(target)
    return require(where.backend).open(output / graph.file, graph, where.device, None, None)


def pictures(count: int, budget: str) -> None:
    """Quality and speed on the emoji model."""
    from data import prompts
    from measures import Reference

    right, words = prompts(count)
    others = [word for word in prompts(1636)[1] if word not in words][:: (1636 - count) // CALIBRATED][:CALIBRATED]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = hubs.export(EMOJI, work / "hub")
        graph = model.graphs["denoiser"]
        hub_file = work / "hub" / graph.file
        fixed = {
            name: OnnxRuntimeSession(work / "hub" / model.graphs[name].file, model.graphs[name], None)
            for name in ("text", "decoder", "encoder")
        }
        plain = OnnxRuntimeSession(hub_file, graph, None)
        recorder = Recorder(plain)
        draw(model, work / "hub", fixed, recorder, others, 10_000, batch=1)
        calls = recorder.calls[:: max(1, len(recorder.calls) // 300)]
        sessions: dict[str, Session] = {
            "ORT fp32": compiled(hub_file, graph, work / "ort32" / "d", "onnxruntime", "fp32"),
            "OpenVINO fp32": compiled(hub_file, graph, work / "ov32" / "d", "openvino", "fp32"),
            "OpenVINO bf16": compiled(hub_file, graph, work / "ov16" / "d", "openvino", "bf16"),
        }
        how = Quantization(budget, others, work / "statistics", STEPS)
        makers: dict[str, Callable[[], Session]] = {
            "ORT int8, dexport": lambda: built(work / "hub", work / "ort8", "onnxruntime", how),
            "OpenVINO int8, dexport": lambda: built(work / "hub", work / "ov8", "openvino", how),
            "ORT int8, onnxruntime.quantization": lambda: OnnxRuntimeSession(
                ort_model(hub_file, calls, work / "ortq"), graph, None
            ),
            "OpenVINO int8, NNCF": lambda: open_ir(nncf_model(hub_file, calls, work / "nncf", None), graph),
            "OpenVINO int8, NNCF transformer": lambda: open_ir(
                nncf_model(hub_file, calls, work / "nncft", "transformer"), graph
            ),
        }
        for name, make in makers.items():
            begin = time.perf_counter()
            try:
                sessions[name] = make()
                print(f"{name}: made in {time.perf_counter() - begin:.0f} s", flush=True)
            except Exception as error:  # a peer that fails is a result too
                print(f"{name}: failed ({type(error).__name__}: {str(error)[:200]})", flush=True)
        one = {
            key: np.ascontiguousarray(np.repeat(value[:1], 2, axis=0))
            for key, value in calls[len(calls) // 2][0].items()
        }
        seconds = take_turns(sessions, one)

        def encode(images: Any) -> Any:
            return fixed["encoder"].run({"image": np.ascontiguousarray(images, np.float32)})["sample"]

        exact = draw(model, work / "hub", fixed, plain, words, 0)
        again = draw(model, work / "hub", fixed, plain, words, 1_000_000)
        reference = Reference(exact, again, right, encode)
        low, high = reference.null
        print(f"Fréchet distance to the data, seed to seed: 95 % of the differences in [{low:+.2f}, {high:+.2f}]")
        print(f"{'':36} ms/call  PSNR median  10th pct  top-1 (difference, 95 %)       Fréchet shift")
        for name, session in sessions.items():
            found = reference.compare(draw(model, work / "hub", fixed, session, words, 0))
            top1, shift = found["top1_difference"], found["frechet_shift"]
            least, most = found["top1_difference_95"]
            where = "inside" if low <= shift <= high else "OUTSIDE"
            print(
                f"{name:36} {seconds[name] * 1e3:7.1f}  {found['psnr_median_db']:11.1f}  "
                f"{found['psnr_10th_percentile_db']:8.1f}  {reference.hits.mean() + top1:.1%} ({top1 * 100:+.1f}, "
                f"{least * 100:+.1f} to {most * 100:+.1f})  {shift:+.2f} {where}",
                flush=True,
            )


def open_ir(file: Path, graph: Graph) -> Session:
    """An IR as our session runs it, with what is not quantized in bf16 or f32, whichever is faster."""
    sessions = [
        openvino.open(file, replace(graph, properties={openvino.HINT: hint}), "cpu", None, None)
        for hint in ("bf16", "f32")
    ]
    return sessions[race(sessions, random_inputs(graph)).faster]


def draw(
    model: Model, hub: Path, fixed: Mapping[str, Session], denoiser: Session, words: list[str], seed: int,
    batch: int = BATCH,
) -> Any:  # fmt: skip
    """Pictures of all words, image i from seed + i."""
    pipeline = Pipeline(model, hub, lambda name: denoiser if name == "denoiser" else fixed[name])
    made = []
    for start in range(0, len(words), batch):
        request = Request(words[start : start + batch], steps=STEPS, guidance=GUIDANCE, seed=seed + start)
        *_, last = pipeline.generate(request)
        made.append(pipeline.decode(last.sample))
    return np.concatenate(made)


def exported(checkpoint: Path, keep: Path | None, work: Path) -> tuple[Path, Model]:
    """The hub of a checkpoint: an earlier one at ``keep``, or a new one."""
    hub = keep or work / "hub"
    return hub, hubs.load(hub) if (hub / "hub.json").exists() else hubs.export(
        checkpoint, hub, graphs=["text", "denoiser"]
    )


def cost(checkpoint: Path, hub: Path | None, steps: int = 2) -> None:
    """Seconds and peak memory of 16 observed calls and of quantizing, in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        place, _ = exported(checkpoint, hub, work)
        child = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[4]); import quantization as q; "
            "hub, out = Path(sys.argv[1]), Path(sys.argv[2]); model = q.hubs.load(hub); "
            "q.calibrate(model, hub, ['a', 'b', 'c', 'd'], steps=int(sys.argv[3])).save(out / 'statistics'); "
            "q.quantized(hub, model, out / 'statistics', out / 'made')"
        )
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", child, str(place), str(work), str(steps), str(ROOT / "benchmarks")],
            check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "calls": 4 * steps * 2, "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_memory_gb": round(used.ru_maxrss / 1e6, 2),
    }  # fmt: skip
    print(json.dumps(figures))


def speed(checkpoint: Path, hub: Path | None, statistics_: Path | None, peers: bool, repeats: int) -> None:
    """Seconds a call of the UNet at batch 1, one pair of graphs in memory at a time."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        place, model = exported(checkpoint, hub, work)
        graph = model.graphs["denoiser"]
        file = place / graph.file
        found = statistics_ or work / "statistics"
        if not found.exists():
            calibrate(model, place, ["a", "b", "c", "d"], steps=1).save(found)
        ours = {
            target: quantized(place, model, found, work / "ours" / target, target)
            for target in ("openvino", "onnxruntime")
        }
        inputs = random_inputs(graph)
        pairs: list[dict[str, Callable[[], Session]]] = [
            {
                "OpenVINO bf16": lambda: compiled(file, graph, work / "ov16" / "d", "openvino", "bf16"),
                "OpenVINO fp32": lambda: compiled(file, graph, work / "ov32" / "d", "openvino", "fp32"),
                "OpenVINO int8, dexport": lambda: compiled(
                    ours["openvino"], graph, work / "ov8" / "d", "openvino", "int8"
                ),
            },
            {
                "ORT fp32, the plain hub graph": lambda: OnnxRuntimeSession(file, graph, None),
                "ORT int8, dexport": lambda: compiled(
                    ours["onnxruntime"], graph, work / "ort8" / "d", "onnxruntime", "int8"
                ),
            },
        ]
        if peers:  # before anything else is in memory
            theirs = nncf_model(file, [(inputs, {})], work / "nncf", "transformer")
            pairs[0]["OpenVINO int8, NNCF"] = lambda: open_ir(theirs, graph)
        for pair in pairs:
            sessions = {name: make() for name, make in pair.items()}
            seconds = take_turns(sessions, inputs, repeats)
            first = next(iter(seconds.values()))
            for name, value in seconds.items():
                print(f"{name:32} {value:6.3f} s a call, {first / value:4.2f} times as fast as the first", flush=True)
            del sessions


def engines(checkpoint: Path, hub: Path | None, statistics_: Path | None) -> None:
    """Seconds and size of the UNet's TensorRT-RTX engines, fp32 and int8."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        place, model = exported(checkpoint, hub, work)
        graph = model.graphs["denoiser"]
        found = statistics_ or work / "statistics"
        if not found.exists():
            calibrate(model, place, ["a", "b", "c", "d"], steps=1).save(found)
        files = {"fp32": place / graph.file, "int8": quantized(place, model, found, work / "ours")}
        for target in ("tensorrt:sm89", "tensorrt:sm120"):
            sizes = {}
            for precision, file in files.items():
                output = work / f"{target[9:]}-{precision}" / "d"
                output.mkdir(parents=True)
                begin = time.perf_counter()
                made = compilers.compile_graph(file, graph, output, Target.parse(target), precision, max_batch=1)
                sizes[precision] = (output.parent / made.file).stat().st_size
                share = f", {sizes[precision] / sizes['fp32']:.2f} of fp32" if precision != "fp32" else ""
                seconds = time.perf_counter() - begin
                print(f"{target} {precision}: {seconds:.0f} s, {sizes[precision] / 1e6:.0f} MB{share}", flush=True)


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "speed", "cost", "engines"))
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=256, help="how many emoji are drawn (default 256)")
    parser.add_argument("--budget", default="psnr=36", help="pictures: of our int8 bundles (default psnr=36)")
    parser.add_argument("--hub", type=Path, help="an exported hub of the checkpoint, reused if it is there")
    parser.add_argument("--statistics", type=Path, help="the hub's statistics, reused if they are there")
    parser.add_argument("--peers", action="store_true", help="speed: NNCF too, which needs 16 GB")
    parser.add_argument("--repeats", type=int, default=7, help="speed: calls of each (default 7)")
    options = parser.parse_args()
    if options.what == "pictures":
        pictures(options.count, options.budget)
    elif options.checkpoint is None:
        parser.error(f"{options.what} needs a CHECKPOINT; benchmarks/checkpoints.py makes one")
    elif options.what == "speed":
        speed(options.checkpoint, options.hub, options.statistics, options.peers, options.repeats)
    elif options.what == "cost":
        cost(options.checkpoint, options.hub)
    else:
        engines(options.checkpoint, options.hub, options.statistics)


if __name__ == "__main__":
    main()
