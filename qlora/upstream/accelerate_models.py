"""Private names of accelerate that models need; `tests/upstream` checks each."""

from __future__ import annotations

import torch


def forward_attribute(module: torch.nn.Module) -> str:
    """Returns the attribute that holds a module's own forward pass.

    Where accelerate spreads a model over devices, its hook moves the inputs first and keeps that under another name.
    """
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"
