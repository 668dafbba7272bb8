"""Reads JSON files of model, tokenizer and adapter folders, and refuses one without the declared shape.

A message names the file and what in it is wrong. Libraries read these files, too, and raise any exception for an odd
value: `library_reads` turns it into such a message.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import DataError, ResourceError, UserError
from qlora.models.json_shapes import NEEDED, SHAPES, find_difference
from qlora.text import brief_text

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character that JSON writes in two."""
PACKAGE = re.compile(r"requires the (\S+) library but it was not found")
"""What transformers says of a package that it builds a model with."""


def read_object(path: Path, key: str) -> dict[str, Any]:
    """Returns the object in a JSON file, which has the shape declared for its name.

    Raises `DataError` that begins with `key`, such as `model.name=FOLDER`, and names the file.
    """
    reason: str | None
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_hook=_as_number)
        reason = find_difference(value, SHAPES[path.name])
        if reason is None and HALF.search(text) and not _is_unicode(value):
            reason = "it holds half a character (a lone surrogate)"
        if reason is None and (missing := [name for name in NEEDED.get(path.name, ()) if name not in value]):
            reason = f"{missing[0]} is missing"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except RecursionError:
        reason = "it is nested too deeply"
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    except ValueError as error:
        reason = f"not JSON: {error}"
    if reason is not None:
        raise DataError(f"{key}: {path.name} is damaged ({reason}); {_remedy(key)}")
    assert isinstance(value, dict)
    return value


def check_files(folder: Path, names: Iterable[str], key: str) -> dict[str, dict[str, Any]]:
    """Returns the objects in JSON files of a folder, as far as they are there, by the names of the files.

    Raises `DataError` if one lacks its shape.
    """
    return {name: read_object(folder / name, key) for name in names if (folder / name).exists()}


def _as_number(value: dict[str, Any]) -> dict[str, Any] | float:
    """Returns the number that transformers writes as an object, because JSON has no infinity, or the object itself."""
    numbers = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    return numbers.get(str(value["__float__"]), value) if [*value] == ["__float__"] else value


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def library_reads(key: str, what: str | Callable[[], str]) -> Iterator[None]:
    """Turns any exception of a library in the block, while it reads files of a folder, into one sentence.

    `key` names the folder, e.g. `model.name=FOLDER`, and `what` the file, or a function that finds it. A
    `UserError`, a lack of memory and an interruption pass.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, which is not imported here
            raise
        if (needed := PACKAGE.search(str(error))) is not None:
            raise ResourceError(
                f"{key}: transformers builds this model with the package {needed[1]}, which is not installed; "
                f"pip install {needed[1]}"
            ) from error
        raise unreadable(key, what, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise unreadable(key, what, error) from None


def unreadable(key: str, what: str | Callable[[], str], error: BaseException) -> DataError:
    """Returns the error for files that a library fails on."""
    name = what if isinstance(what, str) else what()
    said = brief_text(str(error))
    reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return DataError(f"{key}: {name} cannot be used ({reason}); {_remedy(key)}")


def _remedy(key: str) -> str:
    return "copy the adapter again" if key.startswith("adapter=") else "correct it, or download or copy it again"
