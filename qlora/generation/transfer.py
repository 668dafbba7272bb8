"""Lists to a device and results back, without waiting for what the device has still to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns numbers as a tensor on a device."""
    tensor = torch.tensor(values, dtype=dtype)
    return to_pinned(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_pinned(tensor: Tensor) -> Tensor:
    """Returns a copy in memory that a GPU reads by itself: a copy from any other would wait."""
    return tensor.pin_memory()


class Download:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        """The tensors may change as soon as this returns: what they hold now is copied."""
        self._event: torch.cuda.Event | None = None
        self._copies = [self._copy(tensor) for tensor in tensors]
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[Tensor]:
        """Returns the copies as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        self._event = self._event or torch.cuda.Event()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
