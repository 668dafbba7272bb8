"""The most bytes that a row may have: a row beyond them is a broken file more often than an example to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Final

import pyarrow as pa

from qlora.errors import DataError

MAX_ROW_BYTES: Final = 64_000_000
"""What files may have that no config speaks of."""


def too_long(where: str, most: int, why: str = "") -> DataError:
    """Returns the error of a row that stands `where`; `why` says what else may be wrong."""
    return DataError(
        f"{where}: the row has more than {most:,} bytes{why}; if it is meant to be so long, raise data.max_row_bytes"
    )


def check_text(text: str, most: int, where: str) -> None:
    """Raises `DataError` where the text of a row has more than `most` bytes in UTF-8."""
    if 4 * len(text) > most and len(text.encode("utf-8", "surrogatepass")) > most:
        raise too_long(where, most)


def lines(file: IO[str], most: int, error: Callable[[int], Exception]) -> Iterator[str]:
    """Yields the lines of a file; raises what `error` makes of a line's number where it is longer than `most`."""
    for number, line in enumerate(iter(partial(file.readline, most + 1), ""), 1):
        if len(line) > most:
            raise error(number)
        yield line


def check_table(table: pa.Table, most: int, where: Callable[[int], str]) -> None:
    """Raises `DataError`, which begins with `where` of its index, where a row has more than `most` bytes."""
    if (index := _first_long(table, most)) is not None:
        raise too_long(where(index), most)


def _first_long(table: pa.Table, most: int) -> int | None:
    if not len(table) or table.nbytes <= most:
        return None
    if len(table) == 1:
        return 0
    half = len(table) // 2
    if (index := _first_long(table.slice(0, half), most)) is not None:
        return index
    index = _first_long(table.slice(half), most)
    return None if index is None else half + index
