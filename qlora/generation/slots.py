"""A cache of keys and values with a slot a row, and the attention that reads it.

Rows have no padding: each begins at position 0 of its slot. A pass is either a prefill, in which the prompts of some
slots are a variable-length (packed) batch, or a decode step of one token in each of the first slots. On a GPU a kernel
attends in decode steps, reads how long the rows are there, and writes the new keys and values itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import AttentionInterface

from qlora.step.kernels.attention import attend_plain, attend_varlen, has_varlen

NAME = "qlora_slots"
"""The name under which transformers finds the attention over slots."""
WIDEST_FLASH = 256
"""The widest head that FlashAttention computes."""


@dataclass
class Pass:
    """What a forward pass computes."""

    slots: Tensor
    """int64 [tokens]: the slot of each token."""
    positions: Tensor
    """int64 [tokens]: its position there."""
    lengths: list[int] | None = None
    """Of a prefill, the tokens of each row; None: one token a row is decoded, in the first slots."""
    cu_seqlens: Tensor | None = None
    """Of a prefill, int32 [rows + 1]: the first token of each row, and the end."""
    max_length: int = 0
    """Of a decode step without the kernel, the tokens of the longest row."""
    by_kernel: bool = False
    """Whether the kernel attends in this decode step."""
    new: tuple[Tensor, Tensor] | None = None
    """With the kernel, the keys and values of a layer, until its attention writes them."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Returns what a decode step adds to its scores, float32 [rows, 1, 1, max_length]: 0 where a key is seen."""
        if window not in self._masks:
            index = torch.arange(self.max_length, device=self.positions.device)
            distance = self.positions[:, None] - index
            unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


class SlotCache(Cache):
    """Keys and values of the rows that are being answered: [slots, heads, length, width] a layer."""

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.current: Pass | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Writes the keys and values of a pass; returns those of a prefill, or the slots that a decode step reads."""
        current = self.current
        assert current is not None
        if layer_idx not in self.keys:
            self.keys[layer_idx], self.values[layer_idx] = (
                states.new_zeros(self.slots, states.shape[1], self.length, states.shape[3], dtype=_held_dtype(states))
                for states in (key_states, value_states)
            )
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if current.by_kernel:
            current.new = key_states, value_states
            return keys[: len(key_states)], values[: len(key_states)]
        for held, states in ((keys, key_states), (values, value_states)):
            tokens = states[0].transpose(0, 1) if current.lengths is not None else states[:, :, 0]
            held[current.slots, :, current.positions] = tokens.to(held.dtype)
        if current.lengths is not None:
            return key_states, value_states
        rows = len(key_states)
        return keys[:rows, :, : current.max_length], values[:rows, :, : current.max_length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a slot to another one."""
        for held in (self.keys, self.values):
            for states in held.values():
                states[target, :, :length] = states[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0: positions are given, and no mask is made."""
        return 0


def attend_slots(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slot_pass: Pass | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a pass, in transformers' signature: [rows, tokens, heads, width].

    In a prefill `query` is [1, heads, tokens, width], in a decode step [rows, heads, 1, width]. `s_aux` [heads] are
    sinks.
    """
    if slot_pass is None or attention_mask is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__} has an attention of its own")
    kind = Kind(scaling, sliding_window, softcap, s_aux)
    if slot_pass.by_kernel:
        return _attend_by_kernel(query, key, value, slot_pass, kind), None
    if slot_pass.lengths is None:
        return attend_plainly(query, key, value, slot_pass, kind), None
    if query.is_cuda:
        return _attend_prompts(query, key, value, slot_pass, kind), None
    queries, keys, values = (tensor.split(slot_pass.lengths, dim=2) for tensor in (query, key, value))
    rows = [_prefill(q, k, v, kind) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(rows, dim=1), None


@dataclass(frozen=True)
class Kind:
    """How a layer attends."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def scores(self, products: Tensor) -> Tensor:
        """Returns the scores, in float32, of products of queries and keys."""
        scores = products.float() * self.scaling
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, slot_pass: Pass, kind: Kind) -> Tensor:
    from qlora.generation.kernels.attention import attend_decoding  # Triton is there with CUDA only

    if any(states.stride()[2:] != (states.shape[3], 1) for states in (key, value)):
        raise NotImplementedError("it attends to other keys and values than its cache holds")
    new, slot_pass.new = slot_pass.new, None
    options: dict[str, Any] = {"window": kind.window, "softcap": kind.softcap, "sinks": kind.sinks}
    return attend_decoding(query, new, key, value, slot_pass.positions, kind.scaling, **options)


def _attend_prompts(query: Tensor, key: Tensor, value: Tensor, slot_pass: Pass, kind: Kind) -> Tensor:
    """Returns the attention of a prefill on a GPU, [1, tokens, heads, width]."""
    from qlora.generation.kernels.prompts import attend_rows  # Triton is there with CUDA only

    assert slot_pass.lengths is not None
    assert slot_pass.cu_seqlens is not None
    dtype = _held_dtype(value)
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    cu_seqlens, max_seqlen = slot_pass.cu_seqlens, max(slot_pass.lengths)
    is_plain = kind.softcap is None and kind.sinks is None and q.shape[2] == v.shape[2]
    if is_plain and dtype.itemsize == 2 and q.shape[2] <= WIDEST_FLASH and q.shape[2] % 8 == 0 and has_varlen():
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        return attend_varlen(q, k, v, cu_seqlens, max_seqlen, kind.scaling, kind.window)[None]
    options: dict[str, Any] = {"window": kind.window, "softcap": kind.softcap, "sinks": kind.sinks}
    return attend_rows(q, k, v, cu_seqlens, max_seqlen, kind.scaling, **options)[None]


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, slot_pass: Pass, kind: Kind) -> Tensor:
    """Returns the attention of a decode step: the twin of the kernel."""
    rows, heads, _, width = query.shape
    grouped = query.to(key.dtype).reshape(
        rows, key.shape[1], -1, width
    )  # the heads that share keys and values are like tokens
    scores = kind.scores(grouped @ key.transpose(2, 3)) + slot_pass.mask(kind.window)
    sinks = None if kind.sinks is None else kind.sinks.view(key.shape[1], -1, 1)
    return (_softmax(scores, sinks).to(value.dtype) @ value).reshape(rows, 1, heads, -1)


def _prefill(query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """Returns the attention of one row, [1, tokens, heads, width]."""
    tokens, is_grouped = query.shape[2], query.shape[1] != key.shape[1]
    if kind.softcap is None and kind.sinks is None and (kind.window is None or tokens <= kind.window):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kind.scaling, enable_gqa=is_grouped
        )
        return output.transpose(1, 2)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    row = torch.tensor([0, tokens])
    return attend_plain(q, k, v, row, kind.scaling, window=kind.window, softcap=kind.softcap, sinks=kind.sinks)[None]


def _held_dtype(states: Tensor) -> torch.dtype:
    """Returns what keys or values are held in: what autocast multiplies them in."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Returns the weights of scores [..., keys]; `sinks` are scores of one more key, whose value is zero."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


# Without a mask function: with one, transformers would make a mask for each pass.
AttentionInterface.register(NAME, attend_slots)
