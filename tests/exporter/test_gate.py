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

from exporter import ensemble, gate, hub, record, spread
from exporter.record import Reference
from exporter.spread import Limits
from runtimes.backends import openvino
from runtimes.errors import GateError
from runtimes.manifest import Model
from runtimes.safetensors import read_header
from runtimes.session import one_at_a_time

EMOJI = Path(__file__).parents[2] / "examples/emoji/model"
# OpenVINO's arithmetic stands for each precision: what it does in f32 and bf16 is what the bands allow for.
HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16", "fp8": "bf16"}
Spoil = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Recorded = tuple[Model, Path, Reference, dict[str, Limits]]  # the limits by precision


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("gate") / "hub"
    source = ensemble.read(EMOJI)
    model = hub.export(source, folder)
    reference = record.record(source, model, folder)
    noise = spread.measure(source, model, reference, list(HINTS), record.size(model))
    return model, folder, reference, {precision: spread.limits(noise, model, precision) for precision in HINTS}


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


def prove(built: Recorded, precision: str, wrong: dict[str, Path]) -> gate.Proof:
    model, folder, reference, limits = built

    @memoize
    def open_graph(name: str) -> Any:
        graph = replace(model.graphs[name], properties={"INFERENCE_PRECISION_HINT": HINTS[precision]})
        return openvino.open(wrong.get(name, folder / graph.file), graph, "cpu", 2, None)

    return gate.prove(reference, model, folder, precision, limits[precision], open_graph)


def bias_dropped(name: str) -> Spoil:
    return lambda values: {key: np.zeros_like(values[key]) for key in values if key.endswith(name)}


def scale_swapped(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One norm's scales in the wrong order."""
    return {key: values[key][::-1].copy() for key in values if key.endswith("conv_norm_out.weight")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_graphs_pass_with_room(built: Recorded, precision: str) -> None:
    accuracy = prove(built, precision, {}).accuracy
    assert accuracy["gate"] == "passed" and accuracy["reference"] == "diffusers StableDiffusionPipeline"
    steps = {name: len(drift) for name, drift in accuracy["latents_sqnr_db"].items()}
    assert steps == {"default settings": 3, "other settings": 2, "image to image": 1, "inpainting": 1}
    timesteps = [call["timestep"] for call in accuracy["graphs"]["denoiser"]]
    assert len(set(timesteps)) >= 2
    for name, calls in accuracy["graphs"].items():
        assert all(call["sqnr_db"] > call["least_db"] + 1 for call in calls), name


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
def test_wrong_graphs_fail(built: Recorded, precision: str, graph: str, spoil: Spoil) -> None:
    model, folder, reference, limits = built
    with (
        spoiled(folder / model.graphs[graph].file, spoil) as wrong,
        pytest.raises(GateError, match=f"gate for {precision} failed: graph {graph}") as error,
    ):
        only = replace(reference, calls={graph: reference.calls[graph]})
        prove((model, folder, only, limits), precision, {graph: wrong})
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)


def scale_doubled(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's weight with a scale that is off by a factor of two."""
    return {key: 2 * values[key] for key in values if key.endswith("up_blocks.2.resnets.1.conv_shortcut.weight")}


@pytest.mark.parametrize(
    ("precision", "wrong_denoiser"), [("int8", bias_dropped("conv_in.bias")), ("fp8", scale_doubled)]
)
def test_8_bits_stop_a_broken_denoiser_and_hold_the_graphs_beside_it_to_their_own_band(
    built: Recorded, precision: str, wrong_denoiser: Spoil
) -> None:
    """A wrong bias behind the last layer is no larger than their own noise: that is for the budget of a build."""
    model, folder, reference, limits = built
    own = {**limits["bf16"].calls, "denoiser": limits[precision].calls["denoiser"]}
    limits = {precision: replace(limits[precision], calls=own)}
    beside = {name: replace(graph, properties={"precision": "bf16"}) for name, graph in model.graphs.items()}
    graphs = replace(model, graphs=beside | {"denoiser": model.graphs["denoiser"]})
    for name, spoil in (("denoiser", wrong_denoiser), ("decoder", bias_dropped("conv_out.bias"))):
        with (
            spoiled(folder / model.graphs[name].file, spoil) as wrong,
            pytest.raises(GateError, match=f"gate for {precision} failed: graph {name}"),
        ):
            only = replace(reference, calls={name: reference.calls[name]})
            prove((graphs, folder, only, limits), precision, {name: wrong})


def test_golden_values_are_a_call_of_each_graph_and_the_run(built: Recorded, tmp_path: Path) -> None:
    model, _, reference, _ = built
    gate.write_golden(reference, tmp_path / "golden.safetensors")
    entries = read_header(tmp_path / "golden.safetensors")
    for name, graph in model.graphs.items():
        for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for tensor in tensors:
                assert entries[f"{name}/{side}/{tensor.name}"].shape == (1, *tensor.shape[1:])
    assert entries["run/tokens/tokens"].load()[:1].tolist() == entries["text/inputs/tokens"].load().tolist()
    assert (entries["text/inputs/tokens"].load() == entries["text/inputs/tokens"].load()[0, -1]).mean() < 1
    for index, latents in enumerate(reference.cases[0].latents):
        np.testing.assert_allclose(entries[f"run/latents/{index}"].load(), latents, rtol=1e-6, atol=1e-7)
    tensors = sum(len(graph.inputs) + len(graph.outputs) for graph in model.graphs.values())
    assert len(entries) == tensors + 1 + len(reference.cases[0].latents)


def test_one_graph_is_in_memory_at_a_time(built: Recorded) -> None:
    """Else the largest graph's memory would stand beside the next one's."""
    model, folder, reference, limits = built
    alive: WeakSet[Any] = WeakSet()

    def load(name: str) -> Any:
        assert not alive, f"{name} is opened while another graph is"
        session = openvino.open(folder / model.graphs[name].file, model.graphs[name], "cpu", 2, None)
        alive.add(session)
        return session

    gate.prove(reference, model, folder, "fp32", limits["fp32"], one_at_a_time(load))


def test_an_export_that_is_not_the_torch_model_is_refused_whatever_the_precision(built: Recorded) -> None:
    """A bias of one layer inside, which the noise of bf16 and of 8 bits hides."""
    model, folder, reference, _ = built
    source = ensemble.read(EMOJI)
    gate.prove_hub(source, reference, model, folder)
    graph = model.graphs["denoiser"]
    with spoiled(folder / graph.file, bias_dropped("up_blocks.2.resnets.1.conv1.bias")) as wrong:
        broken = replace(graph, file=wrong.relative_to(folder).as_posix())
        with pytest.raises(GateError, match=r"the exported graph denoiser is not the torch model: SQNR .* in fp32"):
            graphs = {**model.graphs, "denoiser": broken}
            gate.prove_hub(source, reference, replace(model, graphs=graphs), folder)
