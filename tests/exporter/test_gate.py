"""The gate lets right graphs pass and stops subtly wrong ones, in each precision's band, on the reference model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as memoize
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from exporter import checkpoint, gate, hub
from runtimes.accuracy import BANDS
from runtimes.backends import openvino
from runtimes.errors import GateError
from runtimes.manifest import Model
from runtimes.safetensors import read_header

EMOJI = Path(__file__).parents[2] / "examples/emoji/model"
# OpenVINO's arithmetic stands for each precision: what it does in f32 and bf16 is what the bands allow for.
HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16", "fp8": "bf16"}
Spoil = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, gate.Reference]:
    folder = tmp_path_factory.mktemp("gate") / "hub"
    model = hub.export(EMOJI, folder)
    return model, folder, gate.record(checkpoint.read(EMOJI), model, folder)


@contextmanager
def spoiled(file: Path, spoil: Spoil) -> Iterator[Path]:
    """A graph beside the right one, with some initializers changed."""
    model = onnx.load(file)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    changed = spoil(values)
    assert changed, "the spoiling found nothing to change"
    for tensor in model.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed[tensor.name], tensor.name))
    wrong = file.with_name("wrong.onnx")
    onnx.save(model, wrong)
    try:
        yield wrong
    finally:
        wrong.unlink()


def prove(built: tuple[Model, Path, gate.Reference], precision: str, wrong: dict[str, Path]) -> gate.Proof:
    model, folder, reference = built

    @memoize
    def open_graph(name: str) -> Any:
        graph = replace(model.graphs[name], properties={"INFERENCE_PRECISION_HINT": HINTS[precision]})
        return openvino.open(wrong.get(name, folder / graph.file), graph, "cpu", 2, None)

    return gate.prove(reference, model, folder, precision, open_graph)


def bias_dropped(name: str) -> Spoil:
    return lambda values: {key: np.zeros_like(values[key]) for key in values if key.endswith(name)}


def scale_swapped(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One norm's scales in the wrong order."""
    return {key: values[key][::-1].copy() for key in values if key.endswith("conv_norm_out.weight")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_graphs_pass_with_room(built: tuple[Model, Path, gate.Reference], precision: str) -> None:
    proof = prove(built, precision, {})
    assert proof.accuracy["gate"] == "passed"
    assert len(proof.accuracy["latents_sqnr_db"]) == gate.STEPS
    timesteps = [call["timestep"] for call in proof.accuracy["graphs"]["denoiser"]]
    assert len(set(timesteps)) == gate.STEPS
    worst = min(call["sqnr_db"] for calls in proof.accuracy["graphs"].values() for call in calls)
    assert worst > BANDS[precision].graph + 3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("graph", "spoil"),
    [
        ("denoiser", bias_dropped("conv_in.bias")),
        ("denoiser", bias_dropped("conv_out.bias")),
        ("denoiser", scale_swapped),
        ("decoder", bias_dropped("conv_out.bias")),
        ("encoder", bias_dropped("conv_in.bias")),
        ("text", bias_dropped("final_layer_norm.bias")),
    ],
    ids=["input bias", "output bias", "swapped scales", "decoder bias", "encoder bias", "text bias"],
)
def test_wrong_graphs_fail(built: tuple[Model, Path, gate.Reference], precision: str, graph: str, spoil: Spoil) -> None:
    model, folder, reference = built
    with (
        spoiled(folder / model.graphs[graph].file, spoil) as wrong,
        pytest.raises(GateError, match=f"gate for {precision} failed: graph {graph}") as error,
    ):
        prove((model, folder, replace(reference, calls={graph: reference.calls[graph]})), precision, {graph: wrong})
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)


def scale_doubled(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's weight with a scale that is off by a factor of two."""
    return {key: 2 * values[key] for key in values if key.endswith("up_blocks.2.resnets.1.conv_shortcut.weight")}


@pytest.mark.parametrize(
    ("precision", "wrong_denoiser"), [("int8", bias_dropped("conv_in.bias")), ("fp8", scale_doubled)]
)
def test_8_bits_stop_a_broken_denoiser_and_hold_the_graphs_beside_it_to_their_own_band(
    built: tuple[Model, Path, gate.Reference], precision: str, wrong_denoiser: Spoil
) -> None:
    """A wrong bias behind the last layer is no larger than their own noise: that is for the budget of a build."""
    model, folder, reference = built
    beside = {name: replace(graph, properties={"precision": "bf16"}) for name, graph in model.graphs.items()}
    graphs = replace(model, graphs=beside | {"denoiser": model.graphs["denoiser"]})
    for name, spoil in (("denoiser", wrong_denoiser), ("decoder", bias_dropped("conv_out.bias"))):
        with (
            spoiled(folder / model.graphs[name].file, spoil) as wrong,
            pytest.raises(GateError, match=f"gate for {precision} failed: graph {name}"),
        ):
            prove((graphs, folder, replace(reference, calls={name: reference.calls[name]})), precision, {name: wrong})


def test_golden_vectors_are_one_recorded_call_of_each_graph(
    built: tuple[Model, Path, gate.Reference], tmp_path: Path
) -> None:
    model, _, reference = built
    gate.write_golden(reference, tmp_path / "golden.safetensors")
    entries = read_header(tmp_path / "golden.safetensors")
    for name, graph in model.graphs.items():
        for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for tensor in tensors:
                assert entries[f"{name}/{side}/{tensor.name}"].shape == (1, *tensor.shape[1:])
    assert len(entries) == sum(len(graph.inputs) + len(graph.outputs) for graph in model.graphs.values())


def test_one_graph_is_in_memory_at_a_time(built: tuple[Model, Path, gate.Reference]) -> None:
    """Else the largest graph's memory would stand beside the next one's."""
    model, folder, reference = built
    alive: WeakSet[Any] = WeakSet()

    def load(name: str) -> Any:
        assert not alive, f"{name} is opened while another graph is"
        session = openvino.open(folder / model.graphs[name].file, model.graphs[name], "cpu", 2, None)
        alive.add(session)
        return session

    gate.prove(reference, model, folder, "fp32", gate.one_at_a_time(load))
