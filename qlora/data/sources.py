"""Where rows come from: a local file, a function of the user's, or the hub."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Json, Value
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever the hub's client uses

from qlora.data.files import is_file_path, read_file
from qlora.errors import ConfigError, did_you_mean

FUNCTION_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

TEXT = Value("string")

HELD_OUT_SPLITS = ("eval", "validation", "test")
"""The names under which hub data sets keep rows to measure on, in order of preference."""


def load_rows(
    path: str,
    *,
    subset: str | None = None,
    split: str | tuple[str, ...] = "train",
    data_files: str | None = None,
    limit: int | None = None,
    key: str = "data.path",
) -> Dataset:
    """Loads rows from a file, from `module:function` or from the hub; null cells of text become "".

    `subset`, `split` (the first that exists, where several are named) and `data_files` select within a hub
    data set. `limit` is the most rows taken out of a function's iterable; an endless iterable needs one, for
    without it this call never returns. Raises `ConfigError`, which names `key`, where there are no rows.
    """
    if FUNCTION_PATH.fullmatch(path):
        rows = _from_rows(islice(_call(path, key), limit), path, key)
    elif is_file_path(path):
        rows = _from_rows(read_file(Path(path).expanduser(), shown=f"{key}={path}"), path, key)
    else:
        rows = _without_nulls(_from_hub(path, subset, split, data_files, key))
    if not len(rows):
        raise ConfigError(f"{key}={path}: no rows in it")
    return rows


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from drawing progress bars inside the block."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _call(path: str, key: str) -> Iterable[Mapping[str, Any]]:
    """Imports `module:function` and calls it without arguments."""
    function = _import(path, key)
    result = function()
    if isinstance(result, (Mapping, str)) or not isinstance(result, Iterable):
        raise ConfigError(f"{key}={path}: returned {type(result).__name__}; it must return an iterable of rows (dicts)")
    return result


def _import(path: str, key: str) -> Callable[[], Any]:
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{key}={path}: there is no module {error.name}; it must be installed or lie on PYTHONPATH"
            ) from None
        raise
    function = getattr(module, name, None)
    if not callable(function):
        functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ConfigError(f"{key}={path}: module {module_name} has no function {name}{did_you_mean(name, functions)}")
    return function


def _from_rows(rows: Iterable[Mapping[str, Any]], path: str, key: str) -> Dataset:
    """Builds a table whose columns are the union of the rows' keys, in order of appearance.

    Columns that hold anything but text are kept as JSON, for Arrow has no type for [text, true], for objects of
    different keys or for 7 beside "seven"; reading them gives back what went in.
    """
    columns: dict[str, list[Any]] = {}
    for count, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(
                f"{key}={path}: row {count} is of type {type(row).__name__}; each must be an object with named columns"
            )
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, cells in columns.items():
            cells.append(row.get(name))
    features = Features({name: TEXT if _is_text(cells) else Json() for name, cells in columns.items()})
    filled = {name: _filled(cells) if features[name] == TEXT else cells for name, cells in columns.items()}
    return Dataset.from_dict(filled, features=features)


def _is_text(cells: list[Any]) -> bool:
    return all(cell is None or isinstance(cell, str) for cell in cells)


def _filled(cells: list[str | None]) -> list[str]:
    return ["" if cell is None else cell for cell in cells]


def _from_hub(path: str, subset: str | None, split: str | tuple[str, ...], data_files: str | None, key: str) -> Dataset:
    try:
        with no_progress_bars():
            if isinstance(split, str):
                return datasets.load_dataset(path, subset, split=split, data_files=data_files)
            splits = datasets.load_dataset(path, subset, data_files=data_files)
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{key}={path}: no such file, and not to be had from the Hugging Face hub ({reason}); check the name and "
            "data.subset, data.split, data.data_files; log in for a gated set (hf auth login); or name a local file: "
            "data=local data.path=FILE"
        ) from error
    for name in split:
        if name in splits:
            return splits[name]
    raise ConfigError(
        f"{key}={path}: has no split {', '.join(split)}, only {', '.join(splits)}; leave {key} out to split rows off "
        "data.path"
    )


def _without_nulls(rows: Dataset) -> Dataset:
    """Replaces null by "" in text columns and in columns without any value."""
    table, features = rows.data.table, rows.features.copy()
    for index, name in enumerate(table.column_names):
        column = table.column(index)
        if not column.null_count or features[name] not in (TEXT, Value("large_string"), Value("null")):
            continue
        if pa.types.is_null(column.type):
            column, features[name] = column.cast(pa.string()), TEXT
        table = table.set_column(index, name, pc.fill_null(column, ""))
    if table is rows.data.table:
        return rows
    info = DatasetInfo(features=features)
    return Dataset(InMemoryTable(table), info=info, fingerprint=generate_random_fingerprint())
