"""What a row holds: which cells are missing, which of its keys are read, and what its switches and labels say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qlora.config.registries.chat_keys import SWITCHES
from qlora.errors import DataError
from qlora.text import brief

Row = Mapping[str, Any]

YES, NO = ("true", "yes", "on", "t", "y"), ("false", "no", "off", "f", "n")
TRUTHS = "true, yes, on or 1, or false, no, off or 0"

OPPOSITES = ("masked",)
"""Keys of a turn that say whether it is left out, the opposite of `SWITCHES`: torchtune."""
UNCLEAR_SWITCHES = {
    "mask": "which may mean that the loss counts it or that it does not; name the key train or masked",
    "train_detail": "which trains parts of a turn; qlora trains a turn whole or not at all, so split it",
    "training_detail": "which trains parts of a turn; qlora trains a turn whole or not at all, so split it",
}


class TrackedRow(Mapping[str, Any]):
    """A row, or an object inside one, that notes which of its keys are read."""

    __slots__ = ("_cells", "_parts", "_prefix", "_read")

    def __init__(self, cells: Row, prefix: str = "") -> None:
        """`prefix` stands before the names of its keys."""
        self._cells, self._prefix = cells, prefix
        self._read: set[str] = set()
        self._parts: list[TrackedRow] = []

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._cells[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __repr__(self) -> str:
        return repr(self._cells)

    def peek(self, key: str) -> Any:
        """Returns what a key holds, without reading it."""
        return self._cells.get(key)

    def part(self, cells: Row, column: str) -> TrackedRow:
        """Returns an object inside the cell of a column, whose unread keys are told with those of the row."""
        part = TrackedRow(cells, f"{self._prefix}{column}." if column else self._prefix)
        self._parts.append(part)
        return part

    def without(self, columns: Iterable[str]) -> TrackedRow:
        """Returns the row without some columns; what is read of it counts as read of this one."""
        hidden = set(columns)
        view = TrackedRow({key: cell for key, cell in self._cells.items() if key not in hidden}, self._prefix)
        view._read, view._parts = self._read, self._parts
        return view

    def with_cells(self, cells: Row) -> TrackedRow:
        """Returns the row with other cells in some columns; what is read of it counts as read of this one."""
        view = TrackedRow({**self._cells, **cells}, self._prefix)
        view._read, view._parts = self._read, self._parts
        return view

    def unread(self) -> Iterator[str]:
        """Yields the keys that hold something and were not read: columns, and `COLUMN.KEY` of objects inside."""
        for key, value in self._cells.items():
            if key not in self._read and not is_missing(value):
                yield f"{self._prefix}{key}"
        for part in self._parts:
            yield from part.unread()


def track(row: Row, part: Any, column: str) -> Any:
    """Returns an object inside the cell of a row, tracked where the row is; all else stays as it is."""
    return row.part(part, column) if isinstance(row, TrackedRow) and isinstance(part, Mapping) else part


def peek(row: Row, key: str) -> Any:
    """Returns what a key of a row or an object holds; one that is tracked does not count it as read."""
    return row.peek(key) if isinstance(row, TrackedRow) else row.get(key)


def without(row: Row, columns: Iterable[str]) -> Row:
    """Returns a row without some columns."""
    if isinstance(row, TrackedRow):
        return row.without(columns)
    return {key: cell for key, cell in row.items() if key not in set(columns)}


def with_cells(row: Row, cells: Row) -> Row:
    """Returns a row with other cells in some columns."""
    return row.with_cells(cells) if isinstance(row, TrackedRow) else {**row, **cells}


def is_missing(value: Any) -> bool:
    """Tells whether a cell holds nothing: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, Mapping)) and not value)


def take_rows(rows: Dataset, indices: slice | np.ndarray) -> list[dict[str, Any]]:
    """Returns rows as dicts; a number that is NaN is null, wherever it stands.

    Arrow gives every object all the keys of its column, null where the object has none: such keys are left out.
    """
    columns = rows[indices]
    for field in rows.data.schema:
        if _holds(field.type, pa.types.is_floating):
            columns[field.name] = [without_nan(cell) for cell in columns[field.name]]
        if _holds(field.type, pa.types.is_struct):
            columns[field.name] = [_without_null_keys(cell) for cell in columns[field.name]]
    names = list(columns)
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _holds(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    """Tells whether a type, or one inside it, is of a wanted kind."""
    inner = (kind.value_type,) if pa.types.is_dictionary(kind) else (kind.field(i).type for i in range(kind.num_fields))
    return is_wanted(kind) or any(_holds(part, is_wanted) for part in inner)


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null_keys(item) for key, item in value.items() if item is not None}
    return [_without_null_keys(item) for item in value] if isinstance(value, list) else value


def clean_row(row: Row) -> dict[str, Any]:
    """Returns a row with null in place of NaN, and without the keys of objects that hold null, as `take_rows` does."""
    return {name: _without_null_keys(without_nan(cell)) for name, cell in row.items()}


def without_nan(value: Any) -> Any:
    """Returns a value with null in place of each number that is NaN."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def number_text(value: Any) -> str | None:
    """Returns a number, true or false as JSON writes it; None for infinity and all else."""
    if not isinstance(value, (int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return json.dumps(value)


def cell_text(value: Any, column: str, name: str) -> str:
    """Returns a cell as text, without a value as ""; raises `DataError` for what the format `name` cannot take."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else number_text(value)
    if text is None:
        raise DataError(
            f"data.format={name} needs text in column {column}, but a row holds {brief(value)}; "
            f"{_remedy(value, column)}"
        )
    return text


def _remedy(value: Any, column: str) -> str:
    """Says how a column that holds no text becomes one that does."""
    remedy = "with a function of your own (data.format=module:function)"
    if isinstance(value, (list, Mapping)):
        return f"make text of it {remedy}"
    if isinstance(value, bytes):
        return (
            f"write the text that the bytes encode (pandas: rows[{column!r}].str.decode('utf-8')), or make it {remedy}"
        )
    return f"write it as text (pandas: rows[{column!r}].astype(str)), or make it {remedy}"


def read_truth(value: Any) -> bool | None:
    """Returns what a switch says in any spelling: true, "False", "no", 0, "1.0"; None: nothing.

    Raises `ValueError` for what is neither yes nor no.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        if not text:
            return None
        if text in YES or text in NO:
            return text in YES
        value = float(text)  # raises ValueError for other words
    if isinstance(value, (bool, int, float, Decimal)) and value in (0, 1):
        return bool(value)
    raise ValueError(value)


def read_switch(turn: Row, where: str) -> bool | None:
    """Returns whether the switches of a turn ask to train it; None: there are none.

    Raises `DataError` for a switch that is unclear and for two that contradict each other.
    """
    for key, meaning in UNCLEAR_SWITCHES.items():
        if key in turn and not is_missing(turn[key]):
            raise DataError(f"{where} has the key {key}, {meaning}")
    for part in (part for key in ("content", "value") if isinstance(turn.get(key), list) for part in turn[key]):
        if isinstance(part, Mapping) and (name := next((key for key in (*SWITCHES, *OPPOSITES) if key in part), None)):
            raise DataError(
                f"{where} holds a part with {name}={brief(part[name])}; a turn is trained whole or not at all, so set "
                f"{name} beside its role, or split it"
            )
    said: dict[str, bool] = {}
    for key in (*SWITCHES, *OPPOSITES):
        value = turn.get(key)
        try:
            truth = read_truth(value)
        except ValueError:
            raise DataError(
                f"{where} has {key}={brief(value)}; a turn is trained whole or not at all, so it must be {TRUTHS}"
            ) from None
        if truth is not None:
            said[key] = truth is not (key in OPPOSITES)
    if len(set(said.values())) > 1:
        listed = " and ".join(f"{key}={brief(turn[key])}" for key in said)
        raise DataError(f"{where} has {listed}, which contradict each other; leave one of them out")
    return next(iter(said.values()), None)
