"""One optimizer kernel for all adapter weights, in place of one a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flatten_groups(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer see the parameters of each of its groups as one tensor, before its first step.

    bitsandbytes starts a kernel for each tensor and waits for it, and a 7B model has 448 adapter matrices. Optimizers
    that treat every weight alike (Adam, Lion ...) compute the same; what a block of 8-bit states holds may span two
    matrices. The parameters become views of the joint tensor; their gradients are gathered when a step begins. A group
    of several data types or devices is left alone.
    """
    assert not optimizer.state, "the states of the parameters would be lost"
    members: list[tuple[Tensor, list[torch.nn.Parameter]]] = []
    for group in optimizer.param_groups:
        own = list(group["params"])
        if len({(parameter.dtype, parameter.device) for parameter in own}) != 1:
            continue
        joint = torch.nn.Parameter(torch.cat([parameter.detach().view(-1) for parameter in own]))
        pieces = joint.detach().split([parameter.numel() for parameter in own])
        for parameter, piece in zip(own, pieces, strict=True):
            parameter.data = piece.view(parameter.shape)
        group["params"] = [joint]
        members.append((joint, own))

    def gather(*_: Any) -> None:
        for joint, own in members:
            joint.grad = torch.cat([_gradient(parameter).view(-1) for parameter in own])

    def release(*_: Any) -> None:
        for joint, _own in members:
            joint.grad = None

    optimizer.register_step_pre_hook(gather)
    optimizer.register_step_post_hook(release)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
