"""Files and folders that are written whole or not at all: written beside their path, flushed, and renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

from qlora.errors import DamagedFile, ResourceError, describe_fault
from qlora.runtime.disk_space import patiently, waiting_for_space


def follow_umask(path: Path) -> None:
    """Gives a file, or a folder and its contents, the mode of the umask; some libraries write with fewer rights."""
    mask = os.umask(0o077)
    os.umask(mask)
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if entry.is_symlink():
            continue
        mode = stat.S_IMODE(entry.stat().st_mode)
        asked = (0o777 if entry.is_dir() else 0o666 | mode & 0o111) & ~mask
        if mode != asked:
            entry.chmod(asked)


def write_file(path: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Lets `write` write a temporary file and renames it to `path`; raises `ResourceError` if that is impossible.

    `flush=False` is for a file that a power cut may lose.
    """
    temporary_file = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def put() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary_file)
            follow_umask(temporary_file)
            if flush:
                _flush(temporary_file)
            temporary_file.replace(path)
            if flush:
                _flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary_file.unlink()  # it exists only after a failure

    try:
        patiently(path, put)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror}); free some space or fix the folder's permissions, or "
            "choose another folder with hydra.run.dir=FOLDER"
        ) from error


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Writes a text; raises `ResourceError` if that is impossible."""
    write_file(path, lambda temporary_file: temporary_file.write_text(text, encoding="utf-8"), flush=flush)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line; records of an iterator cannot be written again after a full disk."""

    def write(temporary_file: Path) -> None:
        with temporary_file.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    with waiting_for_space(None) if iter(records) is records else contextlib.nullcontext():
        write_file(path, write)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file whose readers skip incomplete lines; the line break comes first, to end a cut line."""

    def append() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}")

    patiently(path, append)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, or None if it does not exist; raises `DamagedFile`."""
    try:
        return _parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(path, describe_fault(error)) from error


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if the file does not exist; raises `DamagedFile`."""
    record = read_json(path)
    if not isinstance(record, dict | NoneType) or (record is None and path.exists()):
        raise DamagedFile(path, f"it holds {json.dumps(record)[:20]}, not an object")
    return record


def _parse(content: bytes) -> Any:
    if not content.strip():
        raise ValueError("it is empty")
    value = json.loads(content.decode("utf-8"))
    if b"\\ud" not in content.lower():
        return value
    # Half of a surrogate pair, which a file's name may contain, cannot be encoded.
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_lines(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Returns the first `count` records that `write_lines` wrote, or all; none if the file does not exist.

    Raises `DamagedFile`.
    """
    return list(islice(iter_lines(path), count)) if path.is_file() else []


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records that `write_lines` wrote; raises `DamagedFile`."""
    with path.open("rb") as file:  # text mode knows more line ends than the one between records
        for line_number, line in enumerate(file, start=1):
            try:
                record = _parse(line)
            except (ValueError, RecursionError) as error:
                raise DamagedFile(path, f"line {line_number}: {describe_fault(error)}") from error
            if not isinstance(record, dict):
                raise DamagedFile(path, f"line {line_number} is not an object")
            yield record


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files and folders of killed processes; no other process may write to `folder` now."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*.partial")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary folder and renames it to `path`; an old folder stays until then."""
    restore_folder(path)
    partial = path.with_name(f"{path.name}.partial")

    def put() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    patiently(path, put)


def replace_folder(new: Path, path: Path) -> None:
    """Flushes a folder and renames it over another one; after a crash `restore_folder` finds the old one."""
    follow_umask(new)
    flush_folder(new)
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Restores the old folder after a crash of `replace_folder`."""
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)


def flush_folder(folder: Path) -> None:
    """Flushes a folder and its contents to the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (
            path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)
        ):  # not every file system can flush folders
            raise
    finally:
        os.close(handle)
