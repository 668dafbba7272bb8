"""torch's kernels of causal attention with what their backward passes read, under private names.

The public functions keep the sums of the scores to themselves, so that a layer that is recomputed must attend again.

- `flash_forward`, `flash_backward`: inside rows of a variable-length batch, by the FlashAttention that is active;
- `cudnn_forward`, `cudnn_backward`: rows of one length, by cuDNN, where `takes_cudnn` says that it takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Returns the output [tokens, heads, width] and the logarithms of the sums [heads, tokens].

    A row's last query stands at its last key, and sees `window` tokens before itself; -1: all of them.
    """
    output, sums, *_ = _aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, window < 0, False,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return output, sums


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of queries, keys and values."""
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # what a dropout mask begins with: there is none
    gradients: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
        dout, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, 0.0, window < 0, random, torch.empty(0, device=q.device),
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return gradients


def takes_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns whether cuDNN computes causal attention for `q` [rows, heads, tokens, width]."""
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output [rows, heads, tokens, width] and the logarithms of the sums [rows, heads, tokens, 1]."""
    output, sums, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return output, sums


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values."""
    random = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, sums, random, random, None, None, None, q.shape[2], k.shape[2], 0.0, True, scale=scale
    )
    return gradients
