"""Streams rows of any shape into one Arrow file, whose columns are the union of the rows' own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Json, Value

from qlora.data.ingest.readers import Chunk
from qlora.data.ingest.row_size import MAX_ROW_BYTES, check_table
from qlora.errors import DataError
from qlora.text import listed
from qlora.upstream.datasets import build_features

TEXT = pa.string()
JSON = pa.json_()
"""Cells that are kept as JSON text: Arrow has no type for [text, true], for objects of different keys or for 7 beside
"seven"; `datasets` gives back what went in."""
UNKNOWN = pa.null()
"""A column without a value so far."""

MOST_IDS = 2_000_000
"""Rows whose ids are compared; 8 bytes a row are held meanwhile."""

LONG_NUMBER = r"\d{19}"
"""May lie beyond 64 bits, which the JSON parser of `datasets` refuses."""


class RowWriter:
    """Writes chunks of rows to `folder`, none of more than `most` bytes; errors begin with the chunk's `shown`."""

    def __init__(self, folder: Path, most: int = MAX_ROW_BYTES) -> None:
        self.folder, self.most = folder, most
        self.count = 0
        self.ids = IdCounter()
        self._types: dict[str, pa.DataType] = {}
        self._parts: list[Path] = []
        self._part: pa.RecordBatchStreamWriter | None = None

    def add(self, chunk: Chunk, *, label: str) -> None:
        """Appends rows; raises `DataError` for a row that shares no column with those before it."""
        count = len(chunk.rows)
        if not count:
            return
        columns = self._columns(chunk, label)
        check_table(pa.table(columns), self.most, lambda index: f"{label}, {chunk.locate(index)}")
        if not columns and not self._types:
            raise DataError(f"{label}, {chunk.locate(0)}: has no columns")
        previous = self._schema() if self._part is not None else None
        for name, cells in columns.items():
            self._types[name] = wider(self._types.get(name, UNKNOWN), cells.type)
        schema = self._schema()
        if schema != previous:
            self._begin_part(schema)
        assert self._part is not None
        self._part.write_table(_fitted(columns, schema, count))
        self.count += count
        if "id" in columns:
            self.ids.add(columns["id"])

    def finish(self, name: str) -> Path:
        """Joins what was written into one file and returns its path; there must have been a row."""
        self.close()
        path = self.folder / name
        schema = self._schema()
        if len(self._parts) == 1:
            return self._parts[0].rename(path)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as whole:
            for part in self._parts:
                with pa.OSFile(str(part)) as source, pa.ipc.open_stream(source) as batches:
                    for batch in batches:
                        table = pa.Table.from_batches([batch])
                        whole.write_table(_fitted(_by_name(table), schema, len(batch)))
                part.unlink()
        return path

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._file.close()
            self._part = None

    def _begin_part(self, schema: pa.Schema) -> None:
        """Goes on in a new file, for an Arrow file has one schema; `finish` joins them."""
        self.close()
        path = self.folder / f"part-{len(self._parts)}.arrow"
        self._parts.append(path)
        self._file = pa.OSFile(str(path), "wb")
        self._part = pa.ipc.new_stream(self._file, schema)

    def _schema(self) -> pa.Schema:
        features: dict[str, Any] = {}
        for name, kind in self._types.items():
            if kind == JSON:
                features[name] = Json()
            elif kind in (TEXT, UNKNOWN):
                features[name] = Value("string")
            else:
                features |= Features.from_arrow_schema(pa.schema([(name, kind)]))
        return build_features(features).arrow_schema

    def _columns(self, chunk: Chunk, label: str) -> dict[str, pa.Array]:
        known = dict.fromkeys(self._types)
        if isinstance(chunk.rows, pa.Table):
            columns = _by_name(chunk.rows)
            _check_related(known, columns, chunk, 0, label)
            return {name: _normal(column) for name, column in columns.items()}
        names: dict[str, None] = {}
        for index, row in enumerate(chunk.rows):
            if not row.keys() <= names.keys():
                _check_names(row.keys() - names.keys(), f"{label}, {chunk.locate(index)}")
                _check_related(known | names, row, chunk, index, label)
                names.update(dict.fromkeys(row))
        return {name: self._cells(name, [row.get(name) for row in chunk.rows], chunk, label) for name in names}

    def _cells(self, name: str, cells: list[Any], chunk: Chunk, label: str) -> pa.Array:
        if self._types.get(name) != JSON:
            try:
                column = pa.array(cells, TEXT)
                return column if column.null_count < len(column) else pa.nulls(len(column))
            except UnicodeEncodeError:
                _raise_broken(name, cells, chunk, label)
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                pass  # not only text
        try:
            return _json_array(cells)
        except (TypeError, ValueError, RecursionError):
            _raise_broken(name, cells, chunk, label)


def chunk_table(chunk: Chunk, *, label: str, most: int = MAX_ROW_BYTES) -> pa.Table:
    """Returns a chunk in the types in which `RowWriter` would write it alone, checked in the same way."""
    writer = RowWriter(Path(), most)
    table = pa.table(writer._columns(chunk, label))
    check_table(table, most, lambda index: f"{label}, {chunk.locate(index)}")
    return table


class IdCounter:
    """Counts the rows whose id an earlier row has too, among the first two million."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []
        self._count = 0

    def add(self, ids: pa.Array | pa.ChunkedArray) -> None:
        """Takes the ids of further rows; those that are neither text nor numbers are left out."""
        if self._count >= MOST_IDS or not (_is_text(ids.type) or ids.type == JSON or pa.types.is_integer(ids.type)):
            return
        # A column that turns from text to JSON on the way has quotes around its text from there on.
        hashes = [hash(cell.strip('"') if isinstance(cell, str) else cell) for cell in _storage(ids).to_pylist()
                  if cell is not None]  # fmt: skip
        self._hashes.append(np.array(hashes, np.int64))
        self._count += len(hashes)

    def repeated(self) -> int:
        """Returns how many rows repeat an id."""
        hashes = np.concatenate([np.empty(0, np.int64), *self._hashes])
        return len(hashes) - len(np.unique(hashes))


def wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Returns the type that holds the values of both; JSON holds them all."""
    if a == b or b == UNKNOWN:
        return a
    if a == UNKNOWN:
        return b
    if pa.types.is_primitive(a) and pa.types.is_primitive(b):
        try:
            fields = [pa.schema([("x", kind)]) for kind in (a, b)]
            return pa.unify_schemas(fields, promote_options="permissive").field("x").type
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            pass
    return JSON


def file_digest(path: Path) -> str:
    """Returns the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_related(known: Mapping[str, None], row: Iterable[str], chunk: Chunk, index: int, label: str) -> None:
    names = list(row)
    if known and names and known.keys().isdisjoint(names):
        raise DataError(
            f"{label}, {chunk.locate(index)}: has the columns {listed(names)}, but the rows before it have "
            f"{listed(known)}; all rows must be of one kind"
        )


def _check_names(names: Iterable[Any], label: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{label}: a column is named {name!r}; names must be text")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{label}: the name of the column {name!r} holds half of a surrogate pair, which is no character; give "
                "it another name"
            ) from None


def _by_name(table: pa.Table) -> dict[str, pa.Array]:
    return dict(zip(table.column_names, (column.combine_chunks() for column in table.columns), strict=True))


def _normal(column: pa.Array) -> pa.Array:
    """Gives all text one type, and what `datasets` has no type for that of JSON."""
    if column.null_count == len(column):
        return pa.nulls(len(column))
    if _is_text(column.type) or (pa.types.is_dictionary(column.type) and _is_text(column.type.value_type)):
        return column.cast(TEXT)
    try:
        Features.from_arrow_schema(pa.schema([("x", column.type)]))
    except (ValueError, TypeError, NotImplementedError):
        return _as_json(column)
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _fitted(columns: Mapping[str, pa.Array], schema: pa.Schema, count: int) -> pa.Table:
    return pa.table([_fit(columns.get(field.name), field.type, count) for field in schema], schema=schema)


def _fit(column: pa.Array | None, kind: pa.DataType, count: int) -> pa.Array:
    if column is None or column.type == UNKNOWN:
        nulls = pa.nulls(count, TEXT if kind == JSON else kind)
        return pa.ExtensionArray.from_storage(JSON, nulls) if kind == JSON else nulls
    if column.type == kind:
        return column
    return _as_json(column) if kind == JSON else column.cast(kind)


def _as_json(column: pa.Array) -> pa.Array:
    return column if column.type == JSON else _json_array(column.to_pylist())


def _json_array(cells: Sequence[Any]) -> pa.Array:
    """Raises `TypeError` or `ValueError` for what JSON, or its parser in `datasets`, has no place for."""
    texts = pa.array([None if cell is None else _encode(cell) for cell in cells], TEXT)
    long = pc.match_substring_regex(texts, LONG_NUMBER)
    if pc.any(long).as_py():
        for text in texts.filter(long).to_pylist():
            Json().decode_example(text)
    return pa.ExtensionArray.from_storage(JSON, texts)


def _plain(value: object) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__}")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain).encode


def _storage(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return column.cast(TEXT) if column.type == JSON else column


def _raise_broken(name: str, cells: Sequence[Any], chunk: Chunk, label: str) -> NoReturn:
    """Raises `DataError` for the first cell that cannot be kept."""
    for index, cell in enumerate(cells):
        try:
            _json_array([cell])
        except UnicodeEncodeError:
            reason = "holds half of a surrogate pair (such as \\ud83d alone), which is no character"
        except TypeError as error:
            reason = f"holds {error}; rows are of text, numbers, true, false, null, lists and objects"
        except RecursionError:
            reason = "is nested too deeply"
        except ValueError as error:
            reason = f"cannot be kept ({error}); write numbers beyond 64 bits as text"
        else:
            continue
        raise DataError(f"{label}, {chunk.locate(index)}: column {name} {reason}") from None
    raise AssertionError("each cell alone can be kept, all of them cannot")
