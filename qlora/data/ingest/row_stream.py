"""Rows that are read as they are needed: from files, a function or the hub, and from where they were left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from qlora.config.addresses import is_address
from qlora.config.schema import FUNCTION_PATH
from qlora.data.cache import Cache
from qlora.data.formats.cells import clean_row, take_rows
from qlora.data.ingest.arrow_writer import chunk_table, file_digest
from qlora.data.ingest.readers import Chunk, RowFile, read_chunks
from qlora.data.ingest.row_files import (
    ROWS,
    files_of,
    is_file_path,
    is_saved,
    load_saved,
    open_rows,
    write_rows,
)
from qlora.data.ingest.sources import choose_split, function_chunks, load_hub, rename
from qlora.errors import DataError, ResourceError, describe_fault
from qlora.text import listed

Row = Mapping[str, Any]
Open = Callable[[], IterableDataset]


@dataclass(frozen=True, slots=True)
class Position:
    """Where in its rows a source is."""

    rows: Any
    """The state of the rows' `IterableDataset`; None: before the first of them."""
    number: int
    """How many rows of this pass have been taken or skipped."""


class RowSource:
    """The rows of one set, pass after pass; columns have the names that a format reads."""

    def __init__(
        self,
        open_source: Open,
        label: str,
        *,
        columns: Mapping[str, str],
        columns_key: str,
        skip: int = 0,
        limit: int | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        """Takes what opens the rows, the key and the path for messages, and the names of columns.

        The first `skip` rows of each pass are left out, and those behind the first `limit`. `sizes` are the bytes of
        its files.
        """
        self.label, self.skip, self.limit, self.sizes = label, skip, limit, list(sizes)
        self._open, self._columns, self._columns_key = open_source, columns, columns_key
        self._known: set[str] = set()
        self._begin(Position(None, 0))

    def head(self, count: int, cache: Cache) -> Dataset:
        """Returns the first `count` rows of the set, those that are skipped included."""
        rows = list(islice(self._guarded(iter(self._open()), 0), min(count, self.limit or count)))
        if not rows:
            raise DataError(f"{self.label}: no rows in it")
        with cache.temporary() as folder:
            chunk = Chunk(rows, "row", range(1, len(rows) + 1))
            write_rows([(chunk, self.label)], folder, self.label, most=2**62)
            saved = open_rows(folder, file_digest(folder / ROWS))
        renamed = rename(saved.rows, self._columns, self.label, self._columns_key)
        self._known = {*saved.rows.column_names}
        return renamed

    def take(self, count: int) -> tuple[int, list[Row]]:
        """Returns the next rows, at most `count`, and the number of the first (from 0); no rows: the pass is over."""
        if self._number < self.skip:
            self._read(self.skip - self._number)
        most = count if self.limit is None else min(count, self.limit - self._number)
        first, rows = self._number, self._read(max(most, 0))
        for number, row in enumerate(rows, first + 1):
            if row and self._known and self._known.isdisjoint(row):
                raise DataError(
                    f"{self.label}, row {number}: has the columns {listed(list(row))}, but the first rows have "
                    f"{listed(sorted(self._known))}; all rows must be of one kind"
                )
        return first, [self._renamed(row) for row in rows]

    @property
    def position(self) -> Position:
        """Where the next row is."""
        return Position(self._rows.state_dict() if self._is_read else self._start, self._number)

    def go_to(self, position: Position) -> None:
        """Resumes with the row at a position."""
        self._begin(position)

    def restart(self) -> None:
        """Begins the next pass."""
        self._begin(Position(None, 0))

    def _begin(self, position: Position) -> None:
        self._iterator: Iterator[Row] | None = None
        self._start, self._number, self._is_read = position.rows, position.number, False

    def _read(self, count: int) -> list[Row]:
        if self._iterator is None:
            self._rows = self._open()
            if self._start is not None:
                self._rows.load_state_dict(self._start)
            self._iterator = self._guarded(iter(self._rows), self._number)
        rows = list(islice(self._iterator, count))
        self._is_read |= bool(rows)
        self._number += len(rows)
        return rows

    def _guarded(self, rows: Iterator[Any], number: int) -> Iterator[Row]:
        """Yields rows; what the network or a disk raises becomes a sentence."""
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, HTTPError, DatasetsError, EOFError) as error:
                raise ResourceError(
                    f"{self.label}: cannot be read behind row {number} ({describe_fault(error)}); start the same "
                    "command again when it can: it resumes from the last checkpoint"
                ) from error
            number += 1
            yield clean_row(row)

    def _renamed(self, row: Row) -> Row:
        if not self._columns:
            return row
        hidden = {*self._columns, *self._columns.values()}
        kept = {name: cell for name, cell in row.items() if name not in hidden}
        return kept | {name: row.get(source) for name, source in self._columns.items()}


def open_stream(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | None = None,
    max_row_bytes: int,
    key: str,
) -> IterableDataset:
    """Returns the rows of files, of `module:function` or of a hub data set, as `load_rows` finds them."""
    label = f"{key}={path}"
    if FUNCTION_PATH.fullmatch(path):
        return IterableDataset.from_generator(
            _function_rows, gen_kwargs={"path": path, "key": key, "most": max_row_bytes}
        )
    if is_file_path(path) and is_saved(Path(path).expanduser()):
        saved = choose_split(load_saved(Path(path).expanduser(), label), split, path, key)
        return saved.to_iterable_dataset()
    if is_file_path(path) or is_address(path):
        parts = files_of(path, label)
        return IterableDataset.from_generator(_file_rows, gen_kwargs={"parts": parts, "most": max_row_bytes})
    return load_hub(
        path,
        subset,
        split,
        data_files,
        revision,
        key=key,
        failure=f"{label}: no such file, and not available",
        remedy="or name a local file: data=local data.path=FILE",
        streaming=True,
    )


def file_sizes(path: str, key: str) -> list[int]:
    """Returns the bytes of the files that a path names, in order; none where it names no files."""
    is_local = is_file_path(path) and not is_saved(Path(path).expanduser())
    if FUNCTION_PATH.fullmatch(path) or not (is_local or is_address(path)):
        return []
    files = [file for file, _ in files_of(path, f"{key}={path}")]
    return [file.stat().st_size if isinstance(file, Path) else file.size for file in files]


def _file_rows(parts: Sequence[tuple[RowFile, str]], most: int) -> Iterator[Row]:
    for path, label in parts:
        for chunk in read_chunks(path, label=label, most=most):
            yield from _rows_of(chunk, label, most)


def _function_rows(path: str, key: str, most: int) -> Iterator[Row]:
    for chunk in function_chunks(path, key):
        yield from _rows_of(chunk, f"{key}={path}", most)


def _rows_of(chunk: Chunk, label: str, most: int) -> Sequence[Row]:
    """Returns the rows of a chunk, by way of the types in which rows are kept that are read as a whole."""
    return take_rows(Dataset(chunk_table(chunk, label=label, most=most)), slice(None)) if len(chunk.rows) else ()
