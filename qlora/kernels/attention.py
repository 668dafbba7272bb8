"""Causal attention without a mask: inside rows that lie one behind the other, or in a batch of rows.

torch's cuDNN attention is nearly twice as fast on Hopper as the FlashAttention 2 behind `varlen_attn`, but torch 2.11
offers it for rows with borders at 70 ms a call and with wrong gradients; so it serves batches of rows only.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_attention() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which `scaled_dot_product_attention` takes the fastest kernel that can serve."""
    return sdpa_kernel(FASTEST_FIRST, set_priority=True)


def has_varlen() -> bool:
    """Returns whether this torch attends inside rows (2.10 and later)."""
    return bool(_VARLEN)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns causal attention for `q` [rows, heads, tokens, width]; `k` and `v` may have fewer heads."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, window: int | None = None
) -> Tensor:
    """Returns the causal attention inside rows that lie one behind the other, [tokens, heads, width].

    `q` is [tokens, heads, width]; `k` and `v` may have fewer heads. `borders`, int32 [rows + 1], holds the first token
    of each row and the end, `longest` is the most tokens of a row. With `window`, a token sees itself and the
    `window - 1` before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _VARLEN:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    found: Tensor = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, **options)
    return found


def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN = _varlen_parameters()
