"""Experts that wait in the host's memory compute what others do, and are copied one layer before they are needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.config.compose import compose
from qlora.errors import ConfigError
from qlora.experts.forward import use_experts
from qlora.experts.host import (
    HostLayers,
    WaitingLayer,
    choose_waiting,
    describe_waiting,
    experts_on_host,
    is_waiting,
    on_device,
)
from qlora.experts.layout import ExpertsLayout, find_experts, stored_experts
from qlora.experts.waiting import spread
from qlora.models.fingerprint import adapter_digest
from qlora.run import Run
from tests.models.bases import load, write
from tests.step.test_fast_experts import WIDTHS, attach, learn
from tests.step.test_kept_experts import RUN

FAST = ("trainer.fused_experts=true", "trainer.fused_linear=true")


class SlowCopies:
    """Copies that arrive when they are waited for and not before; until then the room holds rubbish."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.layers: list[Tensor] = []
        self.rooms: list[Tensor] = []

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def room(self, tensor: Tensor) -> Tensor:
        self.rooms.append(torch.empty_like(tensor))
        return self.rooms[-1]

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        for _, room in pairs:
            room.view(torch.uint8).fill_(255)
        return list(pairs)

    def wait(self, started: list[tuple[Tensor, Tensor]]) -> None:
        for source, room in started:
            room.copy_(source)


class Logged(SlowCopies):
    """The same, with a log of what starts and what is waited for, by the first number of each layer."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        self.log.append(("start", int(pairs[0][0].flatten()[0])))
        return super().start(pairs)

    def wait(self, started: Any) -> None:
        self.log.append(("wait", int(started[0][0].flatten()[0])))
        super().wait(started)


def passed(copies: Logged, layers: HostLayers, order: Sequence[int]) -> list[str]:
    """Fetches layers in an order, each twice, and returns what was started or waited for."""
    copies.log.clear()
    for layer in (layer for layer in order for _ in range(2)):
        assert layers.fetch(layer, "weight").tolist() == [layer] * 4
    return [f"{kind} {layer}" for kind, layer in copies.log]


def test_the_next_layer_is_on_its_way_while_one_computes_forward_and_backward() -> None:
    layers = HostLayers(copies := Logged(), 4)
    for layer in range(4):
        layers.store(layer, "weight", torch.full((4,), layer))
    forward = passed(copies, layers, [0, 1, 2, 3])
    assert forward == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "start 3", "wait 2", "wait 3"]
    backward = passed(copies, layers, [3, 2, 1, 0])
    assert backward == ["start 1", "wait 2", "start 0", "wait 1", "wait 0"]  # the last two were there
    again = passed(copies, layers, [0, 1, 2, 3])
    assert again == ["start 2", "wait 1", "start 3", "wait 2", "wait 3"]
    answer = passed(copies, layers, [0, 1, 2, 3])  # forward passes alone, as in an answer
    assert answer == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "start 3", "wait 2", "wait 3"]
    assert len(copies.rooms) == 2
    assert layers.nbytes == 4 * 4 * 8


@pytest.mark.parametrize("order", [[0, 0, 0], [0, 1, 1, 0, 0, 1], [0, 2, 1, 0, 2], [1, 0, 2, 2, 0, 1]])
def test_any_order_gives_the_layer_that_is_asked_for(order: list[int]) -> None:
    layers = HostLayers(copies := Logged(), count := max(order) + 1)
    for layer in range(count):
        layers.store(layer, "weight", torch.full((4,), layer))
    passed(copies, layers, order)


def test_a_tensor_waits_as_long_as_it_is_held() -> None:
    layer = WaitingLayer(HostLayers(SlowCopies(), 1), 0)
    waiting = layer.store("weight", torch.arange(3))
    host, other = waiting.tensor, torch.arange(3)
    copy, same = on_device([host, other])
    assert is_waiting(host)
    assert copy is not host
    assert copy.tolist() == [0, 1, 2]
    assert same is other
    del waiting
    assert not is_waiting(host)
    assert on_device([host])[0] is host


def test_layers_that_wait_are_spread_evenly() -> None:
    assert spread(8, 2) == [2, 6]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert all(len(set(spread(48, count))) == count and spread(48, count)[-1] < 48 for count in range(1, 49))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen3_moe", tmp_path_factory.mktemp("base"), **WIDTHS, num_hidden_layers=4)


@pytest.mark.parametrize("count", [None, 3], ids=["all", "three"])
@pytest.mark.parametrize(
    "overrides",
    [("trainer.fused_experts=false",), FAST, (*FAST, "quantization.compute=fp8"), (*FAST, "trainer.compile=true")],
    ids=["plain", "fast", "fp8", "compiled"],
)
@pytest.mark.matrix(2)
def test_loss_and_gradients_have_the_bits_of_experts_on_the_device(
    folder: Path, count: int | None, overrides: tuple[str, ...]
) -> None:
    overrides = (*overrides, "trainer.gradient_checkpointing=true")
    expected, _ = learn(attach(folder, "quantization=nf4", "lora.dropout=0"), *overrides)
    with experts_on_host(count, copies := SlowCopies()):
        model = attach(folder, "quantization=nf4", "lora.dropout=0")
    actual, _ = learn(model, *overrides)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert len(copies.rooms) == 2 * 3 * 2  # layers, matrices, and each one's codes and scales
    moved = sum(is_waiting(buffer) for buffer in model.buffers())
    assert moved == (count or 4) * 3 * 2
    assert str(describe_waiting(model)).startswith(f"those of {count or 4} of 4 layers wait in the host's memory (")


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("bits", ["quantization=nf4", "quantization=nf4-plain"])
def test_other_layouts_wait_too(kind: str, bits: str, tmp_path: Path) -> None:
    base = write(kind, tmp_path, **WIDTHS)
    ids = torch.arange(12)[None]
    expected = load(base, bits)(input_ids=ids).logits
    with experts_on_host(None, SlowCopies()):
        model = load(base, bits)
    assert describe_waiting(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_moving_a_model_leaves_what_waits_on_the_host(folder: Path) -> None:
    with experts_on_host(2, SlowCopies()):
        model = load(folder, "quantization=nf4")
    waiting = {name: buffer for name, buffer in model.named_buffers() if is_waiting(buffer)}
    for experts in find_experts(model).values():
        experts.to(torch.float64)
    moved = dict(model.named_buffers())
    assert len(waiting) == 2 * 3 * 2
    assert all(moved[name] is tensor for name, tensor in waiting.items())


def test_of_few_tokens_only_the_experts_that_compute_them_are_copied(folder: Path) -> None:
    with experts_on_host(None, copies := Logged()):
        model = load(folder, "quantization=nf4")
    use_experts(model)
    copies.log.clear()
    experts = next(iter(find_experts(model).values()))
    store: Any = stored_experts(experts)
    _, down = ExpertsLayout.of(experts).projections
    few = store.decode(down, torch.float32, torch.tensor([2, 0]))
    assert copies.log == []
    assert torch.equal(few, store.decode(down, torch.float32)[[2, 0]])
    assert copies.log


def test_a_dense_model_has_no_experts_that_could_wait() -> None:
    message = "quantization.experts_offload=all: the model is dense, it has no experts; leave it out"
    with experts_on_host(None, SlowCopies()), pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        choose_waiting(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["quantization=int8"], "quantization.bits=8 exclude each other: it is for experts in 4 bits"),
        (["quantization=none"], "quantization.bits=16 exclude each other: it is for experts in 4 bits"),
        (["quantization.experts=none"], "quantization.experts=none exclude each other: it is for experts in 4 bits"),
        (["model.device_map=auto"], "model.device_map exclude each other: that spreads the base by itself"),
        (["trainer.parallel=fsdp"], "trainer.parallel=fsdp exclude each other: a process holds a part of every layer"),
    ],
)
def test_what_cannot_wait_is_refused_in_one_sentence(overrides: list[str], reason: str) -> None:
    message = f"quantization.experts_offload=all and {reason}; leave one of them out"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        compose(["quantization.experts_offload=all", *overrides])


def test_experts_wait_for_a_cuda_gpu_alone(folder: Path, tmp_path: Path) -> None:
    overrides = [f"model.name={folder}", "model.tokenizer=tiny", "device=cpu"]
    assert Run(compose(overrides), tmp_path / "auto").session.waiting_experts == 0
    refused = Run(compose([*overrides, "quantization.experts_offload=all"]), tmp_path / "all")
    message = (
        "quantization.experts_offload=all has experts wait for a CUDA GPU, and this run computes on cpu; leave it out"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        _ = refused.session.is_trainable


def test_a_run_whose_experts_wait_ends_with_the_same_adapter_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *overrides: str) -> str:
        Run(compose([*RUN, f"model.name={folder}", *overrides]), tmp_path / name).execute()
        return adapter_digest(tmp_path / name / "adapter")

    expected = run("whole")
    assert "wait in the host's memory" not in capsys.readouterr().out
    monkeypatch.setattr("qlora.session.waiting_for_run", lambda config, run: 3)
    monkeypatch.setattr("qlora.session.CudaCopies", lambda device: SlowCopies())
    assert run("waiting", "quantization.experts_offload=all") == expected
    screen = " ".join(capsys.readouterr().out.split())
    assert "experts those of 3 of 4 layers wait in the host's memory (0.00 GB)" in screen
    adapter = tmp_path / "waiting" / "adapter"
    (tmp_path / "waiting" / "result.json").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    assert run("waiting", "quantization.experts_offload=none") == expected  # resumed: it may change
