"""Causal attention without a mask: inside the rows of a variable-length batch, or in a padded batch.

A variable-length batch is computed by FlashAttention 2, which is part of torch, or by a newer one that is installed and
agrees with it. torch's cuDNN attention is nearly twice as fast on Hopper as the FlashAttention 2 behind `varlen_attn`,
but for variable-length batches torch 2.11 takes 70 ms a call with it and returns wrong gradients. So cuDNN computes
padded batches only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlora.upstream.flash_attn import return_two_results

NEWER_FLASH = {"fa3": ("FA3", "flash_attn_interface", (9,)), "fa4": ("FA4", "flash_attn.cute", (9, 10))}
"""By key: torch's name for each FlashAttention, the module that holds it, and its GPUs (major compute capability)."""
MAX_DIFFERENCE = 0.02
"""The largest relative difference between two attentions in bf16, in outputs and gradients."""

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_attention() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which `scaled_dot_product_attention` takes the fastest kernel that supports the call."""
    return sdpa_kernel(FASTEST_FIRST, set_priority=True)


def has_varlen() -> bool:
    """Returns whether this torch attends inside rows (2.10 and later)."""
    return bool(_VARLEN)


def flash_unsupported_reason(name: str, device: torch.device) -> str | None:
    """Lets a newer FlashAttention, of `NEWER_FLASH`, attend inside rows from now on; returns why it cannot, else None.

    It serves the whole process, `scaled_dot_product_attention` too where that takes FlashAttention.
    """
    title, module, majors = NEWER_FLASH[name]
    if title not in getattr(torch.nn.attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot use {title}"
    if not _is_installed(module):
        return f"{title} is not installed"
    if torch.cuda.get_device_capability(device)[0] not in majors:
        return f"{title} does not serve this GPU"
    expected = _try_attention(device)
    try:
        if name == "fa4":
            return_two_results()
        torch.nn.attention.activate_flash_attention_impl(title)
        actual = _try_attention(device)
    except Exception as error:  # it compiles on the spot, and may raise anything
        reason = f"{title} does not run here ({' '.join(str(error).split())[:200] or type(error).__name__})"
    else:
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))
        if apart <= MAX_DIFFERENCE:
            return None
        reason = f"{title} gives other numbers than torch's own attention, {apart:.0%} apart"
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    return reason


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _try_attention(device: torch.device) -> list[Tensor]:
    """Returns the output of two short rows and the gradients of queries, keys and values, in float32."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(96, 4, 128), (96, 2, 128), (96, 2, 128)]
    q, k, v = (
        torch.randn(shape, generator=generator, device=device).to(torch.bfloat16).requires_grad_() for shape in shapes
    )
    cu_seqlens = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    output = attend_varlen(q, k, v, cu_seqlens, 56, 128**-0.5)
    gradients = torch.autograd.grad(output.float().square().sum(), (q, k, v))
    return [tensor.detach().float() for tensor in (output, *gradients)]


def attend_batch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns causal attention for `q` [rows, heads, tokens, width]; `k` and `v` may have fewer heads."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None = None
) -> Tensor:
    """Returns the causal attention inside the rows of a variable-length batch, [tokens, heads, width].

    `q` is [tokens, heads, width]; `k` and `v` may have fewer heads. `cu_seqlens`, int32 [rows + 1], holds the first
    token of each row and the end; `max_seqlen` is the maximum number of tokens in a row. With `window`, a token
    attends to itself and to the `window - 1` tokens before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _VARLEN:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    output: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, **options)
    return output


def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN = _varlen_parameters()
