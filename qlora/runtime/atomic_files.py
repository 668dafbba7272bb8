"""Files and folders that come whole or not at all: written beside their place, flushed to the disk, renamed.

While `waiting_for_space` is on, a write that finds the disk full waits until there is room and is done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from qlora.errors import ConfigError, DamagedFile, describe_fault
from qlora.runtime import console
from qlora.text import format_bytes, format_duration

Result = TypeVar("Result")

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
POLL_SECONDS = 1.0


class DiskFull(ConfigError):
    """Says that no space came free in the time that a run waits for it."""


@dataclass
class Patience:
    """What a write does where the disk is full."""

    seconds: float
    """How long it waits for space."""
    make_room: Callable[[], bool]
    """Removes something that nobody needs any more; False: there is nothing of that kind."""
    check: Callable[[], None]
    """Called while it waits; raises what ends the waiting."""
    is_spent: bool = False
    """Whether it has waited in vain: nothing is waited for a second time."""


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def waiting_for_space(patience: Patience | None) -> Iterator[None]:
    """Lets every write in the block wait for space, rather than fail, where the disk is full; None: fail."""
    before = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(before)


def patiently(place: Path, write: Callable[[], Result], *, size: int = 0) -> Result:
    """Returns what `write` returns, which puts about `size` bytes at `place`; it may be called several times.

    Raises `DiskFull` where no space came in time; without `waiting_for_space` what `write` raises.
    """
    patience, until = _patience.get(), None
    if patience is not None and patience.is_spent:
        patience = None
    while True:
        fault: BaseException | None = None
        if patience is None or size <= free_bytes(place):
            try:
                result = write()
            except Exception as error:
                if patience is None or isinstance(error, DiskFull) or not is_disk_full(error):
                    raise
                fault = error
            else:
                if until is not None:
                    console.say("there is space again: going on")
                return result
        if patience.make_room():
            continue
        until = _wait(place, size, patience, until, fault)


def wait_for_space(place: Path, size: int) -> None:
    """Returns when the disk has `size` bytes free at `place`."""
    patiently(place, lambda: None, size=size)


def _wait(place: Path, size: int, patience: Patience, until: float | None, fault: BaseException | None) -> float:
    now, missing = time.monotonic(), f", {format_bytes(size)} needed" if size else ""
    state = f"{_shortage(place, fault)} ({format_bytes(free_bytes(place))} free{missing})"
    if until is None:
        until = now + patience.seconds
        if patience.seconds:
            console.say(
                f"{state}: the run waits up to {format_duration(patience.seconds)} for space (trainer.disk_wait)"
            )
    if now >= until:
        patience.is_spent = True
        raise DiskFull(
            f"{state}, and no space came in {format_duration(patience.seconds)} (trainer.disk_wait); what was saved "
            "before is kept: free some space and run the same command again to go on"
        ) from fault
    patience.check()
    time.sleep(min(POLL_SECONDS, until - now))
    return until


def _shortage(place: Path, fault: BaseException | None) -> str:
    """Returns what the disk lacks: space, inodes, or a quota that has room."""
    disk = os.statvfs(_nearest(place))
    if _says(fault, (errno.EDQUOT,)):
        return f"the quota on the disk of {place.parent} is used up"
    if disk.f_files and not disk.f_favail:
        return f"the disk of {place.parent} has no inodes left for new files"
    return f"the disk of {place.parent} is full"


def _nearest(place: Path) -> Path:
    """Returns a path that exists: `place`, or the folder nearest to it."""
    while not place.exists():
        place = place.parent
    return place


def free_bytes(place: Path) -> int:
    """Returns the free bytes of the disk that a file or folder lies on, or would lie on."""
    return shutil.disk_usage(_nearest(place)).free


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an exception, or one that caused it, says that a disk is full: of space, inodes or a quota."""
    return _says(error, FULL_DISK)


def _says(error: BaseException | None, codes: Sequence[int]) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return True
        text = str(error)
        # As safetensors and torch say it.
        if any(f"(os error {code})" in text or os.strerror(code) in text for code in codes):
            return True
        is_cut = "unexpected pos" in text or "file write failed" in text
        if errno.ENOSPC in codes and "inline_container.cc" in text and is_cut:  # torch.save
            return True
        error = error.__cause__ or error.__context__
    return False


# Modes


def follow_umask(path: Path) -> None:
    """Gives a file, or a folder and all in it, the mode that the umask asks for; some libraries leave others out."""
    mask = os.umask(0o077)
    os.umask(mask)
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if entry.is_symlink():
            continue
        mode = stat.S_IMODE(entry.stat().st_mode)
        asked = (0o777 if entry.is_dir() else 0o666 | mode & 0o111) & ~mask
        if mode != asked:
            entry.chmod(asked)


# Files


def write_file(path: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Has `write` write a file beside `path`, and puts it there; raises `ConfigError` where that is impossible.

    `flush=False` is for what may be lost in a power cut.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def put() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(draft)
            follow_umask(draft)
            if flush:
                _flush(draft)
            draft.replace(path)
            if flush:
                _flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()  # there only after a failure

    try:
        patiently(path, put)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); free some space or mend the folder's permissions, or "
            "choose another folder with hydra.run.dir=FOLDER"
        ) from error


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Writes a text; raises `ConfigError` where that is impossible."""
    write_file(path, lambda draft: draft.write_text(text, encoding="utf-8"), flush=flush)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line; what can be read once only is not written again where the disk is full."""

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    with waiting_for_space(None) if iter(records) is records else contextlib.nullcontext():
        write_file(path, write)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file whose readers leave out what is no whole line; one that was cut off ends before it."""

    def append() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}")

    patiently(path, append)


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, or None where there is no such file; raises `DamagedFile`."""
    try:
        return _parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(path, describe_fault(error)) from error


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the object that a JSON file holds, or None where there is no such file; raises `DamagedFile`."""
    record = read_json(path)
    if not isinstance(record, dict | NoneType) or (record is None and path.exists()):
        raise DamagedFile(path, f"it holds {json.dumps(record)[:20]}, and no object")
    return record


def _parse(content: bytes) -> Any:
    if not content.strip():
        raise ValueError("it is empty")
    value = json.loads(content.decode("utf-8"))
    if b"\\ud" not in content.lower():
        return value
    # Half a sign, such as a file's name may hold, can be written nowhere.
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_lines(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Returns the first `count` records that `write_lines` wrote, or all; none where there is no such file.

    Raises `DamagedFile`.
    """
    return list(islice(iter_lines(path), count)) if path.is_file() else []


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records that `write_lines` wrote; raises `DamagedFile`."""
    with path.open("rb") as file:  # in a text there are more ends of lines than the one between records
        for number, line in enumerate(file, start=1):
            try:
                record = _parse(line)
            except (ValueError, RecursionError) as error:
                raise DamagedFile(path, f"line {number}: {describe_fault(error)}") from error
            if not isinstance(record, dict):
                raise DamagedFile(path, f"line {number} holds no object")
            yield record


def remove_temporary_files(folder: Path) -> None:
    """Removes what killed processes left of files and folders in `folder`; none may write there now."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*.partial")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# Folders


def write_folder(place: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a new folder beside `place`, and puts it there; what was there stays until it is whole."""
    restore_folder(place)
    partial = place.with_name(f"{place.name}.partial")

    def put() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            replace_folder(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    patiently(place, put)


def replace_folder(new: Path, place: Path) -> None:
    """Puts a folder, flushed, in place of another by renaming; after a crash `restore_folder` finds the old one."""
    follow_umask(new)
    flush_folder(new)
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    _flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(place: Path) -> None:
    """Brings back the folder that a crash of `replace_folder` left aside."""
    old = place.with_name(f"{place.name}.old")
    if old.exists() and not place.exists():
        old.rename(place)


def flush_folder(folder: Path) -> None:
    """Flushes a folder to the disk with all that is in it."""
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
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # not every system can do folders
            raise
    finally:
        os.close(handle)
