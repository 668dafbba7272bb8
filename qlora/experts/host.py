"""Weights of experts that wait in the host's memory, and are copied to the device one layer before they are needed.

Whatever holds such a weight holds the tensor on the host, and asks `on_device` for its copy where it computes with it.
So nothing keeps a copy between the passes: there is room for two layers on the device, one that computes and the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from qlora.errors import ConfigError
from qlora.experts.layout import find_experts
from qlora.experts.waiting import ROOM, spread

WAITING = "waiting_layer"
"""The attribute of an experts module whose weights wait."""


class Copies(Protocol):
    """How tensors get from the host to a device."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Returns a copy on the host."""

    def room(self, tensor: Tensor) -> Tensor:
        """Returns an uninitialised tensor on the device."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Starts copying the first of each pair to the second, once what the device was told so far is done."""

    def wait(self, started: Any) -> None:
        """Makes what the device is told from now on wait for copies that `start` has returned."""


class CudaCopies:
    """Copies in a stream of their own, while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Returns a copy in pinned memory."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def room(self, tensor: Tensor) -> Tensor:
        """Returns memory that is never handed back, so that no stream needs to be told of it."""
        return torch.empty_like(tensor, device=self.device)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Waits on the GPU alone, as `wait` does."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, started: torch.cuda.Event) -> None:
        """Has the current stream wait."""
        torch.cuda.current_stream(self.device).wait_event(started)


class HostLayers:
    """The layers of a model that wait, in the order in which a forward pass computes them."""

    def __init__(self, copies: Copies, count: int) -> None:
        self.copies, self.count = copies, count
        self._layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
        self._rooms: list[dict[str, Tensor]] = [{} for _ in range(ROOM)]
        self._held: list[int | None] = [None] * ROOM
        self._started: list[Any] = [None] * ROOM
        self._last = -1

    @property
    def nbytes(self) -> int:
        """The bytes of what waits."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer.values())

    def store(self, layer: int, name: str, tensor: Tensor) -> Tensor:
        """Moves a tensor of a layer to the host and returns it there."""
        self._layers[layer][name] = host = self.copies.to_host(tensor)
        return host

    def fetch(self, layer: int, name: str) -> Tensor:
        """Returns a tensor of a layer on the device, until the layer after the next is fetched; begins with the next.

        The next one is that behind it in a forward pass, and that before it in a backward pass; which of the two it is
        shows where the layer lies to the one before.
        """
        self._load(layer)
        if layer != self._last:
            begins = layer == 0 and self._last == self.count - 1
            ahead = layer + 1 if layer > self._last or begins else layer - 1
            if 0 <= ahead < self.count:
                self._load(ahead)
            self.copies.wait(self._started[layer % ROOM])
            self._last = layer
        return self._rooms[layer % ROOM][name]

    def _load(self, layer: int) -> None:
        index = layer % ROOM
        if self._held[index] == layer:
            return
        tensors, room = self._layers[layer], self._rooms[index]
        for name, tensor in tensors.items():
            if name not in room:
                room[name] = self.copies.room(tensor)
        self._held[index] = layer
        self._started[index] = self.copies.start([(tensor, room[name]) for name, tensor in tensors.items()])


@dataclass(frozen=True)
class WaitingLayer:
    """A layer whose experts wait."""

    layers: HostLayers
    index: int

    def store(self, name: str, tensor: Tensor) -> WaitingTensor:
        """Moves a tensor to the host; it waits as long as what this returns is there."""
        waiting = WaitingTensor(self, name, self.layers.store(self.index, name, tensor))
        _waiting[waiting.tensor.data_ptr()] = waiting
        return waiting


@dataclass(frozen=True, eq=False)
class WaitingTensor:
    """A tensor of a layer that waits."""

    layer: WaitingLayer
    name: str
    tensor: Tensor
    """It on the host."""

    def fetch(self) -> Tensor:
        """Returns it on the device."""
        return self.layer.layers.fetch(self.layer.index, self.name)


_waiting: WeakValueDictionary[int, WaitingTensor] = WeakValueDictionary()
"""The tensors that wait by the address of their memory: operators of torch are given tensors, and nothing else."""


def on_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors as a device computes with them: those that wait in its memory, the others as they are.

    The copies are there until the layer after the next is asked for.
    """
    waiting = [_waiting.get(tensor.data_ptr()) for tensor in tensors]
    return [tensor if copy is None else copy.fetch() for tensor, copy in zip(tensors, waiting, strict=True)]


def is_waiting(tensor: Tensor) -> bool:
    """Returns whether a tensor waits in the host's memory."""
    return tensor.data_ptr() in _waiting


_requested: ContextVar[tuple[int | None, Copies] | None] = ContextVar("requested", default=None)


@contextlib.contextmanager
def experts_on_host(count: int | None, copies: Copies) -> Iterator[None]:
    """Inside, the experts of `count` layers of a base wait as soon as they are stored; None: those of all layers."""
    token = _requested.set((count, copies))
    try:
        yield
    finally:
        _requested.reset(token)


def choose_waiting(model: nn.Module) -> None:
    """Marks the layers whose experts will wait, before any is stored, as `experts_on_host` asks for it.

    The layers between them compute while one is copied. Raises `ConfigError` for a dense model.
    """
    if (requested := _requested.get()) is None:
        return
    count, copies = requested
    if not (modules := list(find_experts(model).values())):
        raise ConfigError("quantization.experts_offload=all: the model is dense, it has no experts; leave it out")
    count = len(modules) if count is None else min(count, len(modules))
    layers = HostLayers(copies, count)
    for index, position in enumerate(spread(len(modules), count)):
        modules[position].__dict__[WAITING] = WaitingLayer(layers, index)


def describe_waiting(model: nn.Module) -> str | None:
    """Returns what the start screen says of experts that wait; None: there are none."""
    modules = list(find_experts(model).values())
    waiting = [layer for module in modules if (layer := waiting_layer(module)) is not None]
    if not waiting:
        return None
    host = waiting[0].layers.nbytes / 1e9
    return f"those of {len(waiting)} of {len(modules)} layers wait in the host's memory ({host:,.2f} GB)"


def waiting_layer(experts: nn.Module) -> WaitingLayer | None:
    """Returns the layer of a module whose experts wait; None: they do not."""
    return experts.__dict__.get(WAITING)
