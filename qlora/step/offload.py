"""The inputs of checkpointed layers wait for the backward pass in the host's memory, moved beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Stored:
    """One input in the host's memory."""

    copy: Tensor
    before: _Stored | None
    """That of the layer before, which the backward pass needs next."""
    back: Tensor | None = None
    """The input on its device, where it is on its way there."""
    arrived: torch.cuda.Event | None = None


class Offloading:
    """Calls checkpointed layers so that what they keep, their input alone, waits in the host's memory.

    On a GPU a stream of its own copies: to the host while the layer computes, and back while the layer after it goes
    backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Stored | None = None

    def begin(self) -> None:
        """Begins a forward pass."""
        self._last = None

    def call(self, checkpointed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a checkpointed layer."""
        with saved_tensors_hooks(self.store, self.fetch):
            return checkpointed(*args, **kwargs)

    def store(self, tensor: Tensor) -> _Stored | Tensor:
        """Copies a tensor to the host, if it is on the device."""
        if tensor.device.type != self.device.type:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            copy.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
        self._last = _Stored(copy, self._last)
        return self._last

    def fetch(self, stored: _Stored | Tensor) -> Tensor:
        """Returns a stored tensor on the device, and starts the copy of the one before it."""
        if isinstance(stored, Tensor):
            return stored
        found = self._send(stored)
        if stored.before is not None:
            self._send(stored.before)
        if stored.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(stored.arrived)
        stored.back = None
        return found

    def _send(self, stored: _Stored) -> Tensor:
        if stored.back is None:
            stored.back = torch.empty_like(stored.copy, device=self.device)
            if self._stream is None:
                stored.back.copy_(stored.copy)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    stored.back.copy_(stored.copy, non_blocking=True)
                stored.arrived = self._stream.record_event()
        return stored.back
