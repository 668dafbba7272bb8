"""Causal attention whose output outlives the forward pass, so that a layer that is recomputed need not attend again.

Two operators compute it, forward and backward, opaque to `torch.compile`. In a layer that is recomputed the forward
operator hands its results to what keeps them (`KeptOutputs`), and returns them instead of computing when the layer runs
for the second time.

A row may have fewer queries than keys: its last query stands at its last key.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlora.step.kernels.dequantize import operator
from qlora.upstream.torch_attention import cudnn_backward, cudnn_forward, flash_backward, flash_forward, takes_cudnn

BLOCK = 1024
"""Queries whose scores the twin on a CPU computes at a time."""
ALL = -1
"""The window of a token that sees all earlier ones."""

_outputs: KeptOutputs | None = None
_is_on = False


@contextlib.contextmanager
def kept_attention() -> Iterator[None]:
    """Makes attention inside the block be computed here, where it can be."""
    global _is_on
    _is_on = True
    try:
        yield
    finally:
        _is_on = False


def is_on() -> bool:
    """Returns whether attention is to be computed here."""
    return _is_on


class KeptOutputs:
    """What the attention of one layer has returned in the forward pass, until the layer is recomputed."""

    def __init__(self, store: Callable[[Tensor], Any] = lambda x: x, fetch: Callable[[Any], Tensor] = lambda x: x):
        """`store` puts a tensor elsewhere, the host's memory for instance, and `fetch` gets it back."""
        self._store, self._fetch = store, fetch
        self._kept: deque[tuple[Any, ...]] = deque()
        self._is_again = False

    @contextlib.contextmanager
    def active(self, *, again: bool) -> Iterator[None]:
        """Keeps what attention returns inside the block; `again`: attention returns what was kept."""
        global _outputs
        _outputs, self._is_again = self, again
        try:
            yield
        finally:
            _outputs = None

    def take(self) -> tuple[Tensor, ...] | None:
        """Returns the next output that was kept; None: it must be computed."""
        if not (self._is_again and self._kept):
            return None
        return tuple(map(self._fetch, self._kept.popleft()))

    def put(self, *results: Tensor) -> None:
        """Keeps an output."""
        if not self._is_again:
            self._kept.append(tuple(map(self._store, results)))


def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    window: int | None = None,
) -> Tensor:
    """Returns causal attention for `q` [rows, tokens, heads, width]; `k` and `v` may have fewer heads.

    With `cu_q` and `cu_k`, int32 [count + 1], there is one row, which holds `count` rows: they begin at these tokens.
    With `window`, a token sees itself and the `window - 1` tokens before it.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    reach = ALL if window is None else window - 1
    output: Tensor = KeptAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k, scale, reach
    )
    return output


class KeptAttention(torch.autograd.Function):
    """Attention by the two operators."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
        """Returns the output, [rows, tokens, heads, width]."""
        out, sums = attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)
        ctx.save_for_backward(q, k, v, out, sums, cu_q, cu_k)
        ctx.options = (max_q, max_k, scale, window)
        return out

    @staticmethod
    def backward(ctx, dout):
        """Returns the gradients of queries, keys and values."""
        q, k, v, out, sums, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv = attention_backward(dout.contiguous(), q, k, v, out, sums, cu_q, cu_k, *ctx.options)
        return dq, dk, dv, None, None, None, None, None, None


def _fake_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    rows, tokens, heads, _ = q.shape
    return q.new_empty(rows, tokens, heads, v.shape[-1]), q.new_empty(rows, heads, tokens, dtype=torch.float32)


@operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, "
    "int window) -> (Tensor, Tensor)",
    _fake_attention,
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the output [rows, tokens, heads, width] and the logarithms of the sums [rows, heads, tokens].

    `window` is how many tokens before itself a token sees; -1: all of them.
    """
    outputs = _outputs
    if outputs is not None and (kept := outputs.take()) is not None:
        return kept[0], kept[1]
    results = _compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)
    if outputs is not None:
        outputs.put(*results)
    return results


def _compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    rows, tokens, heads, _ = q.shape
    if cu_q is None and _by_cudnn(q, k, v, window):
        out, sums = cudnn_forward(*(part.transpose(1, 2) for part in (q, k, v)), scale)
        return out.transpose(1, 2).contiguous(), sums.reshape(rows, heads, tokens)
    lengths = _lengths(q, k, cu_q, cu_k, max_q, max_k)
    kernel = flash_forward if q.is_cuda else attend_in_blocks
    out, sums = kernel(*(part.flatten(0, 1) for part in (q, k, v)), *lengths, scale, window)
    return out.view(rows, tokens, heads, -1), sums.view(heads, rows, tokens).transpose(0, 1).contiguous()


def _fake_attention_backward(dout, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, scale, window):
    return [part.new_empty(part.shape) for part in (q, k, v)]


@operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, Tensor? cu_q, "
    "Tensor? cu_k, int max_q, int max_k, float scale, int window) -> Tensor[]",
    _fake_attention_backward,
)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, scale: float, window: int,
) -> list[Tensor]:  # fmt: skip
    """Returns the gradients of queries, keys and values, each of their shape."""
    rows, tokens, heads, _ = q.shape
    if cu_q is None and _by_cudnn(q, k, v, window):
        of_output, queries, keys, values, output = (part.transpose(1, 2) for part in (dout, q, k, v, out))
        gradients: Any = cudnn_backward(
            of_output, queries, keys, values, output, sums.view(rows, heads, tokens, 1), scale
        )
        return [part.transpose(1, 2).contiguous() for part in gradients]
    lengths = _lengths(q, k, cu_q, cu_k, max_q, max_k)
    kernel: Any = flash_backward if q.is_cuda else attend_in_blocks_backward
    flat = (part.flatten(0, 1) for part in (dout, q, k, v, out))
    gradients = kernel(*flat, sums.transpose(0, 1).reshape(heads, -1), *lengths, scale, window)
    return [part.view(whole.shape) for part, whole in zip(gradients, (q, k, v), strict=True)]


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, window: int) -> bool:
    """Returns whether cuDNN computes rows of one length: nearly twice as fast as FlashAttention 2 on Hopper."""
    if window != ALL or not q.is_cuda or q.shape[1] != k.shape[1]:
        return False
    return takes_cudnn(*(part.transpose(1, 2) for part in (q, k, v)))


def _lengths(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int) -> Any:
    """Returns `cu_q`, `cu_k` and the most queries and keys of a row; rows of one length have none yet."""
    if cu_q is not None:
        return cu_q, cu_q if cu_k is None else cu_k, max_q, max_k or max_q
    starts = [torch.arange(len(part) + 1, dtype=torch.int32, device=q.device) * part.shape[1] for part in (q, k)]
    return *starts, q.shape[1], k.shape[1]


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The twin of `flash_forward`."""
    out, sums = torch.zeros(*q.shape[:2], v.shape[-1]).to(v), torch.zeros(q.shape[1], len(q), device=q.device)
    for queries, keys, seen in _blocks(cu_q, cu_k, window):
        scores = _scores(q[queries], k[keys], seen, scale)
        sums[:, queries] = scores.logsumexp(2)
        weights = (scores - sums[:, queries, None]).exp().to(v.dtype)
        out[queries] = (weights @ _of_heads(v[keys], q.shape[1])).transpose(0, 1)
    return out, sums


def attend_in_blocks_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The twin of `flash_backward`."""
    dq, dk, dv = (torch.zeros_like(part, dtype=torch.float32) for part in (q, k, v))
    heads, groups = q.shape[1], k.shape[1]
    for queries, keys, seen in _blocks(cu_q, cu_k, window):
        weights = (_scores(q[queries], k[keys], seen, scale) - sums[:, queries, None]).exp()
        given = dout[queries].float().transpose(0, 1)
        weighed = (given * out[queries].float().transpose(0, 1)).sum(2, keepdim=True)
        of_scores = weights * (given @ _of_heads(v[keys], heads).float().transpose(1, 2) - weighed) * scale
        dq[queries] = (of_scores @ _of_heads(k[keys], heads).float()).transpose(0, 1)
        for total, part in ((dk, of_scores.transpose(1, 2) @ q[queries].float().transpose(0, 1)),
                            (dv, weights.transpose(1, 2) @ given)):  # fmt: skip
            total[keys] += part.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
    return dq.to(q), dk.to(k), dv.to(v)


def _blocks(cu_q: Tensor, cu_k: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields blocks of queries, the keys of their row up to the last of them, and which of these each query sees."""
    rows = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (first, end), (first_key, end_key) in rows:
        behind = (end_key - first_key) - (end - first)
        for start in range(first, end, BLOCK):
            stop = min(start + BLOCK, end)
            keys = slice(first_key, first_key + behind + stop - first)
            query = torch.arange(start - first + behind, stop - first + behind, device=cu_q.device)[:, None]
            distance = query - torch.arange(keys.stop - keys.start, device=cu_q.device)[None, :]
            yield slice(start, stop), keys, (distance >= 0) & ((distance <= window) | (window == ALL))


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = (q.transpose(0, 1) @ _of_heads(k, q.shape[1]).transpose(1, 2)).float() * scale
    return scores.masked_fill(~seen, -torch.inf)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Returns keys or values [tokens, groups, width] as each of the heads reads them, [heads, tokens, width]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)
