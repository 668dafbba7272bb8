"""A few optimizer kernels for all adapter weights, in place of one a matrix, and no wait for each."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import bitsandbytes.optim.optimizer as library
import torch
from bitsandbytes.functional import prefetch_tensor
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

PIECE = 2**24
"""Most elements that the optimizer sees as one parameter, so that a copy of one is small; a multiple of its blocks."""


def flatten_groups(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer see each of its groups as large pieces of one tensor, before its first step.

    bitsandbytes starts a kernel for each tensor and waits for it, and a 7B model has 448 adapter matrices. Optimizers
    that treat every weight alike (Adam, Lion ...) compute the same; what a block of 8-bit states holds may span two
    matrices. The parameters become views of the joint tensor; so do their gradients, one by one as they are computed.
    A group of several data types or devices is left alone.
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
    read (`state_dict`), and paged states are sent to the host, which would fetch them page by page; the kernels
    themselves follow one another anyway. Paged states are fetched before their kernel after they were read, and where
    the device has no room to spare: else they are there, and asking for them keeps the device for 0.2 ms each.
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
        for device in _devices(optimizer):
            torch.get_device_module(device).synchronize(device)
        for states in _paged(optimizer):
            prefetch_tensor(states, to_cpu=True)
        were_moved()

    def were_moved(*_: Any) -> None:
        nonlocal were_read
        were_read = True

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    optimizer.register_state_dict_pre_hook(read)
    optimizer.register_load_state_dict_post_hook(were_moved)


def _go_on(parameter: Tensor) -> None:
    pass


def _devices(optimizer: Optimizer8bit) -> set[torch.device]:
    found = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    return {device for device in found if device.type != "cpu"}


def _paged(optimizer: Optimizer8bit) -> list[Tensor]:
    """Returns the paged states of what lies on a device."""
    return [
        each
        for parameter, state in optimizer.state.items()
        for each in state.values()
        if parameter.device.type != "cpu" and getattr(each, "is_paged", False)
    ]


def _is_short(optimizer: Optimizer8bit) -> bool:
    """Returns whether a device has less memory left than the paged states take."""
    paged = sum(states.nbytes for states in _paged(optimizer))
    return any(torch.get_device_module(device).mem_get_info(device)[0] < paged for device in _devices(optimizer))


class _Joint:
    """Parameters that are parts of one tensor, and whose gradients are parts of its gradient."""

    def __init__(self, own: list[torch.nn.Parameter]) -> None:
        self.own, self.first = own, [0, *accumulate(parameter.numel() for parameter in own)]
        joint = torch.cat([parameter.detach().view(-1) for parameter in own])
        self.pieces = [torch.nn.Parameter(piece) for piece in joint.split(PIECE)]
        self.gradient: Tensor | None = None
        for index, parameter in enumerate(own):
            parameter.data = self._part(joint, index)
            parameter.register_post_accumulate_grad_hook(partial(self._move, index))

    def _part(self, joint: Tensor, index: int) -> Tensor:
        return joint[self.first[index] : self.first[index + 1]].view(self.own[index].shape)

    def _move(self, index: int, parameter: Tensor) -> None:
        """Moves a gradient to its part of the joint one, if it is not there; what is added later is added there."""
        if self.gradient is None:
            self.gradient = parameter.new_empty(self.first[-1])
        part = self._part(self.gradient, index)
        assert parameter.grad is not None
        if parameter.grad.data_ptr() != part.data_ptr():
            part.copy_(parameter.grad)
            parameter.grad = part

    def complete(self) -> None:
        """Gives the pieces their gradients; parameters without one count as of gradient zero."""
        for index, parameter in enumerate(self.own):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._move(index, parameter)
        assert self.gradient is not None
        for piece, gradient in zip(self.pieces, self.gradient.split(PIECE), strict=True):
            piece.grad = gradient

    def release(self) -> None:
        """Forgets the joint gradient; its parts, the parameters' own ones, go with `zero_grad`."""
        self.gradient = None
        for piece in self.pieces:
            piece.grad = None
