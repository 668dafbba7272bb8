"""Reads rows from local JSON, JSONL, CSV and TSV files, plain or gzipped, and says where a file is broken."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError, did_you_mean

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
READABLE = (".json", ".jsonl", ".csv", ".tsv")
FILE_SUFFIXES = (*READABLE, ".gz", ".ndjson", ".txt", ".parquet", ".arrow", ".xlsx", ".zip", ".bz2", ".xz", ".zst")
"""Endings that mean a file is meant, also where there is none; hub ids may hold dots too (org/set-v1.5)."""


def is_file_path(path: str) -> bool:
    """Tells a file from a hub id: it exists, starts with `.`, `/` or `~`, or ends like a data file."""
    return path.startswith((".", "/", "~")) or path.lower().endswith(FILE_SUFFIXES) or Path(path).is_file()


def read_file(path: Path, *, shown: str) -> list[Row]:
    """Reads all rows of a file; errors begin with `shown`, the key and the path as the user wrote them.

    `.json` and `.jsonl` may both hold one array of objects or one object a line.
    """
    suffix = _suffix(path)
    if not path.exists():
        raise ConfigError(f"{shown}: no such file{_nearest(path)}")
    if path.is_dir():
        raise ConfigError(f"{shown} is a folder; name a file in it{_contents(path)}")
    if suffix not in READABLE:
        raise ConfigError(f"{shown}: cannot read {suffix or 'a file without a suffix'}; the forms are "
                          f"{', '.join(READABLE)}, and these with .gz")  # fmt: skip
    text = _read_text(path, shown)
    if not text.strip():
        raise ConfigError(f"{shown} is empty")
    if suffix in DELIMITERS:
        return list(_delimited(text, DELIMITERS[suffix], shown))
    if text.lstrip().startswith("["):
        return _array(text, shown)
    return list(_lines(text, shown))


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return did_you_mean(str(path), [str(folder / name) for name in names])


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if _suffix(entry) in READABLE)
    more = " ..." if len(names) > 5 else ""
    return f": {', '.join(names[:5])}{more}" if names else ""


def _read_text(path: Path, shown: str) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{shown}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror})") from None


def _array(text: str, shown: str) -> list[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{shown}, line {error.lineno}: broken JSON ({error.msg})") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{shown}: element {number} of the array is {_kind(row)}; each must be an object")
    return rows


def _lines(text: str, shown: str) -> Iterator[Row]:
    # str.splitlines would also split at characters like U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{shown}, line {number}: broken JSON ({error.msg}); the file must hold one array of objects, "
                "or one object a line"
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(f"{shown}, line {number}: {_kind(row)}; each line must hold an object")
        yield row


def _delimited(text: str, delimiter: str, shown: str) -> Iterator[Row]:
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = next(reader)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ConfigError(
                        f"{shown}, line {reader.line_num}: {len(cells)} cells, but the first line names {len(names)} "
                        "columns"
                    )
                yield dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{shown}, line {reader.line_num}: broken row ({error})") from None


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lifts the limit of 131,072 characters a cell, which the csv module keeps for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "null")
