"""Updates all adapter weights with a few kernels, not one per matrix, and without a wait after each."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

from qlora.step.kernels.dequantize import overlaps
from qlora.upstream.bitsandbytes_optim import set_waits, waits
from qlora.upstream.torch import foreach_copy

CHUNK = 2**24
"""The maximum of elements that the optimizer sees as one parameter, so that a copy of one is small; a multiple of its
blocks."""


def flatten_groups(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer see each of its groups as large chunks of one tensor, before its first step.

    bitsandbytes starts a kernel for each tensor and waits for it, and a 7B model has 448 adapter matrices. Optimizers
    that treat every weight alike (Adam, Lion ...) compute the same; what a block of 8-bit states holds may span two
    matrices. The parameters become views of the joint tensor; a step takes their gradients away. A group of several
    data types or devices is left alone.
    """
    assert not optimizer.state, "the states of the parameters would be lost"
    groups: list[_FlatGroup] = []
    for group in optimizer.param_groups:
        parameters = list(group["params"])
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1:
            groups.append(_FlatGroup(parameters))
            group["params"] = groups[-1].chunks

    def complete(*_: Any) -> None:
        for group in groups:
            group.complete()

    def release(*_: Any) -> None:
        for group in groups:
            group.release()

    optimizer.register_step_pre_hook(complete)
    optimizer.register_step_post_hook(release)


def run_ahead(optimizer: Optimizer8bit) -> None:
    """Lets the host continue while the device computes a step of bitsandbytes' optimizer.

    bitsandbytes waits for the device after each parameter and at the end, because the host may read paged states: then
    the device has nothing to do until the host has started the next step. Here it is waited for before the states are
    read (`state_dict`); the kernels themselves follow one another anyway. Paged states are fetched before their kernel
    after they were read, and where the device has no room to spare: else they are there, and asking for them keeps the
    device for 0.2 ms each.
    """
    wait, fetch = waits(optimizer)
    were_read = True

    def begin(*_: Any) -> None:
        set_waits(optimizer, _do_nothing, fetch if were_read or _is_short(optimizer) else _do_nothing)

    def end(*_: Any) -> None:
        nonlocal were_read
        were_read = False
        set_waits(optimizer, wait, fetch)

    def read(*_: Any) -> None:
        nonlocal were_read
        were_read = True
        for device in _devices(optimizer):
            torch.get_device_module(device).synchronize(device)

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    optimizer.register_state_dict_pre_hook(read)
    optimizer.register_load_state_dict_post_hook(read)


def _do_nothing(parameter: Tensor) -> None:
    pass


def _devices(optimizer: Optimizer8bit) -> set[torch.device]:
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    return {device for device in devices if device.type != "cpu"}


def _is_short(optimizer: Optimizer8bit) -> bool:
    """Returns whether a device has less memory left than the paged states take."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    paged = sum(value.nbytes for value in states if getattr(value, "is_paged", False))
    return any(torch.get_device_module(device).mem_get_info(device)[0] < paged for device in _devices(optimizer))


class _FlatGroup:
    """Parameters that are parts of one tensor, which the optimizer sees in chunks."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.cat([parameter.detach().view(-1) for parameter in parameters])
        self.chunks = [torch.nn.Parameter(chunk) for chunk in flat.split(CHUNK)]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        self.parts = [
            [(parameters[index], part, target) for index, part, target in overlaps(sizes, begin, begin + CHUNK)]
            for begin in range(0, len(flat), CHUNK)
        ]
        """Of each chunk: the parameters in it, which of their elements, and the range of these in the chunk."""

    def complete(self) -> None:
        """Gives the chunks their gradients; those of the parameters are released chunk by chunk.

        Parameters without a gradient count as of gradient zero.
        """
        for chunk, parts in zip(self.chunks, self.parts, strict=True):
            chunk.grad = torch.zeros_like(chunk)
            copies = [
                (chunk.grad[target], parameter.grad.view(-1)[part])
                for parameter, part, target in parts
                if parameter.grad is not None
            ]
            if copies:
                foreach_copy([target for target, _ in copies], [part for _, part in copies])
            for parameter, part, _ in parts:
                if part.stop == parameter.numel():
                    parameter.grad = None

    def release(self) -> None:
        """Drops the gradients."""
        for chunk in self.chunks:
            chunk.grad = None
