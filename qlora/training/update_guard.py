"""Undoes optimizer steps by gradients that are NaN or infinite, on the device itself: the host does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

from qlora.upstream.bitsandbytes_optim import wrap_update


class UpdateGuard:
    """Makes steps by bad gradients leave all weights as they are.

    Such gradients count as zero for the optimizer's own averages.
    """

    def __init__(self) -> None:
        self.is_bad: Tensor | None = None
        """Whether the gradients of this step are NaN or infinite, on the device; None: not guarded."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Guards all later steps of an optimizer."""
        if isinstance(optimizer, Optimizer8bit):
            wrap_update(optimizer, partial(self._update, optimizer.update_step))
            return
        kept: list[tuple[torch.nn.Parameter, Tensor]] = []

        def keep(*_: Any) -> None:
            if self.is_bad is not None:
                for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                    if parameter.grad is not None:
                        kept.append((parameter, self._keep(parameter)))

        def undo(*_: Any) -> None:
            for parameter, old in kept:
                self._undo(parameter, old)
            kept.clear()

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(undo)

    def _update(self, update: Callable[..., None], group: Any, parameter: torch.nn.Parameter, *indices: int) -> None:
        """Updates one parameter as bitsandbytes does, guarded; so only one parameter is copied at a time."""
        old = self._keep(parameter) if self.is_bad is not None else None
        update(group, parameter, *indices)
        if old is not None:
            self._undo(parameter, old)

    def _keep(self, parameter: torch.nn.Parameter) -> Tensor:
        assert self.is_bad is not None
        assert parameter.grad is not None
        parameter.grad.masked_fill_(self.is_bad.to(parameter.device, non_blocking=True), 0)
        return parameter.detach().clone()

    def _undo(self, parameter: torch.nn.Parameter, old: Tensor) -> None:
        assert self.is_bad is not None
        bad = self.is_bad.to(parameter.device, non_blocking=True)
        torch.where(bad, old, parameter.data, out=parameter.data)
