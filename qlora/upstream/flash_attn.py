"""FlashAttention 4 returns more than torch takes: its private forward function is cut to the first two results."""

from __future__ import annotations

import functools
import importlib
from typing import Any


def return_two_results() -> None:
    """Makes FlashAttention 4 return the output and the sums of rows only, as torch takes them; later betas return more.

    The cache of compiled kernels, which FlashAttention looks up as an attribute of its function, is kept.
    """
    interface: Any = importlib.import_module("flash_attn.cute.interface")
    original = interface._flash_attn_fwd

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)[:2]

    interface._flash_attn_fwd = forward
