"""Finds local files of rows (a file, a folder, a glob) and keeps their rows as Arrow in the cache."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, DatasetInfo, Features
from datasets.table import MemoryMappedTable

from qlora.config.addresses import is_address
from qlora.config.paths import ROW_FILES, is_row_file
from qlora.data.cache import Cache
from qlora.data.ingest.arrow_writer import RowWriter, file_digest
from qlora.data.ingest.readers import KINDS, Chunk, RowFile, kind_of, read_chunks, suffix_of
from qlora.data.ingest.remote import find_remote
from qlora.data.ingest.row_size import MAX_ROW_BYTES
from qlora.errors import DataError, did_you_mean
from qlora.runtime import console
from qlora.upstream.datasets import set_fingerprint

FORMAT_VERSION = 2
"""To be raised whenever equal files become other rows, so that older cache entries are not read."""

ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
NO_DATA = ("readme", "license", "licence", "requirements")
"""Names, without suffix, of text files beside data."""

ROWS, ABOUT = "rows.arrow", "about.json"
"""What an entry of the cache holds."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows on disk, and how many of them repeat the `id` of another."""

    rows: Dataset
    repeated_ids: int


def is_file_path(path: str) -> bool:
    """Tells local files from a hub id: it exists, is a glob, lies deeper than org/name, or ends like a data file.

    So does a name without a folder and with a suffix that is nearly one: `rows.jsnol`.
    """
    if is_address(path):
        return False
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1 or _is_glob(path)
    is_misspelt = "/" not in path and is_row_file(path)
    return looks_local or is_misspelt or path.lower().endswith(ROW_FILES) or Path(path).exists()


def is_saved(path: Path) -> bool:
    """Tells whether the folder was written by `save_to_disk` of `datasets`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def load_files(path: str, *, cache: Cache, key: str, max_row_bytes: int = MAX_ROW_BYTES) -> Stored:
    """Returns the rows of a file, folder or glob, which are parsed only if the cache lacks this content.

    Those of an address are copied first, for the time in which they are read.
    """
    label = f"{key}={path}"
    if not is_address(path):
        return _load(_local_files(path, label), label, cache, max_row_bytes)
    with cache.scratch() as folder:
        remote = find_remote(path, label, is_readable=_is_row_file)
        copies = [(file.copy_to(folder, number), file.label) for number, file in enumerate(remote)]
        return _load(copies, label, cache, max_row_bytes)


def _load(parts: list[tuple[Path, str]], label: str, cache: Cache, max_row_bytes: int) -> Stored:
    files, names = [file for file, _ in parts], [name for _, name in parts]
    entry_key = _content_key(files, names, max_row_bytes)
    states = [_state(file) for file in files]

    def write(folder: Path) -> None:
        chunks = ((chunk, name) for file, name in parts
                  for chunk in read_chunks(file, label=name, most=max_row_bytes))  # fmt: skip
        write_rows(chunks, folder, label, most=max_row_bytes)
        for file, name, state in zip(files, names, states, strict=True):
            if _state(file) != state:
                raise DataError(f"{name}: changed while it was read; run again when it is finished")

    entry = cache.entry(entry_key, write)
    if not _is_whole(entry):
        cache.discard(entry_key)
        entry = cache.entry(entry_key, write)
    return open_rows(entry, entry_key)


def read_rows(path: str, *, key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the rows of a file, folder or glob without keeping them, each with where it stands, for messages."""
    label = f"{key}={path}"
    files = find_files(path, label)
    for file, name in zip(files, _names(files, path, label), strict=True):
        for chunk in read_chunks(file, label=name):
            rows = chunk.rows.to_pylist() if isinstance(chunk.rows, pa.Table) else chunk.rows
            for index, row in enumerate(rows):
                yield row, f"{name}, {chunk.locate(index)}"


def files_of(path: str, label: str) -> list[tuple[RowFile, str]]:
    """Returns the files that a path or an address names, each with the beginning of its errors."""
    if is_address(path):
        return [(file, file.label) for file in find_remote(path, label, is_readable=_is_row_file)]
    return [*_local_files(path, label)]


def _local_files(path: str, label: str) -> list[tuple[Path, str]]:
    files = find_files(path, label)
    return list(zip(files, _names(files, path, label), strict=True))


def find_files(path: str, label: str) -> list[Path]:
    """Returns the files that can be read: the one named, or those below a folder or under a glob, sorted."""
    location = Path(path).expanduser()
    if location.is_dir():
        matches = [file for file in location.rglob("*") if not _is_hidden(file.relative_to(location))]
        return _readable(matches, label, f"{label}: no data files in this folder", location)
    if not location.exists() and _is_glob(path):
        matches = [Path(name) for name in glob.glob(str(location), recursive=True)]  # noqa: PTH207  (absolute paths too)
        parent = next(folder for folder in location.parents if not _is_glob(str(folder)))
        return _readable(matches, label, f"{label}: matches no data file", parent)
    if not location.exists():
        raise DataError(f"{label}: no such file{_nearest(location)}")
    if kind_of(location) is None:
        suffix = suffix_of(location) or "a file without a suffix"
        raise DataError(f"{label}: cannot read {suffix}; {_forms()}")
    return [location]


def write_rows(chunks: Iterable[tuple[Chunk, str]], folder: Path, label: str, *, most: int) -> None:
    """Writes chunks, each with the beginning of its errors, to `folder` in the layout of a cache entry."""
    writer = RowWriter(folder, most)
    try:
        for chunk, name in chunks:
            writer.add(chunk, label=name)
        if not writer.count:
            raise DataError(f"{label}: no rows in it")
        path = writer.finish(ROWS)
    finally:
        writer.close()
    about = {"size": path.stat().st_size, "repeated_ids": writer.ids.repeated()}
    (folder / ABOUT).write_text(json.dumps(about))


def open_rows(entry: Path, fingerprint: str) -> Stored:
    """Maps the rows of an entry into memory."""
    table = MemoryMappedTable.from_file(str(entry / ROWS))
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    rows = Dataset(table, info=info, fingerprint=fingerprint[:16])
    return Stored(rows, json.loads((entry / ABOUT).read_text())["repeated_ids"])


def load_saved(path: Path, label: str) -> dict[str, Dataset]:
    """Returns the splits of a folder of `save_to_disk`; one that was saved without a name is ""."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{label}: cannot be read as a folder of datasets' save_to_disk ({reason})") from error
    splits = dict(saved) if isinstance(saved, DatasetDict) else {"": saved}
    for rows in splits.values():
        digests = [file_digest(Path(file["filename"])) for file in rows.cache_files]
        set_fingerprint(rows, hashlib.sha256("".join(digests).encode()).hexdigest()[:16])
    return splits


def _names(files: list[Path], path: str, label: str) -> list[str]:
    """Returns the beginning of each file's errors."""
    if len(files) == 1 and str(files[0]) == str(Path(path).expanduser()):
        return [label]
    return [f"{label}, file {file}" for file in files]


def _content_key(files: list[Path], names: list[str], max_row_bytes: int) -> str:
    digest = hashlib.sha256(f"rows {FORMAT_VERSION} {max_row_bytes}".encode())
    with console.progress("hashing the rows", len(files)) as update:
        for number, (file, name) in enumerate(zip(files, names, strict=True), 1):
            try:
                digest.update(f" {kind_of(file)} {file.suffix.lower() == '.gz'} {file_digest(file)}".encode())
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error.strerror})") from None
            update(number)
    return digest.hexdigest()[:32]


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _is_whole(entry: Path) -> bool:
    try:
        return bool(json.loads((entry / ABOUT).read_text())["size"] == (entry / ROWS).stat().st_size)
    except (OSError, ValueError):
        return False


def _is_glob(path: str) -> bool:
    return glob.has_magic(path)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _readable(matches: list[Path], label: str, otherwise: str, folder: Path) -> list[Path]:
    """Returns the data files among `found`; raises `DataError` with what `folder` holds if there are none."""
    files = sorted(file for file in matches if file.is_file())
    readable = [file for file in files if _is_row_file(file.name)]
    if not readable:
        raise DataError(f"{otherwise}{_contents(folder)}; {_forms()}")
    return readable


def _is_row_file(name: str) -> bool:
    return bool(kind_of(Path(name))) and name.lower() not in ABOUT_DATA and name.lower().split(".")[0] not in NO_DATA


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({folder} holds {', '.join(names[:5]) or 'nothing'}{more})"


def _forms() -> str:
    return f"the forms are {', '.join(KINDS)}, and these with .gz"


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    return did_you_mean(str(path), [str(entry) for entry in folder.iterdir()])
