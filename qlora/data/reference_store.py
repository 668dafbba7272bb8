"""What the reference of a preference loss says of the answers of rows, kept as Arrow in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qlora.data.batching.packing import PackedRows
from qlora.data.cache import Cache
from qlora.objectives.protocol import REFERENCE

FILE = "log_probs.arrow"
SIDES = 2


class WithReference:
    """Rows of pairs, or their packs, each with what the reference says of its answers."""

    def __init__(self, items: Dataset | PackedRows, log_probs: np.ndarray) -> None:
        """Takes the log-probabilities of the chosen and the rejected answer of each row, float32 [rows, 2]."""
        self._items, self._log_probs = items, log_probs

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the item with the column `REFERENCE`: its sides, one after the other."""
        return {**self._items[index], REFERENCE: self._log_probs[members(self._items, index)].reshape(-1)}


def members(items: Dataset | PackedRows, index: int) -> Sequence[int]:
    """Returns the indices of the rows of an item: those in a pack, or itself."""
    return items.members(index) if isinstance(items, PackedRows) else [index]


def load_reference(cache: Cache, key: str, rows: int) -> np.ndarray | None:
    """Memory-maps what `save_reference` has written for `rows` pairs; None: it is not there, or damaged."""
    path = cache.root / key / FILE
    try:
        with pa.memory_map(str(path)) as source:
            column = pa.ipc.open_file(source).read_all()[REFERENCE]
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, KeyError, OSError):
        column = pa.chunked_array([pa.array([], pa.list_(pa.float32(), SIDES))])
    values = column.combine_chunks().flatten().to_numpy().reshape(-1, SIDES)
    if len(values) == rows:
        return values
    cache.discard(key)
    return None


def save_reference(cache: Cache, key: str, log_probs: np.ndarray) -> Path:
    """Writes log-probabilities, float32 [rows, 2], under a key; returns their folder."""
    flat = pa.array(log_probs.reshape(-1), pa.float32())
    table = pa.table({REFERENCE: pa.FixedSizeListArray.from_arrays(flat, SIDES)})

    def write(folder: Path) -> None:
        with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    return cache.entry(key, write)
