"""Answers that share their prompt: its tokens are computed once, and attention sees them in the row of each answer.

For each pair the layers compute the prompt, the rest of the chosen row, and the rest of the rejected one. For attention
alone, queries, keys and values are copied to whole rows, with ordinary causal attention inside each. Of the prompt's
outputs, which are the same in both rows, the first are kept. So everything is what it is with each row by itself. In
the backward pass a token gets the gradients of both of its cells, in one order: there is no atomic addition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("token_of", "first_cell", "second_cell")
"""The columns of a batch that say where its tokens stand; -1 is the second cell of a token that has one alone."""


class SharedRows(NamedTuple):
    """Which token stands in each cell of the rows, and where each token stands."""

    token_of: Tensor
    """int64 [cells]."""
    first: Tensor
    """int64 [tokens]."""
    second: Tensor
    """int64 [tokens]; 0 where there is none."""
    is_kept: Tensor
    """Whether a cell is the first one of its token, whose output is kept: bool [cells]."""
    has_second: Tensor
    """bool [tokens]."""

    @classmethod
    def of(cls, batch: dict[str, Any]) -> SharedRows:
        """Returns the cells of a batch as one row of tokens, and one of cells."""
        token_of, first, second = (batch[name] for name in NAMES)
        (count, cells), tokens = token_of.shape, first.shape[1]
        packs = torch.arange(count, device=token_of.device)[:, None]
        has_second = second >= 0
        token_of, first = token_of + packs * tokens, first + packs * cells
        second = torch.where(has_second, second + packs * cells, 0)
        token_of, first = token_of.view(-1), first.view(-1)
        is_kept = first[token_of] == torch.arange(count * cells, device=token_of.device)
        return cls(token_of, first, second.view(-1), is_kept, has_second.view(-1))


def to_cells(values: Tensor, shared_rows: SharedRows) -> Tensor:
    """Returns `values` [tokens, ...] in each cell where their token stands, [cells, ...]."""
    output: Tensor = _ToCells.apply(values, *shared_rows)
    return output


def to_tokens(values: Tensor, shared_rows: SharedRows) -> Tensor:
    """Returns of `values` [cells, ...] those of each token's first cell, [tokens, ...]."""
    output: Tensor = _ToTokens.apply(values, *shared_rows)
    return output


class _ToCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, token_of, first, second, is_kept, has_second):
        ctx.save_for_backward(first, second, has_second)
        return values.index_select(0, token_of)

    @staticmethod
    def backward(ctx, grad):
        first, second, has_second = ctx.saved_tensors
        again = grad.index_select(0, second)
        is_added = has_second.view(-1, *[1] * (grad.dim() - 1))
        return grad.index_select(0, first) + torch.where(is_added, again, 0), None, None, None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, token_of, first, second, is_kept, has_second):
        ctx.save_for_backward(token_of, is_kept)
        return values.index_select(0, first)

    @staticmethod
    def backward(ctx, grad):
        token_of, is_kept = ctx.saved_tensors
        is_read = is_kept.view(-1, *[1] * (grad.dim() - 1))
        return torch.where(is_read, grad.index_select(0, token_of), 0), None, None, None, None, None
