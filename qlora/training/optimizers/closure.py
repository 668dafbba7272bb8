"""What every step of an optimizer of torch may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Returns what a closure computes, with gradients; None: there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
