"""The answers of pairs as rows that share their prompt: which of their tokens are the same, and where each stands.

The cells of a batch hold the tokens of pairs as those of packs: the chosen row, then the rejected one, each with its
prompt. Beside them stands which of these cells hold the same token of the same prompt. So a step may compute it once,
in all but attention: for each pair the prompt, the rest of the chosen row, and the rest of the rejected one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora.data.batching.row_encoder import IGNORED
from qlora.objectives.protocol import SHARED_ROWS

NOWHERE = -1
"""The second cell of a token that stands in one row alone."""


def count_shared(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens two rows share at their beginning, each given as its tokens and their labels.

    A row keeps one token at least of its own: before that stands what both answers are computed from.
    """
    size = min(len(chosen[0]), len(rejected[0])) - 1
    same = np.ones(max(size, 0), bool)
    for first, second in zip(chosen, rejected, strict=True):
        same &= np.asarray(first)[: len(same)] == np.asarray(second)[: len(same)]
    return len(same) if same.all() else int(same.argmin())


def join_sides(
    ids: Sequence[np.ndarray], labels: Sequence[np.ndarray], shared: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Returns rows one after the other as a pack: `input_ids`, `labels` and `position_ids`, each int [tokens].

    Positions restart at 0 with every row, by which a model separates the rows. The first label of a row is ignored: the
    token before it belongs to another row. Of pairs, whose sides follow each other, `shared` holds the tokens that each
    one's sides share; the pack then has `SHARED_ROWS`, too.
    """
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    joined = np.concatenate(labels)
    joined[starts] = IGNORED
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    pack = {"input_ids": np.concatenate(ids), "labels": joined, "position_ids": positions}
    return pack if shared is None else pack | _cells_of(lengths, starts, np.asarray(shared, dtype=np.int64))


def _cells_of(lengths: np.ndarray, starts: np.ndarray, shared: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the token that stands in each cell of a pack, and the cells of each token, int64.

    A token has a first cell, and a second one where it is in both rows of a pair; else that is -1.
    """
    total = int(lengths.sum())
    is_again = np.zeros(total, bool)  # what stands in a rejected row and was computed for the chosen one
    cell = np.arange(total)
    rejected, chosen = starts[1::2], starts[::2]
    inside = np.arange(shared.sum()) - np.repeat(np.cumsum(shared) - shared, shared)
    again, first = np.repeat(rejected, shared) + inside, np.repeat(chosen, shared) + inside
    is_again[again] = True
    token_of = np.cumsum(~is_again) - 1
    token_of[again] = token_of[first]
    first_cell = cell[~is_again]
    second_cell = np.full(len(first_cell), NOWHERE)
    second_cell[token_of[again]] = again
    return dict(zip(SHARED_ROWS, (token_of, first_cell, second_cell), strict=True))
