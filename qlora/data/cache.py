"""A folder of finished results: what is in it under its own name is whole, whatever happened to its writer."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import ResourceError
from qlora.runtime.atomic_files import follow_umask

UNFINISHED = ".unfinished"
"""Beginning of a temporary folder's name: `.unfinished~HOST~PID~RANDOM`."""


class Cache:
    """Entries are folders that are written beside their place and renamed into it.

    Opening a cache removes what killed processes of this machine left in it.
    """

    def __init__(self, root: Path) -> None:
        """Raises `ResourceError` if `root` cannot be written."""
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as error:
            raise _unwritable(root, error) from error
        _remove_abandoned(root)

    def entry(self, key: str, write: Callable[[Path], None]) -> Path:
        """Returns the folder of `key`; where there is none, `write` fills one first.

        Several processes may write the same entry at once; all of them return the one that was finished first.
        """
        folder = self.root / key
        if not folder.is_dir():
            with _exit_on_sigterm(), self._unfinished() as unfinished:
                write(unfinished)
                follow_umask(unfinished)
                try:
                    unfinished.rename(folder)
                except OSError:  # another process was faster
                    if not folder.is_dir():
                        raise
                    shutil.rmtree(unfinished)
        return folder

    def discard(self, key: str) -> None:
        """Removes an entry that its reader found damaged, e.g. by a power cut."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Gives a folder that stays until this process exits; an exception inside the block removes it at once."""
        with _exit_on_sigterm(), self._unfinished() as folder:
            yield folder
        atexit.register(_remove_own, folder, os.getpid())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Gives a folder that is removed at the end of the block."""
        with _exit_on_sigterm(), self._unfinished() as folder:
            yield folder
            _remove_own(folder, os.getpid())

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        owner, folder = os.getpid(), None
        prefix = "~".join([UNFINISHED, socket.gethostname(), str(owner), ""])
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
            yield folder
        except BaseException as error:
            if folder is not None:
                _remove_own(folder, owner)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _unwritable(self.root, error) from error
            raise


def _unwritable(root: Path, error: OSError) -> ResourceError:
    reason = error.strerror or str(error)
    return ResourceError(
        f"data.cache_dir={root}: cannot be written ({reason}); choose another with data.cache_dir=FOLDER"
    )


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{UNFINISHED}~*"):
        _, host, pid, _ = folder.name.split("~")
        if host == socket.gethostname() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child runs its parent's exit functions too
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns a SIGTERM that nobody handles, which would end the process on the spot, into SystemExit."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def leave(number: int, _: object) -> None:
        if os.getpid() != owner:  # a forked worker must not clean up after its parent
            os._exit(128 + number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
