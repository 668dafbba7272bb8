"""Keeps the inputs of checkpointed layers in the host's memory; copies overlap with the computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Saved:
    """One input in the host's memory."""

    copy: Tensor
    previous: _Saved | None
    """The input of the layer before, which the backward pass needs next."""
    back: Tensor | None = None
    """The input on its device, once its copy has been started."""
    arrived: torch.cuda.Event | None = None


class Offloading:
    """Calls checkpointed layers so that the input, the only tensor that they keep, is kept in the host's memory.

    On a GPU the copies run in a stream of their own: to the host while the layer computes, and back during the backward
    pass of the layer after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Saved | None = None

    def begin(self) -> None:
        """Begins a forward pass."""
        self._last = None

    def call(self, checkpointed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a checkpointed layer."""
        with saved_tensors_hooks(self.store, self.fetch):
            return checkpointed(*args, **kwargs)

    def store(self, tensor: Tensor) -> _Saved | Tensor:
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
        self._last = _Saved(copy, self._last)
        return self._last

    def fetch(self, saved: _Saved | Tensor) -> Tensor:
        """Returns a saved tensor on the device, and starts the copy of the previous one."""
        if isinstance(saved, Tensor):
            return saved
        tensor = self._send(saved)
        if saved.previous is not None:
            self._send(saved.previous)
        if saved.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(saved.arrived)
        saved.back = None
        return tensor

    def _send(self, saved: _Saved) -> Tensor:
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
