"""Puts rows of different lengths into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads the rows of a batch on the right, to the longest of them."""

    pad_token_id: int
    multiple_of: int = 1
    """Rounds the width up to a multiple, e.g. 8 for tensor cores or 64 to have few shapes to compile."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each int64 [rows, width]; padding has the label -100."""
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        inside = _inside([len(row) for row in ids], self.multiple_of)
        return {
            "input_ids": _fill(ids, inside, self.pad_token_id),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
            "labels": _fill(labels, inside, IGNORED),
        }


def _inside(lengths: Sequence[int], multiple_of: int) -> np.ndarray:
    """Returns which cells of a right-padded batch hold a token: bool [rows, width]."""
    width = -(-max(lengths) // multiple_of) * multiple_of
    return np.arange(width)[None, :] < np.asarray(lengths)[:, None]


def _fill(rows: Sequence[Sequence[int]], inside: np.ndarray, padding: int) -> Tensor:
    """Writes the rows one after the other into the cells of `inside`."""
    batch = np.full(inside.shape, padding, dtype=np.int64)
    batch[inside] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(batch)
