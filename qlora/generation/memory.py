"""How many rows are answered together: what the memory holds keys and values of."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import psutil
import torch

from qlora.generation.slot_model import SlotModel, serving
from qlora.runtime.device import free_memory

SHARE = 0.5
"""Of the memory that is free, what keys and values may take."""
_token_bytes: WeakKeyDictionary[torch.nn.Module, dict[torch.dtype, int]] = WeakKeyDictionary()


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory that is free; None: a device of this kind does not say."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return free_memory(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def token_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Returns the bytes of the keys and values of one token, in a model that is in evaluation mode, under autocast."""
    of_model = _token_bytes.setdefault(model, {})
    if dtype not in of_model:
        one = SlotModel(model, slots=1, length=1)
        with torch.inference_mode(), serving(model):
            one.read([[0]])
        held = (*one.cache.keys.values(), *one.cache.values.values())
        of_model[dtype] = max(sum(states.numel() * states.element_size() for states in held), 1)
    return of_model[dtype]
