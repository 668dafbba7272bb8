"""A few optimizer kernels for all adapter weights, in place of one a matrix, and no wait for each."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim.optimizer as library
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

from qlora.step.kernels.weights import overlaps

PIECE = 2**24
"""Most elements that the optimizer sees as one parameter, so that a copy of one is small; a multiple of its blocks."""


def flatten_groups(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer see each of its groups as large pieces of one tensor, before its first step.

    bitsandbytes starts a kernel for each tensor and waits for it, and a 7B model has 448 adapter matrices. Optimizers
    that treat every weight alike (Adam, Lion ...) compute the same; what a block of 8-bit states holds may span two
    matrices. The parameters become views of the joint tensor; a step takes their gradients away. A group of several
    data types or devices is left alone.
    """
    assert not optimizer.state, "the states of the parameters would be lost"
    groups: list[_Joint] = []
    for group in optimizer.param_groups:
        own = list(group["params"])
        if len({(parameter.dtype, parameter.device) for parameter in own}) == 1:
            groups.append(_Joint(own))
            group["params"] = groups[-1].pieces

    def complete(*_: Any) -> None:
        for group in groups:
            group.complete()

    def release(*_: Any) -> None:
        for group in groups:
            group.release()

    optimizer.register_step_pre_hook(complete)
    optimizer.register_step_post_hook(release)


def run_ahead(optimizer: Optimizer8bit) -> None:
    """Lets the host go on while the device takes a step of bitsandbytes' optimizer.

    bitsandbytes waits for the device after each parameter and at the end, because the host may read paged states: then
    the device has nothing to do until the host has started the next step. Here it is waited for before the states are
    read (`state_dict`); the kernels themselves follow one another anyway. Paged states are fetched before their kernel
    after they were read, and where the device has no room to spare: else they are there, and asking for them keeps the
    device for 0.2 ms each.
    """
    wait, fetch = library.sync_gpu, optimizer.prefetch_state
    were_read = True

    def begin(*_: Any) -> None:
        library.sync_gpu = _go_on
        optimizer.prefetch_state = fetch if were_read or _is_short(optimizer) else _go_on

    def end(*_: Any) -> None:
        nonlocal were_read
        were_read = False
        library.sync_gpu, optimizer.prefetch_state = wait, fetch

    def read(*_: Any) -> None:
        nonlocal were_read
        were_read = True
        for device in _devices(optimizer):
            torch.get_device_module(device).synchronize(device)

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    optimizer.register_state_dict_pre_hook(read)
    optimizer.register_load_state_dict_post_hook(read)


def _go_on(parameter: Tensor) -> None:
    pass


def _devices(optimizer: Optimizer8bit) -> set[torch.device]:
    found = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    return {device for device in found if device.type != "cpu"}


def _is_short(optimizer: Optimizer8bit) -> bool:
    """Returns whether a device has less memory left than the paged states take."""
    states = [each for state in optimizer.state.values() for each in state.values()]
    paged = sum(each.nbytes for each in states if getattr(each, "is_paged", False))
    return any(torch.get_device_module(device).mem_get_info(device)[0] < paged for device in _devices(optimizer))


class _Joint:
    """Parameters that are parts of one tensor, which the optimizer sees in pieces."""

    def __init__(self, own: list[torch.nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in own]
        joint = torch.cat([parameter.detach().view(-1) for parameter in own])
        self.pieces = [torch.nn.Parameter(piece) for piece in joint.split(PIECE)]
        for parameter, part in zip(own, joint.split(sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        self.parts = [
            [(own[index], part, place) for index, part, place in overlaps(sizes, begin, begin + PIECE)]
            for begin in range(0, len(joint), PIECE)
        ]
        """Of each piece: whose elements are in it, which of them, and where."""

    def complete(self) -> None:
        """Gives the pieces their gradients, those of the parameters, which go one piece after the other.

        Parameters without a gradient count as of gradient zero.
        """
        for piece, parts in zip(self.pieces, self.parts, strict=True):
            piece.grad = torch.zeros_like(piece)
            found = [(piece.grad[place], own.grad.view(-1)[part]) for own, part, place in parts if own.grad is not None]
            if found:
                torch._foreach_copy_([place for place, _ in found], [part for _, part in found])
            for own, part, _ in parts:
                if part.stop == own.numel():
                    own.grad = None

    def release(self) -> None:
        """Forgets the gradients."""
        for piece in self.pieces:
            piece.grad = None
