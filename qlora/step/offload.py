"""Keeps what checkpointed layers keep in the host's memory; copies overlap with the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class Saved:
    """One tensor in the host's memory."""

    copy: Tensor
    layer: _Layer
    back: Tensor | None = None
    """The tensor on its device, once its copy has been started."""
    arrived: torch.cuda.Event | None = None


@dataclass
class _Layer:
    """What the call of one layer keeps."""

    previous: _Layer | None
    """The layer before, whose tensors the backward pass needs next."""
    tensors: list[Saved] = field(default_factory=list)
    is_sent: bool = False
    """Whether copies back to the device have been started."""


class Offloading:
    """Calls checkpointed layers so that what they keep is kept in the host's memory.

    That is their input and, of long rows, the output of their attention. On a GPU the copies run in a stream of their
    own: to the host while the next layers compute, and back during the backward pass of the layer after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Layer | None = None
        self._leaving: deque[tuple[_Layer | None, Tensor, torch.cuda.Event]] = deque()
        """Copies to the host that the computing stream has not waited for; their layer, if they began within it."""

    def begin(self) -> None:
        """Begins a forward pass."""
        self._last = None
        self._wait()

    def call(self, checkpointed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a checkpointed layer."""
        self._last = _Layer(self._last)
        with saved_tensors_hooks(self.store, self.fetch):
            results = checkpointed(*args, **kwargs)
        self._wait(within=self._last)
        return results

    def store_output(self, tensor: Tensor) -> Saved | Tensor:
        """Copies what the layer that is called computes on its way; the next layer waits for the copy, not this one."""
        return self.store(tensor, within=self._last)

    def store(self, tensor: Tensor, within: _Layer | None = None) -> Saved | Tensor:
        """Copies a tensor to the host, if it is on the device, for the layer that is called."""
        if tensor.device.type != self.device.type:
            return tensor
        assert self._last is not None
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            copy.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                copy.copy_(tensor, non_blocking=True)
            # Held until the computing stream has waited for the copy. To record the stream of the copy instead would
            # leave it to chance when the memory is free: the host is many layers ahead.
            self._leaving.append((within, tensor, self._stream.record_event()))
        saved = Saved(copy, self._last)
        self._last.tensors.append(saved)
        return saved

    def fetch(self, saved: Saved | Tensor) -> Tensor:
        """Returns a saved tensor on the device, and starts the copies of the layer before."""
        if isinstance(saved, Tensor):
            return saved
        self._wait()
        self._send_layer(saved.layer)
        if saved.layer.previous is not None:
            self._send_layer(saved.layer.previous)
        tensor = self._send(saved)
        if saved.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(saved.arrived)
        saved.back = None
        return tensor

    def _wait(self, within: _Layer | None = None) -> None:
        """Has the computing stream wait for copies to the host, but not those that began within a layer."""
        while self._leaving and (within is None or self._leaving[0][0] is not within):
            _, _, event = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)

    def _send_layer(self, layer: _Layer) -> None:
        if not layer.is_sent:
            layer.is_sent = True
            for saved in layer.tensors:
                self._send(saved)

    def _send(self, saved: Saved) -> Tensor:
        if saved.back is None:
            saved.back = torch.empty_like(saved.copy, device=self.device)
            if self._stream is None:
                saved.back.copy_(saved.copy)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    saved.back.copy_(saved.copy, non_blocking=True)
                saved.arrived = self._stream.record_event()
        return saved.back
