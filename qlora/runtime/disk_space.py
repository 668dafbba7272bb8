"""What a write does when the disk is full: it fails, or it waits until there is space and runs again."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qlora.errors import ResourceError
from qlora.runtime import console
from qlora.text import format_bytes, format_duration

Result = TypeVar("Result")

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
POLL_SECONDS = 1.0


class DiskFull(ResourceError):
    """Raised when no space became free while a run waited for it."""


@dataclass
class Patience:
    """How a write waits while the disk is full."""

    seconds: float
    """How long to wait for space."""
    make_room: Callable[[], bool]
    """Removes something that is no longer needed; returns False if there is nothing to remove."""
    check: Callable[[], None]
    """Called while waiting; raises an exception to end the wait."""
    is_spent: bool = False
    """Whether a wait has failed; there is no second one."""


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def waiting_for_space(patience: Patience | None) -> Iterator[None]:
    """Makes each write in the block wait for space when the disk is full; None makes it fail."""
    token = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(token)


def patiently(path: Path, write: Callable[[], Result], *, size: int = 0) -> Result:
    """Returns the result of `write`, which writes about `size` bytes to `path` and may be called several times.

    Raises `DiskFull` if no space becomes free in time; without `waiting_for_space` it raises what `write` raises.
    """
    patience, until = _patience.get(), None
    if patience is not None and patience.is_spent:
        patience = None
    while True:
        cause: BaseException | None = None
        if patience is None or size <= free_bytes(path):
            try:
                result = write()
            except Exception as error:
                if patience is None or isinstance(error, DiskFull) or not is_disk_full(error):
                    raise
                cause = error
            else:
                if until is not None:
                    console.say("there is space again: resuming")
                return result
        if patience.make_room():
            continue
        until = _wait(path, size, patience, until, cause)


def wait_for_space(path: Path, size: int) -> None:
    """Returns when the disk of `path` has `size` bytes free."""
    patiently(path, lambda: None, size=size)


def _wait(path: Path, size: int, patience: Patience, until: float | None, cause: BaseException | None) -> float:
    now, missing = time.monotonic(), f", {format_bytes(size)} needed" if size else ""
    state = f"{_shortage(path, cause)} ({format_bytes(free_bytes(path))} free{missing})"
    if until is None:
        until = now + patience.seconds
        if patience.seconds:
            console.say(
                f"{state}: the run waits up to {format_duration(patience.seconds)} for space (trainer.disk_wait)"
            )
    if now >= until:
        patience.is_spent = True
        raise DiskFull(
            f"{state}, and no space became free in {format_duration(patience.seconds)} (trainer.disk_wait); what was "
            "saved before is kept: free some space and run the same command again to resume"
        ) from cause
    patience.check()
    time.sleep(min(POLL_SECONDS, until - now))
    return until


def _shortage(path: Path, cause: BaseException | None) -> str:
    """Returns what the disk lacks: space, inodes, or room in a quota."""
    disk = os.statvfs(_nearest(path))
    if _says(cause, (errno.EDQUOT,)):
        return f"the quota on the disk of {path.parent} is used up"
    if disk.f_files and not disk.f_favail:
        return f"the disk of {path.parent} has no inodes left for new files"
    return f"the disk of {path.parent} is full"


def _nearest(path: Path) -> Path:
    """Returns `path` if it exists, else its nearest parent that does."""
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that holds a file or folder, or would hold it."""
    return shutil.disk_usage(_nearest(path)).free


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an exception or one of its causes says that a disk is full: space, inodes or a quota."""
    return _says(error, FULL_DISK)


def _says(error: BaseException | None, codes: Sequence[int]) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return True
        text = str(error)
        # safetensors and torch put the code of the system into the text of an exception without `errno`.
        if any(f"(os error {code})" in text or os.strerror(code) in text for code in codes):
            return True
        is_cut = "unexpected pos" in text or "file write failed" in text
        if errno.ENOSPC in codes and "inline_container.cc" in text and is_cut:  # torch.save
            return True
        error = error.__cause__ or error.__context__
    return False
