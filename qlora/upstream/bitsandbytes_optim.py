"""The methods of bitsandbytes' optimizers that training replaces on an instance; `tests/upstream` checks each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes.optim.optimizer as library
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

OnTensor = Callable[[Tensor], Any]


def waits(optimizer: Optimizer8bit) -> tuple[OnTensor, OnTensor]:
    """Returns what waits for the device after a parameter, and what fetches a parameter's paged states."""
    return library.sync_gpu, optimizer.prefetch_state


def set_waits(optimizer: Optimizer8bit, wait: OnTensor, fetch: OnTensor) -> None:
    """Replaces what `waits` returns."""
    library.sync_gpu = wait  # type: ignore[assignment]  # declared with the name of its parameter
    optimizer.prefetch_state = fetch  # type: ignore[method-assign]  # of this instance alone


def wrap_update(optimizer: Optimizer8bit, wrapped: Callable[..., None]) -> None:
    """Replaces what updates one parameter."""
    optimizer.update_step = wrapped  # type: ignore[method-assign]  # of this instance alone


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the size of its paged states, which lie in managed memory: torch does not count them."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {value.data_ptr(): value for value in states if getattr(value, "is_paged", False)}
    return sum(tensor.nbytes for tensor in tensors.values())
