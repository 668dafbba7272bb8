"""Checkpointed layers by graphs: what is around the graphs, with a simulation of them; tests/gpu has the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.config.compose import compose
from qlora.step import layer_graphs
from qlora.step.layer_graphs import LayerGraphs
from tests.step import test_fast_experts
from tests.step.test_fast_experts import attach, check_equal, learn, write

CPU = torch.device("cpu")


class Simulated:
    """What a graph does, by computing the layer again: it reads and writes where it was captured."""

    def __init__(self, call: Any, signature: Any, tensors: list[Tensor]) -> None:
        self.call, self.signature, self.tensors, self.replays = call, signature, tensors, 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        args, kwargs = self.signature.arguments(self.tensors)
        self.tensors[0].copy_(self.call(*args, **kwargs))


class SimulatedGraphs(LayerGraphs):
    """Layers by simulated graphs."""

    def _capture(self, index: int, layer: nn.Module, call: Any, signature: Any, buffers: Any) -> bool:
        buffers.graphs[index] = layer_graphs._Graph(Simulated(call, signature, buffers.tensors), [])  # type: ignore[arg-type]
        return True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> LayerGraphs:
    monkeypatch.setattr(layer_graphs, "capture_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return SimulatedGraphs(CPU, has_dropout=False)


def replays(graphs: LayerGraphs) -> list[int]:
    held = [graph.graph for buffers in graphs._buffers.values() for graph in buffers.graphs.values()]
    return [graph.replays for graph in held]  # type: ignore[attr-defined]


@pytest.mark.parametrize("offloads", [False, True])
def test_a_model_learns_the_same_by_graphs(
    offloads: bool, graphs: LayerGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(write("qwen3_moe", tmp_path), "quantization=nf4", "lora.dropout=0")
    fast = ("trainer.fused_experts=true", "trainer.fused_linear=true", "trainer.gradient_checkpointing=true")
    expected, step = learn(model, *fast)

    def build(*args: Any) -> Any:
        step = FastStep(*args)
        step._calls.graphs = graphs
        step.offloaded = len(step.layers) if offloads else 0
        return step

    FastStep = test_fast_experts.FastStep
    monkeypatch.setattr(test_fast_experts, "FastStep", build)
    learn(model, *fast)
    actual, step = learn(model, *fast)
    check_equal(actual, expected)
    assert torch.equal(actual["loss"], expected["loss"])
    assert replays(graphs) == [3] * len(step.layers)
    step.free()
    assert not graphs._buffers
    learn(model, *fast)
    assert step.give_up_graphs()
    assert not step.give_up_graphs()
    check_equal(learn(model, *fast)[0], expected)
    assert not graphs._buffers


class Layer(nn.Module):
    """A layer that adds what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, hidden: Tensor, angles: tuple[Tensor, ...], factor: float = 1.0) -> Tensor:
        return hidden * self.weight + sum(angles) * factor


def call(graphs: LayerGraphs, layer: Layer, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = graphs.call(0, layer, layer, layer, torch.enable_grad, hidden, *args, **kwargs)
    return output


def test_a_graph_reads_the_arguments_of_each_call(graphs: LayerGraphs) -> None:
    layer, angles = Layer(), (torch.ones(3, 2), torch.ones(1, 2).expand(3, 2))
    graphs.begin([layer])
    for count in range(4):
        hidden = torch.full((3, 2), float(count), requires_grad=True)
        output = call(graphs, layer, hidden, angles)
        output.sum().backward()
        assert torch.equal(output, torch.full((3, 2), count + 2.0))
        assert torch.equal(hidden.grad, torch.ones(3, 2))
    angles[0].add_(1)  # in place
    assert torch.equal(call(graphs, layer, hidden, angles), torch.full((3, 2), 6.0))
    assert torch.equal(call(graphs, layer, call(graphs, layer, hidden, angles), angles), torch.full((3, 2), 9.0))
    assert replays(graphs) == [6]


def test_what_a_graph_cannot_hold_is_computed_without(graphs: LayerGraphs) -> None:
    layer, hidden, angles = Layer(), torch.ones(3, 2, requires_grad=True), (torch.ones(3, 2),)
    graphs.begin([layer])
    for _ in range(3):
        with torch.no_grad():
            call(graphs, layer, hidden, angles)
        call(graphs, layer, hidden.detach(), angles)  # nothing to learn
        call(graphs, layer, hidden, [torch.ones(3, 2)])
        call(graphs, layer, hidden, (torch.ones(3, 2, requires_grad=True),))
    assert not replays(graphs)


def test_each_number_and_shape_has_its_graph_and_there_are_two_shapes(graphs: LayerGraphs) -> None:
    layer = Layer()
    graphs.begin([layer])
    for factor, tokens in ((1.0, 3), (2.0, 3), (2.0, 5)):
        hidden, angles = torch.ones(tokens, 2, requires_grad=True), (torch.ones(tokens, 2),)
        for _ in range(3):
            assert torch.equal(call(graphs, layer, hidden, angles, factor=factor), hidden + factor)
    assert replays(graphs) == [2, 2]


def test_graphs_of_weights_that_have_moved_are_captured_again(graphs: LayerGraphs) -> None:
    layer, hidden, angles = Layer(), torch.ones(3, 2, requires_grad=True), (torch.ones(3, 2),)
    for moved in (False, True, False):
        if moved:
            layer.weight = nn.Parameter(torch.full((2,), 2.0))
        graphs.begin([layer])
        for _ in range(2):
            output = call(graphs, layer, hidden, angles)
            assert torch.equal(output, hidden * layer.weight + 1)
            output.sum().backward()
    assert layer.weight.grad is not None
    assert replays(graphs) == [3]


def test_graphs_on_a_cpu_are_refused_in_one_sentence(tmp_path: Path) -> None:
    model = attach(write("qwen3_moe", tmp_path), "quantization=nf4")
    with pytest.raises(
        Exception, match=r"cuda_graphs=true: the device is no GPU of NVIDIA; set trainer\.cuda_graphs=a"
    ):
        learn(model, "trainer.cuda_graphs=true")
    with pytest.raises(Exception, match=r"trainer\.cuda_graphs must be true, false or auto, got 'yes'"):
        compose(["trainer.cuda_graphs=yes"])
