"""Causal attention without a mask: inside rows that lie one behind the other, or in a batch of rows.

Inside rows FlashAttention 2 attends, which torch brings along, or a newer one that is installed and agrees with it.
torch's cuDNN attention is nearly twice as fast on Hopper as the FlashAttention 2 behind `varlen_attn`, but torch 2.11
offers it for rows with borders at 70 ms a call and with wrong gradients; so it serves batches of rows only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NEWER_FLASH = {"fa3": ("FA3", "flash_attn_interface", (9,)), "fa4": ("FA4", "flash_attn.cute", (9, 10))}
"""By their keys torch's name for each FlashAttention, the module that brings it, and the GPUs (compute capability)."""
MOST_APART = 0.02
"""Relative distance of two attentions in bf16, outputs and gradients."""

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


def find_flash_fault(name: str, device: torch.device) -> str | None:
    """Lets a newer FlashAttention, of `NEWER_FLASH`, attend inside rows from now on; returns why not, else None.

    It serves the whole process, `scaled_dot_product_attention` too where that takes FlashAttention.
    """
    title, module, majors = NEWER_FLASH[name]
    if title not in getattr(torch.nn.attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot use {title}"
    if not _is_there(module):
        return f"{title} is not installed"
    if torch.cuda.get_device_capability(device)[0] not in majors:
        return f"{title} does not serve this GPU"
    expected = _try_attention(device)
    try:
        if name == "fa4":
            _return_two(importlib.import_module(f"{module}.interface"))
        torch.nn.attention.activate_flash_attention_impl(title)
        found = _try_attention(device)
    except Exception as error:  # it compiles on the spot, and may raise anything
        fault = f"{title} does not run here ({' '.join(str(error).split())[:200] or type(error).__name__})"
    else:
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        if apart <= MOST_APART:
            return None
        fault = f"{title} gives other numbers than torch's own attention, {apart:.0%} apart"
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    return fault


def _return_two(interface: Any) -> None:
    """Makes FlashAttention 4 return output and sums of rows alone, as torch takes them; later betas return more."""
    own = interface._flash_attn_fwd

    @functools.wraps(own)  # with what it has compiled, which it looks up under its name
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)[:2]

    interface._flash_attn_fwd = forward


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def _try_attention(device: torch.device) -> list[Tensor]:
    """Returns the output of two short rows and the gradients of queries, keys and values, in float32."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(96, 4, 128), (96, 2, 128), (96, 2, 128)]
    q, k, v = (
        torch.randn(shape, generator=generator, device=device).to(torch.bfloat16).requires_grad_() for shape in shapes
    )
    borders = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    found = attend_rows(q, k, v, borders, 56, 128**-0.5)
    gradients = torch.autograd.grad(found.float().square().sum(), (q, k, v))
    return [each.detach().float() for each in (found, *gradients)]


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
