"""Adapter matrices in one tensor learn to the bit what they learn one by one, and nothing waits for the device."""

import bitsandbytes as bnb
import bitsandbytes.optim.optimizer as library
import pytest
import torch
from bitsandbytes.optim import PagedAdamW32bit

from qlora.training import flat_optimizer
from qlora.training.flat_optimizer import flatten_groups, run_ahead


def train(kind: type[torch.optim.Optimizer], *, flat: bool) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 300), (70, 8), (33,))]
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "lr": 0.01}, {"params": []}]
    optimizer = kind(groups, lr=0.1)
    if flat_optimizer:
        flatten_groups(optimizer)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        for weight in weights:
            weight.grad = None
    return [weight.detach() for weight in weights], optimizer


@pytest.mark.parametrize(("chunk", "counts"), [(2**24, [1, 1, 0]), (1000, [3, 1, 0])])
@pytest.mark.parametrize("kind", [bnb.optim.PagedAdamW32bit, bnb.optim.Lion32bit, torch.optim.AdamW])
def test_the_weights_are_the_same_to_the_bit(
    kind: type[torch.optim.Optimizer], chunk: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.training.flat_optimizer.CHUNK", chunk)
    expected, _ = train(kind, flat=False)
    result, optimizer = train(kind, flat=True)
    for original, other in zip(result, expected, strict=True):
        assert torch.equal(original, other)
    assert [len(group["params"]) for group in optimizer.param_groups] == counts
    assert all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])


def test_a_group_of_two_data_types_is_left_alone() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    flatten_groups(optimizer)
    assert optimizer.param_groups[0]["params"] == weights


def test_a_weight_without_a_gradient_counts_as_zero() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    flatten_groups(optimizer)
    weights[0].grad = torch.ones(2)
    optimizer.step()
    assert weights[0].tolist() == [0, 0]
    assert weights[1].tolist() == [1, 1, 1]


def test_states_that_are_there_are_not_lost() -> None:
    _, optimizer = train(torch.optim.AdamW, flat=False)
    with pytest.raises(AssertionError):
        flatten_groups(optimizer)


@pytest.mark.parametrize("chunk", [100, 3])
def test_a_step_takes_the_gradients_that_have_added_up(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_optimizer, "CHUNK", chunk)
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    flatten_groups(optimizer)
    chunks = optimizer.param_groups[0]["params"]
    for _ in range(2):
        sum((weight**2).sum() for weight in weights).backward()
    for weight in weights:
        assert weight.grad is not None
        assert (weight.grad == 4).all()
        weight.grad *= 0.25  # as clipping does
    optimizer.step()
    assert torch.equal(torch.cat(list(chunks)), torch.zeros(10))
    assert all(item.grad is None for item in [*weights, *chunks])
    sum((weight - 1).sum() for weight in weights[:1]).backward()  # the second weight gets none this time
    optimizer.step()
    assert weights[0].tolist() == [[-1.0] * 3] * 2
    assert weights[1].tolist() == [0.0] * 4


def test_gradients_are_freed_one_chunk_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_optimizer, "CHUNK", 4)
    weights = [torch.nn.Parameter(torch.ones(count)) for count in (2, 4, 3)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    flatten_groups(optimizer)
    for weight in weights:
        weight.grad = torch.ones(len(weight))
    left: list[list[bool]] = []
    copy = flat_optimizer.foreach_copy

    def note(*lists: list[torch.Tensor]) -> None:
        left.append([weight.grad is not None for weight in weights])
        copy(*lists)

    monkeypatch.setattr(flat_optimizer, "foreach_copy", note)
    optimizer.step()
    assert left == [[True, True, True], [False, True, True], [False, False, True]]
    assert all(weight.eq(0).all() for weight in weights)


def test_a_step_does_not_wait_and_reading_the_states_does(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(library, "sync_gpu", lambda parameter: waits.append("step"))
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = PagedAdamW32bit([weight])
    original = library.sync_gpu

    def step() -> None:
        weight.grad = torch.ones(8, 8)
        optimizer.step()

    step()
    assert waits == ["step"] * 2
    run_ahead(optimizer)
    step()
    assert waits == ["step"] * 2
    assert library.sync_gpu is original
    assert optimizer.prefetch_state.__func__ is PagedAdamW32bit.prefetch_state


class OtherDevice:
    """A device with that many bytes left that notes what is asked of it."""

    def __init__(self, left: int) -> None:
        self.left, self.waits = left, 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.left, 1000

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1


@pytest.mark.parametrize("left", [255, 256])
def test_paged_states_are_fetched_after_they_were_read_and_where_memory_is_short(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, fetches = OtherDevice(left), []
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    weight = torch.nn.Parameter(torch.ones(8, 8, device="meta"))
    optimizer = PagedAdamW32bit([weight])
    monkeypatch.setattr(optimizer, "prefetch_state", fetches.append)
    monkeypatch.setattr(optimizer, "update_step", lambda *_: None)
    state = torch.zeros(8, 8)
    state.is_paged = True
    optimizer.state[weight] = {"state1": state}
    optimizer.initialized = True
    run_ahead(optimizer)

    def fetched_in_a_step() -> int:
        fetches.clear()
        weight.grad = torch.ones(8, 8, device="meta")
        optimizer.step()
        return len(fetches)

    assert fetched_in_a_step() == 1
    assert fetched_in_a_step() == (left < 256)
    assert device.waits == 0
    optimizer.state_dict()
    assert device.waits == 1
    assert fetched_in_a_step() == 1
    assert fetched_in_a_step() == (left < 256)
