"""Streams the rows of one file, plain or gzipped, in chunks, and says where a file is broken."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq

from qlora.data.ingest.json_text import read_array, read_lines
from qlora.data.ingest.remote import RemoteFile
from qlora.data.ingest.row_size import MAX_ROW_BYTES, lines, too_long
from qlora.errors import DataError

CHUNK_SIZE = 2**21
"""Characters of a file that become one chunk."""
OPEN_QUOTE = ", or a quote before it is opened and never closed"
PARQUET_ROWS = 4096
NOT_A_NUMBER = frozenset({"nan", "NaN", "-nan", "-NaN"})
"""How a CSV cell spells a missing value that was turned to text; elsewhere text is text."""

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
         ".txt": "text"}  # fmt: skip
"""How a file of each suffix is read."""


RowFile = Path | RemoteFile
"""A file of rows, here or elsewhere."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows in order; `word` and `numbers` say where each stands in its source, e.g. line 7."""

    rows: Sequence[Mapping[str, Any]] | pa.Table
    word: str
    numbers: Sequence[int]

    def locate(self, index: int) -> str:
        """Says where the row stands."""
        return f"{self.word} {self.numbers[index]}"


def kind_of(path: RowFile) -> str | None:
    """Returns the kind by the file's suffix, or None for a file that cannot be read."""
    return KINDS.get(suffix_of(path))


def suffix_of(path: RowFile) -> str:
    """Returns the suffix in lower case, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_chunks(path: RowFile, *, label: str, most: int = MAX_ROW_BYTES) -> Iterator[Chunk]:
    """Yields the rows of a file; errors begin with `shown`, the key and the path as the user wrote them.

    A row of more than `most` bytes is refused, as far as the form of the file allows before it is in memory.

    JSON files of any suffix may hold one array of objects or one object a line. A text file has a row for each
    block between blank lines.
    """
    kind = kind_of(path)
    with _named_errors(path, label):
        if kind == "parquet":
            yield from _parquet(path, label, most)
            return
        first = _first_character(path)
        if not first:
            raise DataError(f"{label} is empty")
        if kind == "json" and first == "[":
            with _open_text(path) as file:
                for start, rows in read_array(file, label, size=CHUNK_SIZE, most=most):
                    yield Chunk(rows, "element", range(start, start + len(rows)))
        elif kind == "json":
            with open_binary(path) as file:
                for numbers, rows in read_lines(file, label, size=CHUNK_SIZE, most=most):
                    yield Chunk(rows, "line", numbers)
        elif kind == "text":
            yield from _paragraphs(path, label, most)
        else:
            yield from _delimited(path, "," if kind == "csv" else "\t", label, most)


@contextmanager
def _named_errors(path: RowFile, label: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        with _named_errors(path, label):  # the bytes behind may be broken in another way
            _raise_bad_byte(path, label)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{label}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{label}: cannot be read ({error.strerror or error})") from None


@contextmanager
def open_binary(path: RowFile) -> Iterator[IO[bytes]]:
    """Opens a file to read bytes, those inside where it is gzipped."""
    with path.open("rb") as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        with gzip.open(file, "rb") as unpacked:
            yield cast(IO[bytes], unpacked)


@contextmanager
def _open_text(path: RowFile, newline: str | None = "\n") -> Iterator[IO[str]]:
    with open_binary(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _first_character(path: RowFile) -> str:
    """Returns the first character that is no blank, or "" if there is none."""
    with _open_text(path) as file:
        while text := file.read(2**16):
            if stripped := text.lstrip():
                return stripped[0]
    return ""


def _raise_bad_byte(path: RowFile, label: str) -> NoReturn:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, line, block = 0, 1, b""
    with open_binary(path) as file:
        if (first := file.read(2)) == b"\x1f\x8b":
            raise DataError(f"{label}: is compressed with gzip; give it a name that ends in .gz")
        try:
            for block in itertools.chain([first], _blocks(file)):
                waiting = len(decoder.getstate()[0])
                decoder.decode(block)
                position, line = position + len(block), line + block.count(b"\n")
            waiting = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position += error.start - waiting
            line += error.object[: error.start].count(b"\n")
    raise DataError(f"{label}, line {line}: not UTF-8 text (byte {position}); convert it to UTF-8") from None


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(CHUNK_SIZE):
        yield block


def _paragraphs(path: RowFile, label: str, most: int) -> Iterator[Chunk]:
    numbers, texts, size = [], [], 0
    with _open_text(path, newline=None) as file:
        for number, text in _blocks_of_lines(file, label, most):
            numbers.append(number)
            texts.append(text)
            size += len(text)
            if size > CHUNK_SIZE:
                yield Chunk(_table(["text"], [texts]), "line", numbers)
                numbers, texts, size = [], [], 0
    yield Chunk(_table(["text"], [texts]), "line", numbers)


def _blocks_of_lines(file: IO[str], label: str, most: int) -> Iterator[tuple[int, str]]:
    """Yields what stands between blank lines, with the number of its first line."""
    block: list[str] = []
    size = 0
    whole = lines(file, most, lambda number: too_long(f"{label}, line {number - len(block)}", most))
    for number, line in enumerate(itertools.chain(whole, [""]), 1):
        if line.strip():
            block.append(line)
            size += len(line)
            if size > most:
                raise too_long(f"{label}, line {number + 1 - len(block)}", most)
        elif block:
            yield number - len(block), "".join(block).removesuffix("\n")
            block.clear()
            size = 0


def _table(names: list[str], columns: Iterable[Sequence[str | None]]) -> pa.Table:
    return pa.table([pa.array(cells, pa.string()) for cells in columns], names=names)


def _delimited(path: RowFile, delimiter: str, label: str, most: int) -> Iterator[Chunk]:
    with _open_text(path, newline="") as file:
        text = lines(file, most, lambda number: csv.Error("field limit"))
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        with _csv_errors(label, 1, most), _long_cells(most):
            names = next(cells for cells in reader if cells)
        _check_names(names, f"{label}, line {reader.line_num}")
        while True:
            rows, numbers = _next_rows(reader, names, label, most)
            if not rows:
                return
            yield Chunk(_table(names, zip(*rows, strict=True)), "line", numbers)


def _next_rows(reader: Any, names: list[str], label: str, most: int) -> tuple[list[list[str | None]], list[int]]:
    """Takes a chunk's rows out of the csv reader, with the lines they begin at."""
    rows, numbers, size, start = [], [], 0, reader.line_num + 1
    with _long_cells(most):
        while size < CHUNK_SIZE:
            with _csv_errors(label, start, most):
                cells = next(reader, None)
            if cells is None:
                break
            if len(cells) == len(names):
                rows.append([None if cell in NOT_A_NUMBER else cell for cell in cells])
                numbers.append(start)
                size += sum(map(len, cells))
            elif cells:
                raise DataError(
                    f"{label}, line {start}: {len(cells)} cells, but the first line names {len(names)} columns"
                )
            start = reader.line_num + 1
    return rows, numbers


def _check_names(names: Iterable[str], label: str) -> None:
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{label}: column {number} has no name; name it, or leave it out (pandas: index=False)")
        if name in seen:
            raise DataError(f"{label}: two columns are named {name}; give each its own name")
        seen.add(name)


def _check_keys(kind: pa.DataType, column: str, label: str) -> None:
    """Refuses objects with a key that stands twice, however deep in a column."""
    inner = [kind.field(index) for index in range(kind.num_fields)]
    for name, count in Counter(field.name for field in inner).items():
        if count > 1:
            raise DataError(
                f"{label}: in column {column}, the key {name!r} stands twice in one object; keep one of them"
            )
    for field in inner:
        _check_keys(field.type, column, label)


@contextmanager
def _csv_errors(label: str, line: int, most: int) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        reason = str(error)
        if "field limit" in reason:
            raise too_long(f"{label}, line {line}", most, OPEN_QUOTE) from None
        if "unexpected end" in reason:
            reason = "a quote is opened and never closed"
        raise DataError(f"{label}, line {line}: broken row ({reason})") from None


@contextmanager
def _long_cells(most: int) -> Iterator[None]:
    """Sets the limit of characters a cell, which the csv module keeps for the whole process: it is 131,072."""
    previous = csv.field_size_limit(most)
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _parquet(path: RowFile, label: str, most: int) -> Iterator[Chunk]:
    with _seekable(path) as source:
        if not source.read(1):
            raise DataError(f"{label} is empty")
        source.seek(0)
        try:
            file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False)  # else a whole row group at once
            _check_names(file.schema_arrow.names, label)
            for field in file.schema_arrow:
                _check_keys(field.type, field.name, label)
            _check_groups(file.metadata, most, label)
            start = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                batch.validate(full=True)
                yield Chunk(pa.Table.from_batches([batch]), "row", range(start, start + len(batch)))
                start += len(batch)
        except (pa.ArrowException, OSError) as error:
            reason = "".join(filter(str.isprintable, str(error).split("\n")[0])).rstrip(".")
            raise DataError(f"{label}: broken Parquet file ({reason})") from None


def _check_groups(metadata: pq.FileMetaData, most: int, label: str) -> None:
    """Refuses a group of rows that is so large that one of them must be too long, before any of it is read."""
    start = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        # A value may stand there four times: in a page, as its smallest and largest, and in a dictionary.
        if group.total_byte_size > 4 * most * group.num_rows:
            rows = f"row {start}" if group.num_rows == 1 else f"one of the rows {start} to {start + group.num_rows - 1}"
            raise too_long(f"{label}, {rows}", most)
        start += group.num_rows


@contextmanager
def _seekable(path: RowFile) -> Iterator[IO[bytes]]:
    """Opens a file, copied to disk where it is gzipped or elsewhere, for Parquet is read from its end."""
    with open_binary(path) as file:
        if file.seekable() and not path.name.lower().endswith(".gz"):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked, CHUNK_SIZE)
            unpacked.seek(0)
            yield unpacked
