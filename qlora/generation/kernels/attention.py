"""The attention of a decode step over slots: one token a row, which reads the keys of its member_head length alone.

A program computes the heads that share a key-value head of a row, over a part of its keys (`splits`); where there are
several parts, a second kernel joins them. The lengths are read on the device, so that one CUDA graph serves all of
them. The program of the first part also writes the new key and value into the slot, and reads them from where they
come from: nothing waits for the write. `slots.attend_plainly` is the twin.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_A_PROCESSOR = 2
"""Programs for each multiprocessor of a GPU, below which the keys of a row are split."""
MOST_SPLITS = 32
LEAST_GROUP = 16
"""Rows of the smallest matrix that a tensor core multiplies."""


@triton.jit
def _cap(scores, softcap, CAPPED: tl.constexpr):
    # tanh(x) as 2 sigmoid(2x) - 1
    return softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1) if CAPPED else scores


@triton.jit
def _decode_kernel(
    q, new_key, new_value, keys, values, positions, sinks, out, parts, stats, scale, softcap, window, group, heads,
    width, value_width, q_row, q_head, new_key_row, new_key_head, new_value_row, new_value_head, key_slot, key_head,
    value_slot, value_head,
    NEW: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    stop = position if NEW else position + 1  # the new key is not read from the slot
    start = tl.maximum(position - window + 1, 0) if WINDOW else 0
    part = tl.cdiv(tl.cdiv(stop - start, BLOCK), SPLITS) * BLOCK
    begin = start + split * part
    end = tl.minimum(begin + part, stop)
    member, column, value_column = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_member, is_column, is_value_column = member < group, column < width, value_column < value_width
    member_head = head * group + member
    queries = tl.load(
        q + row * q_row + member_head[:, None] * q_head + column[None, :],
        mask=is_member[:, None] & is_column[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    keys += row * key_slot + head * key_head
    values += row * value_slot + head * value_head
    top = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUP,), dtype=tl.float32)
    joint = tl.zeros((GROUP, VALUE_WIDTH), dtype=tl.float32)
    if split == 0:
        if SINKS:
            top = tl.load(sinks + member_head, mask=is_member, other=0.0).to(tl.float32)
            total = total + 1.0
        if NEW:
            key = tl.load(new_key + row * new_key_row + head * new_key_head + column, mask=is_column, other=0.0)
            value = tl.load(
                new_value + row * new_value_row + head * new_value_head + value_column, mask=is_value_column, other=0.0
            )
            key, value = key.to(keys.dtype.element_ty), value.to(values.dtype.element_ty)
            tl.store(keys + position.to(tl.int64) * width + column, key, mask=is_column)
            tl.store(values + position.to(tl.int64) * value_width + value_column, value, mask=is_value_column)
            score = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
            score = _cap(score, softcap, CAPPED)
            high = tl.maximum(top, score)
            weight = tl.exp(score - high)
            total = total * tl.exp(top - high) + weight
            joint = weight[:, None] * value.to(tl.float32)[None, :]
            top = high
    for first in range(begin, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        is_key = index < end
        index = index.to(tl.int64)
        block = tl.load(
            keys + index[None, :] * width + column[:, None], mask=is_key[None, :] & is_column[:, None], other=0.0
        )
        scores = _cap(tl.dot(queries, block, input_precision="ieee") * scale, softcap, CAPPED)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - high[:, None])
        kept = tl.exp(top - high)
        total = total * kept + tl.sum(weights, 1)
        seen = tl.load(
            values + index[:, None] * value_width + value_column[None, :],
            mask=is_key[:, None] & is_value_column[None, :],
            other=0.0,
        )
        joint = joint * kept[:, None] + tl.dot(weights.to(seen.dtype), seen, input_precision="ieee")
        top = high
    head_of_row = row * heads + member_head
    is_stored = is_member[:, None] & is_value_column[None, :]
    if SPLITS == 1:
        target = out + head_of_row[:, None] * value_width + value_column[None, :]
        tl.store(target, (joint / total[:, None]).to(out.dtype.element_ty), mask=is_stored)
    else:
        index = head_of_row * SPLITS + split
        tl.store(parts + index[:, None] * value_width + value_column[None, :], joint, mask=is_stored)
        tl.store(stats + index * 2, top, mask=is_member)
        tl.store(stats + index * 2 + 1, total, mask=is_member)


@triton.jit
def _join_kernel(parts, stats, out, value_width, SPLITS: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    index, column = head * SPLITS + tl.arange(0, SPLITS), tl.arange(0, VALUE_WIDTH)
    is_column = column < value_width
    top, total = tl.load(stats + index * 2), tl.load(stats + index * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))
    joint = tl.load(parts + index[:, None] * value_width + column[None, :], mask=is_column[None, :], other=0.0)
    result = tl.sum(joint * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * value_width + column, result.to(out.dtype.element_ty), mask=is_column)


def attend_decoding(
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Returns the attention of the first rows, [rows, 1, heads, value width].

    `query` is [rows, heads, 1, width], `keys` and `values` [slots, key-value heads, length, width], and `positions`,
    int64 [rows], where the tokens stand. `new` are their keys and values, [rows, key-value heads, 1, width], which are
    written there; None: they are in the slots. `splits` is a power of two.
    """
    rows, heads, _, width = query.shape
    shared, value_width = keys.shape[1], values.shape[3]
    query, key, value = (_dense(tensor) for tensor in (query, *(new or (query, query))))
    splits = splits or _count_splits(rows * shared, query.device)
    out = torch.empty(rows, 1, heads, value_width, dtype=values.dtype, device=query.device)
    parts = stats = out
    if splits > 1:
        parts = torch.empty(rows * heads, splits, value_width, dtype=torch.float32, device=query.device)
        stats = torch.empty(rows * heads, splits, 2, dtype=torch.float32, device=query.device)
    padded, value_padded = (max(16, triton.next_power_of_2(size)) for size in (width, value_width))
    group = heads // shared
    block = 64 if max(padded, value_padded) <= 128 else 32
    block = block if values.dtype.itemsize == 2 else 16  # 32 bits are not for tensor cores: larger tiles spill
    _decode_kernel[(rows, shared, splits)](
        query, key, value, keys, values, positions, sinks, out, parts, stats, scale, softcap or 1.0, window or 0,
        group, heads, width, value_width, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        *keys.stride()[:2], *values.stride()[:2], NEW=new is not None, WINDOW=window is not None,
        CAPPED=softcap is not None, SINKS=sinks is not None, SPLITS=splits,
        GROUP=max(LEAST_GROUP, triton.next_power_of_2(group)), WIDTH=padded, VALUE_WIDTH=value_padded,
        BLOCK=block, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(rows * heads,)](
            parts, stats, out, value_width, SPLITS=splits, VALUE_WIDTH=value_padded, num_warps=4
        )
    return out


def _dense(tensor: Tensor) -> Tensor:
    """Returns a tensor whose last numbers lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _count_splits(programs: int, device: torch.device) -> int:
    """Returns into how many parts the keys of a row are split, so that the GPU is busy: a power of two."""
    missing = PROGRAMS_A_PROCESSOR * _processors(device) // programs
    return min(MOST_SPLITS, 1 << max(missing, 1).bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
