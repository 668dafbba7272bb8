"""Joins short rows into packs of about equal length, so that hardly any of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from qlora.data.batching.shared_prompts import join_sides
from qlora.data.batching.token_store import column
from qlora.errors import ConfigError

SIDES = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
"""The columns of tokens and labels of a row; a pair has both."""
Pack = np.ndarray
"""The indices of the rows of one pack, int64 [rows of the pack]."""


def pack(lengths: np.ndarray, budget: int) -> list[Pack]:
    """Spreads rows over packs of at most `budget` tokens: each row, longest first, goes where the least room is left.

    `lengths` holds the tokens of every row, int [rows]. Every row is in exactly one pack; equal lengths give equal
    packs. Raises `ConfigError` for a row longer than `budget`. This is best-fit decreasing, which needs at most 11/9
    of the fewest possible packs, plus 4 (Johnson, Near-optimal bin packing algorithms, 1973). Rows of one length and
    packs with the same room are handled in one step: the work grows with the number of lengths rather than of rows.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return []
    assert lengths.min() > 0, "a row has at least one token"
    if lengths.max() > budget:
        raise ConfigError(
            f"data.pack_length={budget} is shorter than the longest row, {lengths.max()} tokens; raise it, or lower "
            "data.max_length (or data.source_max_len and data.target_max_len)"
        )
    longest_first = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    owners: list[np.ndarray] = []
    packs = _Packs(budget)
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        owners += packs.assign(size, count)
    owner = np.concatenate(owners)
    by_owner = np.argsort(owner, kind="stable")
    return np.split(longest_first[by_owner], np.cumsum(np.bincount(owner))[:-1])


def efficiency(packs: Sequence[Pack], lengths: np.ndarray, budget: int) -> float:
    """Returns the share of the packs' `budget` that rows fill; the last, partly empty packs count as whole ones."""
    return float(lengths[np.concatenate(packs)].sum() / (len(packs) * budget))


class _Packs:
    """Open packs by the room that is left in them."""

    def __init__(self, budget: int) -> None:
        self.budget, self.opened = budget, 0
        self.by_room: dict[int, list[np.ndarray]] = {}  # room -> packs with exactly that much, in chunks
        self.is_open = np.zeros(budget + 1, dtype=bool)  # by room: whether any pack has it

    def assign(self, size: int, count: int) -> Iterator[np.ndarray]:
        """Yields the packs of `count` rows of `size` tokens, int64 arrays with `count` entries in all.

        Sizes must not rise from call to call. A pack that takes one row has the least room still if another fits,
        so that it takes rows until none fits.
        """
        for room in (np.flatnonzero(self.is_open[size:]) + size).tolist():
            if count == 0:
                return
            chunks = self.by_room.pop(room)
            there = np.concatenate(chunks) if len(chunks) > 1 else chunks[0]
            self.is_open[room] = False
            yield self._fill(there, room, size, count)
            count -= min(count, len(there) * (room // size))
        if count:
            needed = -(-count // (self.budget // size))
            new = np.arange(self.opened, self.opened + needed)
            self.opened += needed
            yield self._fill(new, self.budget, size, count)

    def _fill(self, there: np.ndarray, room: int, size: int, count: int) -> np.ndarray:
        """Fills packs that have the same room, one after the other; returns the pack of every row that found one."""
        rows_per_pack = room // size
        full, rest = divmod(min(count, len(there) * rows_per_pack), rows_per_pack)
        self._open(there[:full], room - rows_per_pack * size)
        self._open(there[full : full + 1] if rest else there[:0], room - rest * size)
        self._open(there[full + bool(rest) :], room)
        return np.concatenate([np.repeat(there[:full], rows_per_pack), np.repeat(there[full : full + 1], rest)])

    def _open(self, packs: np.ndarray, room: int) -> None:
        if len(packs) and room:
            self.by_room.setdefault(room, []).append(packs)
            self.is_open[room] = True


class PackedRows:
    """The packs of tokenized rows; each is fetched from the rows' Arrow table when asked for."""

    def __init__(self, rows: Dataset, packs: Sequence[Pack], *, shares_prompts: bool = False) -> None:
        """Takes rows with the columns `input_ids`, `labels` and `length`, and what `pack` made of their lengths.

        Of pairs, which have a rejected side too, both sides stand in a pack, the chosen one first. Where they share
        their prompt, `pack` has counted its tokens once (`lengths_of`).
        """
        self._sides = [names for names in SIDES if names[0] in rows.column_names]
        self._shared = ["shared"] if shares_prompts else []
        columns = [name for names in self._sides for name in names] + self._shared
        self._rows = rows.select_columns(columns).with_format("arrow")
        counts = np.array([len(indices) for indices in packs], dtype=np.int64)
        self._order = np.concatenate([np.zeros(0, np.int64), *packs])  # one array: workers are forked with it
        self._ends = np.cumsum(counts)
        lengths = column(rows, "length")[self._order]
        self.lengths = _sums(lengths_of(rows, shares_prompts=shares_prompts)[self._order], counts)
        """Tokens in each pack, a shared prompt once: int64 [packs]."""
        self.most_cells = int(_sums(lengths, counts).max(initial=0)) + 1 if shares_prompts else None
        """Where answers share prompts, the most tokens of all their rows in a pack, and one of padding; else None."""
        self.most_rows = int(counts.max(initial=0)) * len(self._sides)
        self.longest_row = _longest_side(rows, lengths)

    def __len__(self) -> int:
        return len(self._ends)

    def members(self, index: int) -> list[int]:
        """Returns the indices of a pack's rows."""
        first = int(self._ends[index - 1]) if index else 0
        return self._order[first : self._ends[index]].tolist()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums the values of the rows, [rows], over those of each pack: [packs]."""
        return _sums(values[self._order], np.diff(self._ends, prepend=0))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns a pack, as `join_sides` does."""
        return self.join(self.members(range(len(self))[index]))

    def join(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns some of the rows as a pack."""
        table = self._rows[members]
        parts = [[_split(table[name]) for name in names] for names in self._sides]
        # Row by row, the sides of each one after the other.
        ids, labels = ([part for row in zip(*(side[kind] for side in parts), strict=True) for part in row]
                       for kind in (0, 1))  # fmt: skip
        return join_sides(ids, labels, table["shared"].to_numpy() if self._shared else None)


def lengths_of(rows: Dataset, *, shares_prompts: bool) -> np.ndarray:
    """Returns the tokens of each row, int [rows]; of a pair those of both sides, of a prompt that they share once."""
    lengths = column(rows, "length")
    return lengths - column(rows, "shared") if shares_prompts else lengths


def _split(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Returns the lists in a column."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return np.split(np.array(lists.flatten()), np.cumsum(lengths)[:-1])


def _longest_side(rows: Dataset, lengths: np.ndarray) -> int:
    """Returns the tokens of the longest row, of pairs of the longest side; `lengths` are those of the rows in packs."""
    if "rejected_ids" not in rows.column_names:
        return int(lengths.max(initial=0))
    sides = rows.select_columns(["input_ids", "rejected_ids"]).with_format("arrow")[:]
    return max(pc.max(pc.list_value_length(sides[name])).as_py() or 0 for name in sides.column_names)


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums consecutive groups of `counts` values."""
    totals = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]
