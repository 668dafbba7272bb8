"""The states of the random number generators that a computation on a device draws from: the CPU's, and the device's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Returns the state of the CPU's generator, and of the device's."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Makes the generators draw from `states` on."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def drawing_from(device: torch.device, states: Sequence[Tensor]) -> Iterator[None]:
    """Makes the generators draw from `states` on inside the block, and as before after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        set_random_states(device, states)
        yield
