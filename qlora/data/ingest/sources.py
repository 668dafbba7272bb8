"""Where rows come from: local files, a function of the user's, or the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # of httpx or httpx2, whichever the hub's client uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from qlora.config.addresses import is_address
from qlora.config.schema import FUNCTION_PATH
from qlora.config.user_code import import_function
from qlora.data.cache import Cache
from qlora.data.formats.renderers import FORMATS, OPTIONAL_COLUMNS
from qlora.data.ingest.arrow_writer import IdCounter, file_digest
from qlora.data.ingest.readers import Chunk
from qlora.data.ingest.row_files import (
    ROWS,
    Stored,
    is_file_path,
    is_saved,
    load_files,
    load_saved,
    open_rows,
    write_rows,
)
from qlora.data.ingest.row_size import MAX_ROW_BYTES, check_table
from qlora.errors import ConfigError, DataError, ResourceError, UserError, did_you_mean
from qlora.text import listed
from qlora.upstream.datasets import is_packaged_reader
from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline

log = logging.getLogger(__name__)

T = TypeVar("T")

HELD_OUT_SPLITS = ("eval", "validation", "test")
"""The names under which hub data sets keep rows to measure on, in order of preference."""

FUNCTION_ROWS = 1000
"""Rows of a function that are written together."""


def load_rows(
    path: str,
    *,
    cache: Cache,
    subset: str | None = None,
    split: str | tuple[str, ...] = "train",
    revision: str | None = None,
    data_files: str | None = None,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    columns: Mapping[str, str] | None = None,
    may_lack: Collection[str] = (),
    key: str = "data.path",
    columns_key: str = "data.columns",
) -> Dataset:
    """Loads rows from files, from `module:function` or from the hub, memory-mapped; null cells stay null.

    `subset`, `split` (the first that exists, where several are named) and `data_files` select within a hub data
    set; a folder of `save_to_disk` has splits too. `limit` is the most rows taken out of a function's iterable; an
    endless iterable needs one, for without it this call never returns. No row may be longer than `max_row_bytes`.
    `columns` maps names to the columns that shall bear them; one for a name of `may_lack` may be missing. The rows'
    fingerprint depends on their content alone. Raises a `UserError`, which names
    `key` or `columns_key`.
    """
    if FUNCTION_PATH.fullmatch(path):
        loaded = _from_function(path, limit, cache, key, max_row_bytes)
    elif is_file_path(path) and is_saved(Path(path).expanduser()):
        loaded = _counted(choose_split(load_saved(Path(path).expanduser(), f"{key}={path}"), split, path, key))
    elif is_file_path(path) or is_address(path):
        loaded = load_files(path, cache=cache, key=key, max_row_bytes=max_row_bytes)
    else:
        failure = f"{key}={path}: no such file, and not available"
        remedy = "or name a local file: data=local data.path=FILE"
        loaded = _counted(load_hub(path, subset, split, data_files, revision, key=key, failure=failure, remedy=remedy))
    check_table(loaded.rows.data, max_row_bytes, lambda index: f"{key}={path}, row {index + 1}")
    if not len(loaded.rows):
        raise DataError(f"{key}={path}: no rows in it")
    if loaded.repeated_ids:
        log.warning("%s=%s: %d rows repeat an id of an earlier row; all are kept", key, path, loaded.repeated_ids)
    there = loaded.rows.column_names
    renamed = {name: source for name, source in (columns or {}).items() if source in there or name not in may_lack}
    return rename(loaded.rows, renamed, f"{key}={path}", columns_key)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from drawing progress bars inside the block."""
    label = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if label:
            datasets.enable_progress_bars()


def _from_function(path: str, limit: int | None, cache: Cache, key: str, max_row_bytes: int) -> Stored:
    label = f"{key}={path}"
    with cache.temporary() as folder:
        write_rows(((chunk, label) for chunk in function_chunks(path, key, limit)), folder, label, most=max_row_bytes)
        return open_rows(folder, file_digest(folder / ROWS))


def function_chunks(path: str, key: str, limit: int | None = None) -> Iterator[Chunk]:
    """Yields the rows of a function, at most `limit`."""
    label, rows, start = f"{key}={path}", iter(islice(_call(path, key), limit)), 0
    while chunk := list(islice(rows, FUNCTION_ROWS)):
        for number, row in enumerate(chunk, start):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{label}: row {number} is of type {type(row).__name__}; each must be an object with named columns"
                )
        yield Chunk(chunk, "row", range(start, start + len(chunk)))
        start += len(chunk)


def _call(path: str, key: str) -> Iterable[Any]:
    """Imports `module:function` and calls it without arguments."""
    result = import_function(path, key)()
    if isinstance(result, (Mapping, str)) or not isinstance(result, Iterable):
        raise DataError(f"{key}={path}: returned {type(result).__name__}; it must return an iterable of rows (dicts)")
    return result


def load_hub(
    path: str,
    subset: str | None,
    split: str | tuple[str, ...],
    data_files: str | None = None,
    revision: str | None = None,
    *,
    key: str = "data.path",
    failure: str,
    remedy: str,
    streaming: bool = False,
) -> Any:
    """Loads a split of a hub data set, the first that exists where several are named; a `Dataset`, or with `streaming`
    an `IterableDataset`.

    Where it is not available, raises a `UserError` that begins with `failure`, gives the reason and ends with `remedy`.
    """
    _check_hub_name(path, data_files, failure, key)
    read_cache_without_network()
    try:
        with no_progress_bars():
            options: dict[str, Any] = {"streaming": True} if streaming else {}
            load = partial(datasets.load_dataset, path, subset, data_files=data_files, revision=revision, **options)
            if isinstance(split, str):
                return load(split=split)
            splits = load()
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        kind, reason = _diagnose(error, key)
        raise kind(f"{failure} from the Hugging Face hub ({reason}); {remedy}") from error
    return choose_split(splits, split, path, key)


def _check_hub_name(path: str, data_files: str | None, failure: str, key: str) -> None:
    """Raises `ConfigError` for what is no data set of the hub to `datasets`: one of its own readers by name, a folder
    here, or files that lie elsewhere, behind which there may be any library's reader."""
    if is_packaged_reader(path):
        raise ConfigError(f"{failure} from the hub: {path} is a reader of the package datasets; name the file in {key}")
    if data_files is not None and (":" in data_files or data_files.startswith(("/", "~")) or ".." in data_files):
        raise ConfigError(
            f"data.data_files={data_files} must name files inside the hub's data set; for files elsewhere use "
            "data=local data.path=FILE"
        )


def hub_commit(rows: Dataset) -> str | None:
    """Returns the commit of the hub's repository that rows come from; None: they are from elsewhere."""
    for address in rows.info.download_checksums or {}:
        if (match := re.match(r"hf://datasets/.+?@([0-9a-f]{40})/", str(address))) is not None:
            return match[1]
    return None


def _diagnose(error: BaseException, key: str) -> tuple[type[UserError], str]:
    """Returns the kind of error that it is to the user when the hub gives nothing, and why, with what helps."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    said = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    login = "log in with `hf auth login` or set HF_TOKEN"
    if any(isinstance(link, GatedRepoError) for link in chain):
        return ResourceError, f"it is gated: accept its terms on its page there, and {login}"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return DataError, f"no such data set: check the name; if it is private, {login}"
    if any(isinstance(link, (OfflineModeIsEnabled, ConnectionError)) for link in chain):
        return ResourceError, (
            f"{why_offline() or f'no network: {said}'}; what was downloaded before can be used offline; a gated set "
            "needs a login too, `hf auth login`"
        )
    choice = "check the name and data.subset, data.split, data.data_files; " if key.startswith("data.") else ""
    return DataError, f"{said}; {choice}for a gated set {login}"


def choose_split(splits: Mapping[Any, T], split: str | tuple[str, ...], path: str, key: str) -> T:
    """Returns the first of the named splits that there is; rows saved without splits are that of any name."""
    names = (split,) if isinstance(split, str) else split
    for name in ("", *names):
        if name in splits:
            return splits[name]
    remedy = "choose one of these" if isinstance(split, str) else f"leave {key} out to split rows off data.path"
    raise ConfigError(f"{key}={path}: has no split {listed(names)}, only {listed(splits)}; {remedy}")


def _counted(rows: Dataset) -> Stored:
    ids = IdCounter()
    if "id" in rows.column_names:
        for cells in rows.data.column("id").chunks:
            ids.add(cells)
    return Stored(rows, ids.repeated())


def _refuse_misspelt(requested: str, setting: str, beside: str) -> None:
    """Raises `ConfigError` for a name in `data.columns` that is nearly one which a format reads."""
    known = {column for form in FORMATS.values() for columns in form.needs for column in columns}
    if requested not in known | {*OPTIONAL_COLUMNS} and (near := did_you_mean(requested, sorted(known))):
        raise ConfigError(f"{setting}: {requested} is no column of a format{near}, and {beside}")


def rename(rows: Dataset, columns: Mapping[str, str], label: str, columns_key: str) -> Dataset:
    """Gives the columns their names in `columns`; raises `ConfigError` for one that is not there."""
    names = rows.column_names
    taken: dict[str, str] = {}
    for requested, source in columns.items():
        if source not in names:
            _refuse_misspelt(requested, f"{columns_key}.{requested}={source}", f"{label} has no column {source}")
            raise ConfigError(f"{columns_key}.{requested}={source}: {label} has no column {source}"
                              f"{did_you_mean(source, names)}; it has {listed(names)}")  # fmt: skip
        if source in taken:
            raise ConfigError(f"{columns_key}.{requested}={source}: the column is {taken[source]} already")
        taken[source] = requested
    replaced = [requested for requested in columns if requested in names and requested not in taken]
    if replaced:
        log.info("%s: not read, for %s puts others in their place: %s", label, columns_key, ", ".join(replaced))
        rows = rows.remove_columns(replaced)
    changed = {source: requested for source, requested in taken.items() if source != requested}
    return rows.rename_columns(changed) if changed else rows
