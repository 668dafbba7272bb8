"""Paths of a config, and the user's home folder, which a container may lack."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.config.schema import FUNCTION_PATH, Config
from qlora.errors import ConfigError, suggest

NAMES_OR_PATHS = (
    "model.name",
    "model.tokenizer",
    "data.path",
    "data.eval_path",
    "data.template",
    "adapter",
    "lora.start",
)
"""Keys that may also name something of the hub, an embedded part or a function."""
PATHS = ("model.cache_dir", "data.cache_dir", "evaluation.path", "runs", "run", "source")
"""Keys that hold a path or a pattern of paths."""
ROW_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".arrow", ".xlsx", ".zip", ".bz2",
             ".xz", ".zst")  # fmt: skip
"""Endings that mean a file of rows, whether it can be read or not; hub ids may hold dots too (org/set-v1.5)."""
DATABASE = "sqlite:///"
"""How `tracking.uri` names a file."""


def check_paths(config: Config) -> None:
    """Raises `ConfigError` for a path that begins with a home folder that is not known here."""
    for owner, name, key in _fields(config):
        if isinstance(value := getattr(owner, name), str):
            expand_home(value, key)


def expand_home(path: str, key: str) -> Path:
    """Returns a path with its `~` or `~USER` expanded; raises `ConfigError` if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = path[1:].partition("/")[0]
        reason = f"there is no user {user!r} here" if user else _homeless()
        raise ConfigError(f"{key}={path}: {reason}; write the whole path") from None


def short_path(path: Path | str) -> str:
    """Returns a path as it is typed here: relative to the working directory where it lies below it."""
    path, here = Path(path), Path.cwd()
    for whole in (path.absolute(), path.resolve()):  # a link may lead here
        if whole.is_relative_to(here):
            return str(whole.relative_to(here))
    return str(path)


def anchor_paths(config: Config, folder: Path) -> None:
    """Makes paths relative to `folder` absolute; names that are not paths stay."""
    if isinstance(config.runs, list):
        config.runs = [text if text.startswith("~") else str(folder / text) for text in config.runs]
    for owner, name, key in _fields(config):
        value = getattr(owner, name)
        if isinstance(value, str) and not value.startswith("~") and not FUNCTION_PATH.fullmatch(value):
            path = folder / value
            if key in PATHS or value.startswith(".") or path.exists() or glob.glob(str(path), recursive=True):  # noqa: PTH207
                setattr(owner, name, str(path))
    uri = config.tracking.uri
    is_mlflow = any(tracking.backend == "mlflow" for tracking in config.tracking.trackers)
    if is_mlflow and uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError(
            "hydra.job.chdir=true: MLflow's database lies below the folder that a run works in, so each run would have "
            f"its own; name one with tracking.uri, e.g. tracking.uri={DATABASE}{folder / 'mlflow.db'}"
        )
    if uri is not None and uri.startswith(DATABASE):
        config.tracking.uri = DATABASE + str(folder / uri.removeprefix(DATABASE))


def _fields(config: Config) -> Iterator[tuple[Any, str, str]]:
    """Yields the owner of each path, the name of its field, and its full key."""
    for key in (*NAMES_OR_PATHS, *PATHS):
        group, _, name = key.rpartition(".")
        yield getattr(config, group) if group else config, name, key
    for entry, part in config.data.mix.items():
        yield from ((part, name, f"data.mix.{entry}.{name}") for name in ("path", "template"))


def cache_root(cache_dir: str | None) -> Path:
    """Returns `cache_dir`, else `$QLORA_CACHE`, else `qlora` in `$XDG_CACHE_HOME` or in `~/.cache`.

    Raises `ConfigError` where none is set and there is no home folder.
    """
    if chosen := cache_dir or os.environ.get("QLORA_CACHE"):
        return Path(chosen).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches).expanduser() / "qlora"
    if reason := _homeless():
        raise ConfigError(
            f"data.cache_dir is unset, and there is no home folder for caches: {reason}; choose a folder that can be "
            "written with data.cache_dir=FOLDER, and all libraries take it as home"
        )
    return Path.home() / ".cache" / "qlora"


def give_home(cache_dir: str | None) -> None:
    """Makes the cache folder the home of this process and its children where the user has none.

    Raises `ConfigError` where that folder is not set either.
    """
    if _homeless():
        os.environ["HOME"] = str(cache_root(cache_dir).absolute())


def _homeless() -> str:
    """Returns why there is no home folder, or an empty text."""
    try:
        home = Path.home()
    except RuntimeError:
        return f"HOME is unset, and user {os.getuid()} has no entry in /etc/passwd"
    said = f"HOME is {home}" if "HOME" in os.environ else f"that of user {os.getuid()} is {home}"
    if home == Path("/"):  # what a container calls the home of a user without an entry
        return "" if os.access(home, os.W_OK) else f"{said}, which cannot be written"
    parent = next(path for path in (home, *home.parents) if path.exists())
    return "" if parent == home or os.access(parent, os.W_OK) else f"{said}, which does not exist and cannot be made"


def is_row_file(text: str) -> bool:
    """Returns whether a text is the name or a pattern of files of rows, one with a misspelled suffix included."""
    suffix = Path(text).suffix.lower()
    return suffix in ROW_FILES or "*" in text or (len(suffix) > 3 and bool(suggest(suffix, ROW_FILES)))
