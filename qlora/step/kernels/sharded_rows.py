"""Attention of rows whose tokens are shared by several processes: each gathers the keys and values of all.

A process has two chunks of the batch's tokens (`qlora.runtime.row_processes`). Its queries see the keys of their row up
to themselves, so that packs are attended to as ever. Gradients of keys and values are summed over the processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as processes

from qlora.runtime.row_processes import ALONE, RowProcesses
from qlora.step.kernels.dequantize import operator
from qlora.step.kernels.kept_attention import attend_kept

STARTS = "row_starts"
"""The key of a batch that is shared: the first token of each of its rows and the end, int32 [rows + 1]."""
IGNORED = -100

_shared = ALONE


def share_rows(with_whom: RowProcesses) -> None:
    """Makes the operators below work with these processes."""
    global _shared
    _shared = with_whom


def take_share(batch: dict[str, Tensor], with_whom: RowProcesses, most_rows: int = 0) -> dict[str, Tensor]:
    """Returns what a process computes of a batch of rows or packs, as one row.

    `labels` become one longer than the tokens: the label of a token stands behind it, also of the last one. Padding is
    a row of its own, and so is what fills the batch up to a multiple of the chunks. `STARTS` has at least `most_rows`
    rows.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    rows, width = ids.shape
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(width).expand(rows, width)
    chunk = -(-rows * width // (2 * with_whom.count))
    missing = 2 * with_whom.count * chunk - rows * width
    begins = torch.nn.functional.pad((positions == 0).reshape(-1), (0, missing), value=False)
    if missing:
        begins[rows * width] = True
    following = torch.nn.functional.pad(labels.reshape(-1)[1:], (0, 1 + missing), value=IGNORED)
    # The last token of a row predicts nothing, and not the first one of the row behind it.
    following = following.masked_fill(torch.nn.functional.pad(begins[1:], (0, 1), value=True), IGNORED)
    fill = torch.arange(missing)
    whole = {
        "input_ids": torch.cat([ids.reshape(-1), ids.reshape(-1)[:1].expand(missing)]),
        "position_ids": torch.cat([positions.reshape(-1), fill]),
        "labels": following,
    }
    parts = [slice(index * chunk, (index + 1) * chunk) for index in with_whom.chunks]
    shared = {name: torch.cat([values[part] for part in parts])[None] for name, values in whole.items()}
    shared["labels"] = torch.nn.functional.pad(shared["labels"], (1, 0), value=IGNORED)
    starts = torch.nonzero(begins).view(-1).int()
    ends = torch.full((max(most_rows + 1 - len(starts), 1),), len(begins), dtype=torch.int32)
    return shared | {STARTS: torch.cat([starts, ends])}


def attend_shared(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None) -> Tensor:
    """Returns causal attention inside rows for the queries of this process, `q` [1, tokens, heads, width]."""
    keys, values = GatheredRows.apply(k.contiguous()), GatheredRows.apply(v.contiguous())
    chunk = q.shape[1] // 2
    outputs = []
    for half, index in enumerate(_shared.chunks):
        begin, end = index * chunk, (index + 1) * chunk
        # Rows before the chunk have keys and no queries, and those behind it neither.
        cu_q, cu_k = (starts.clamp(begin, end) - begin).int(), starts.clamp(max=end).int()
        queries = q[:, half * chunk : (half + 1) * chunk]
        lengths: dict[str, Any] = {"cu_q": cu_q, "cu_k": cu_k, "max_q": chunk, "max_k": end, "window": window}
        outputs.append(attend_kept(queries, keys[:, :end], values[:, :end], scale, **lengths))
    return torch.cat(outputs, 1)


class GatheredRows(torch.autograd.Function):
    """The keys, or values, of all processes, in the order of the batch."""

    @staticmethod
    def forward(ctx, x):
        """Returns [1, all tokens, heads, width] for those of this process, `x` [1, tokens, heads, width]."""
        ctx.tokens = x.shape[1]
        return gather_rows(x, _shared.count)

    @staticmethod
    def backward(ctx, grad):
        """Returns the sum of the processes' gradients with respect to `x`."""
        return sum_rows(grad.contiguous(), ctx.tokens)


def _fake_gather(x, count):
    return x.new_empty(x.shape[0], count * x.shape[1], *x.shape[2:])


@operator("gather_rows(Tensor x, int count) -> Tensor", _fake_gather)
def gather_rows(x: Tensor, count: int) -> Tensor:
    """Returns the tensors [1, tokens, ...] of all processes, chunk by chunk in the order of the batch."""
    parts = [torch.empty_like(x) for _ in range(count)]
    processes.all_gather(parts, x, group=_shared.group)
    fronts, backs = zip(*(part.chunk(2, 1) for part in parts), strict=True)
    return torch.cat([*fronts, *reversed(backs)], 1)


def _fake_sum(grad, tokens):
    return grad.new_empty(grad.shape[0], tokens, *grad.shape[2:])


@operator("sum_rows(Tensor grad, int tokens) -> Tensor", _fake_sum)
def sum_rows(grad: Tensor, tokens: int) -> Tensor:
    """Returns this process's part [1, tokens, ...] of a tensor of all tokens, summed over the processes."""
    count = grad.shape[1] // tokens
    chunks = grad.chunk(2 * count, 1)
    mine = [torch.cat([chunks[index], chunks[2 * count - 1 - index]], 1) for index in range(count)]
    if not grad.is_cuda:  # gloo scatters no sums
        stacked = torch.stack(mine)
        processes.all_reduce(stacked, group=_shared.group)
        return stacked[_shared.index].clone()
    total = torch.empty_like(mine[0])
    processes.reduce_scatter(total, mine, group=_shared.group)
    return total
