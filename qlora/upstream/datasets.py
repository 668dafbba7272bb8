"""Private names of `datasets`.

The fingerprint of rows has no public setter: rows that `save_to_disk` left get one from their files' content, so that
the cache of tokens knows them again. The table of packaged readers has no public name: a data set's name that is in it
would load files with a reader, not a data set of the hub.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, packaged_modules


def fingerprint(rows: Dataset) -> str:
    """Returns what names the content of rows."""
    return str(rows._fingerprint)


def set_fingerprint(rows: Dataset, value: str) -> None:
    """Names the content of rows anew."""
    rows._fingerprint = value


def is_packaged_reader(name: str) -> bool:
    """Whether `load_dataset` takes a name for one of its own file readers, such as `json`."""
    return name in packaged_modules._PACKAGED_DATASETS_MODULES


def build_features(types: dict[str, Any]) -> Features:
    """Returns the types of columns by name."""
    return Features(types)  # type: ignore[arg-type]  # its `__init__(*args, **kwargs)` takes itself for the first one
