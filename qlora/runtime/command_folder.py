"""The folder that a command starts in: no other run has it, and it is restored if the command is refused."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

from qlora.config.compose import START_VARIABLE
from qlora.errors import ResourceError, RunError
from qlora.runtime.folder_lock import is_locked

AT_START = (".hydra", "train.log", ".lock", "status.json", "config.yaml", "multirun.yaml", "study.db")
"""What is in a folder before its run has begun: written by Hydra, the log, and the checks."""
LARGEST = 2**20
"""Bytes of a file that is kept in memory; larger ones, such as a study's database, are only removed where new."""


class Start:
    """A command's folder as it was when the command started."""

    def __init__(self, folder: Path, *, is_sweep: bool) -> None:
        self.folder, self.is_sweep = folder.absolute(), is_sweep
        parents = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.created = parents[-1] if parents else None
        self.sizes = {path: path.stat().st_size for path in self._files_at_start()}
        self.contents = {path: path.read_bytes() for path, size in self.sizes.items() if size < LARGEST}
        self.state = self._state()

    def restore(self) -> None:
        """Leaves the folder as it was, or none where there was none.

        Nothing is done where the run has begun to write, or where the folder is that of another process.
        """
        if is_locked(self.folder) or self._state() != self.state:
            return
        for path in self._files_at_start():
            if path not in self.sizes:
                path.unlink()
            elif path.name == "train.log":
                os.truncate(path, self.sizes[path])
            elif path in self.contents and path.read_bytes() != self.contents[path]:
                path.write_bytes(self.contents[path])
        hydra = self.folder / ".hydra"
        if hydra.is_dir() and not any(hydra.iterdir()):
            hydra.rmdir()
        if self.created is not None and self.created.is_dir() and not _holds_files(self.created):
            shutil.rmtree(self.created)

    def _files_at_start(self) -> list[Path]:
        entries = [self.folder / name for name in AT_START]
        paths = [inner for path in entries for inner in (path.iterdir() if path.is_dir() else [path])]
        return [path for path in paths if path.is_file()]

    def _state(self) -> dict[Path, tuple[int, int]]:
        """Returns sizes and times of what else is in the folder, and right below it: a sweep has many jobs."""
        others = [path for path in self.folder.glob("*") if path.name not in AT_START]
        if not self.is_sweep:
            others += [inner for path in others if path.is_dir() for inner in path.glob("*")]
        state = {}
        for path in others:
            with contextlib.suppress(FileNotFoundError):  # of another process, which removes it
                metadata = path.lstat()
                state[path] = metadata.st_size, metadata.st_mtime_ns
        return state


def _holds_files(folder: Path) -> bool:
    return any(not path.is_dir() or path.is_symlink() for path in folder.rglob("*"))


def check_links(folder: Path) -> None:
    """Raises `RunError` where something in a run's folder is a link out of it, by which the run would write there.

    The folders of a sweep's jobs are looked at by the jobs.
    """
    try:
        paths = [path for pattern in ("*", ".hydra/*", "checkpoints/*", "adapter/*") for path in folder.glob(pattern)]
    except OSError:
        return  # said when the command makes the folder
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(
                f"{path} is a link to {path.resolve()}, and a run writes into its own folder alone; remove the link, "
                "or choose another folder for the run"
            )


def start_in(folder: Path, *, is_sweep: bool = False) -> Start:
    """Returns the start of a command in a folder, which exists then; raises a `UserError` where none can be."""
    try:
        start = Start(folder, is_sweep=is_sweep)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
        raise ResourceError(
            f"the run folder {folder} cannot be written ({error.strerror}); choose another folder with {key}=FOLDER"
        ) from error
    return start


def start_anew(folder: Path) -> Start:
    """Returns the start of a command in a folder that `make_new` makes; `START_VARIABLE` holds its name then."""
    start = make_new(folder)
    os.environ[START_VARIABLE] = start.folder.name
    return start


def make_new(folder: Path) -> Start:
    """Returns the start of a command in a new folder, named by the time; one that is there already is another's."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            start = Start(path, is_sweep=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            continue
        except OSError:
            return start_in(path)  # which says why it cannot be
        return start
    raise AssertionError("the numbers have no end")
