"""Causal attention inside the rows of a variable-length batch, forward alone, with soft caps, sinks and windows.

It serves prompts that FlashAttention does not: `flex_attention` would be compiled anew for each number of tokens.
`qlora.step.kernels.attention.attend_plain` is the twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prompt_kernel(
    q, k, v, cu_seqlens, sinks, out, scale, softcap, window, group, heads, width, value_width, q_token, q_head, k_token,
    k_head, v_token, v_head,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - start
    first = block * QUERIES
    if first >= length:
        return
    queries, column, value_column = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_query, is_column, is_value_column = queries < length, column < width, value_column < value_width
    token = (start + queries).to(tl.int64)
    asked = tl.load(
        q + token[:, None] * q_token + head * q_head + column[None, :],
        mask=is_query[:, None] & is_column[None, :],
        other=0.0,
    ).to(k.dtype.element_ty)
    shared = head // group
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    if SINKS:
        top = total + tl.load(sinks + head).to(tl.float32)
        total = total + 1.0
    joint = tl.zeros((QUERIES, VALUE_WIDTH), dtype=tl.float32)
    begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS if WINDOW else 0
    for at in range(begin, tl.minimum(first + QUERIES, length), KEYS):
        keys = at + tl.arange(0, KEYS)
        is_key = keys < length
        other = (start + keys).to(tl.int64)
        read = tl.load(
            k + other[None, :] * k_token + shared * k_head + column[:, None],
            mask=is_key[None, :] & is_column[:, None],
            other=0.0,
        )
        scores = tl.dot(asked, read, input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1)
        distance = queries[:, None] - keys[None, :]
        is_seen = (distance >= 0) & is_key[None, :]
        if WINDOW:
            is_seen = is_seen & (distance < window)
        scores = tl.where(is_seen, scores, float("-inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(high == float("-inf"), 0.0, high)  # of a query that sees no key of the first block
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(top - base)
        total = total * kept + tl.sum(weights, 1)
        seen = tl.load(
            v + other[:, None] * v_token + shared * v_head + value_column[None, :],
            mask=is_key[:, None] & is_value_column[None, :],
            other=0.0,
        )
        joint = joint * kept[:, None] + tl.dot(weights.to(seen.dtype), seen, input_precision="ieee")
        top = high
    target = out + (token[:, None] * heads + head) * value_width + value_column[None, :]
    result = joint / total[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=is_query[:, None] & is_value_column[None, :])


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend_plain`: [tokens, heads, value width]; `max_seqlen` is the maximum number of tokens in a row."""
    (tokens, heads, width), value_width = q.shape, v.shape[2]
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = torch.empty(tokens, heads, value_width, dtype=v.dtype, device=q.device)
    padded, value_padded = (max(16, triton.next_power_of_2(size)) for size in (width, value_width))
    queries, keys = (64, 64 if max(padded, value_padded) <= 128 else 32)
    if k.dtype.itemsize == 4:  # which is not for tensor cores: larger tiles spill
        queries = keys = 16
    _prompt_kernel[(len(cu_seqlens) - 1, heads, triton.cdiv(max_seqlen, queries))](
        q, k, v, cu_seqlens, sinks, out, scale, softcap or 1.0, window or 0, heads // k.shape[1], heads, width,
        value_width, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], WINDOW=window is not None,
        CAPPED=softcap is not None, SINKS=sinks is not None, WIDTH=padded, VALUE_WIDTH=value_padded, QUERIES=queries,
        KEYS=keys, num_warps=4, num_stages=2 if keys == 64 else 1,
    )  # fmt: skip
    return out
