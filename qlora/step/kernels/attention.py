"""Causal attention without a mask: inside the rows of a variable-length batch, or in a padded batch.

A variable-length batch is computed by FlashAttention 2, which is part of torch, or by a newer one that is installed and
agrees with it. torch's cuDNN attention is nearly twice as fast on Hopper as the FlashAttention 2 behind `varlen_attn`,
but for variable-length batches torch 2.11 takes 70 ms a call with it and returns wrong gradients. So cuDNN computes
padded batches only. `flex_attention` has what FlashAttention leaves out: scores behind tanh, and sinks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlora.upstream.flash_attn import return_two_results

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NEWER_FLASH = {"fa3": ("FA3", "flash_attn_interface", (9,)), "fa4": ("FA4", "flash_attn.cute", (9, 10))}
"""By key: torch's name for each FlashAttention, the module that holds it, and its GPUs (major compute capability)."""
WIDE = 192
"""The widest head for which torch's own tiles of `flex_attention` are good on Hopper; beyond, they spill registers."""
WIDE_OPTIONS: dict[str, int] = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 8,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2,
    "bwd_num_warps": 8,
}  # fmt: skip
"""The tiles for wider heads there, the fastest of 16: at a width of 256, 0.50 for 0.68 ms forward, 2.7 for 3.7 back."""
BLOCK = 128
"""Tokens of a block that `flex_attention` computes, skips, or computes with a mask."""
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
    attends to itself and to the `window - 1` tokens before it. On a CPU `attend_plain` computes it.
    """
    if not q.is_cuda:
        return attend_plain(q, k, v, cu_seqlens, scale, window=window)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _VARLEN:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    output: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, **options)
    return output


@torch.compiler.disable
def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend_varlen`, row by row: the twin of all kernels here.

    With `softcap` a score s is replaced by softcap * tanh(s / softcap). `sinks` [heads] are scores of one more key,
    whose value is zero.
    """
    ends = cu_seqlens.tolist()
    outputs = []
    for start, end in itertools.pairwise(ends):
        rows = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        query, key, value = (tensor.repeat_interleave(len(tensor) and q.shape[1] // len(tensor), 0) for tensor in rows)
        scores = (query @ key.transpose(1, 2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        index = torch.arange(end - start, device=q.device)
        distance = index[:, None] - index[None, :]
        is_seen = (distance >= 0) & (distance < (window or max(end - start, 1)))
        scores = scores.masked_fill(~is_seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(index), 1)], dim=2)
        weights = scores.softmax(2)[..., : len(index)].to(v.dtype)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


def build_block_mask(cu_seqlens: Tensor, tokens: int, window: int | None) -> BlockMask:
    """Returns what `attend_flex` skips and what it masks, of a variable-length batch of `tokens`.

    The blocks of keys that a block of queries sees follow from the rows of its first and last token, so that no matrix
    of all pairs of tokens is built.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = cu_seqlens.device
    index = torch.arange(tokens, device=device, dtype=torch.int32)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]  # of each token's row
    reach = tokens if window is None else window
    first = torch.arange(0, tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    is_before = first[None, :] <= last[:, None]
    is_near = (last[None, :] >= starts[first][:, None]) & (last[None, :] > (first - reach)[:, None])
    is_seen = is_before & is_near
    # Full blocks need no mask: all of their keys lie before all queries, in their row, and in their window.
    is_inside = (first[None, :] >= starts[last][:, None]) & (first[None, :] > (last - reach)[:, None])
    is_full = (last[None, :] <= first[:, None]) & is_inside & ((last - first)[None, :] == BLOCK - 1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[query]) & (query - key < reach)

    def order(blocks: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.argsort(blocks.to(torch.uint8), dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], indices.int()[None, None]

    return BlockMask.from_kv_blocks(
        *order(is_seen & ~is_full), *order(is_full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def wide_tiles(device: torch.device) -> dict[str, int]:
    """Returns the tiles of `attend_flex` for wide heads; torch's own are good on this device if there are none."""
    return WIDE_OPTIONS if torch.cuda.get_device_capability(device) == (9, 0) else {}


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: dict[str, int] | None = None,
) -> Tensor:
    """As `attend_plain`, for `q` [1, heads, tokens, width], by a kernel that torch compiles; returns the same shape.

    `tiles` are those of `wide_tiles`.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        # tanh(x) as 2 sigmoid(2x) - 1, which a GPU computes faster; it is 6e-6 apart from a score at most.
        return softcap * (2 * torch.sigmoid(score * (2 / softcap)) - 1) if softcap is not None else score

    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "block_mask": block_mask}
    if softcap is not None:
        options["score_mod"] = cap
    if tiles and q.shape[-1] > WIDE:
        options["kernel_options"] = tiles
    if sinks is None:
        output: Any = flex(q, k, v, **options)
        return output
    output, aux = flex(q, k, v, **options, return_aux=AuxRequest(lse=True))
    # The softmax with a sink is the one without, times the fraction that is not the sink's.
    fraction = torch.sigmoid(aux.lse - sinks.float()[:, None])
    result: Tensor = (output * fraction[..., None]).to(output.dtype)
    return result


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN = _varlen_parameters()
