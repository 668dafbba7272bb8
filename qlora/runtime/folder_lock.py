"""Locks of folders, which the system takes back when the process that holds one ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from qlora.errors import RunError

LOCK_FILE = ".lock"
OVERVIEW_LOCK = ".overview.lock"
LOCK_ATTEMPTS = 10

_held: list[TextIO] = []
"""The files whose locks this process holds."""


def _release() -> None:
    """Closes the locks in a forked process, such as a worker, which may outlive a killed run."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_release)


@contextlib.contextmanager
def locked(folder: Path, complaint: str, *, name: str = LOCK_FILE, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a folder; the system releases it when the process ends in any way.

    Several processes may hold it `shared`. Raises `RunError` with `complaint` if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps only while `is_locked` tries the lock
                if attempt == LOCK_ATTEMPTS - 1:
                    message = f"{complaint}; wait until it has ended, or choose another folder"
                    raise RunError(message) from None
                time.sleep(0.1)
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits for and holds the lock of a sweep's overview."""
    with (folder / OVERVIEW_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def is_locked(folder: Path, name: str = LOCK_FILE) -> bool:
    """Returns whether a living process holds the lock of a folder."""
    path = folder / name
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
