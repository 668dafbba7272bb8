"""The folder that a board shows, and the check that nothing outside it is read: no `..`, no link that leads out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 5
"""How deep below the folder a run may lie."""
RUN_FILES = ("status.json", "result.json", "evaluate.json", "predict.json")
"""A folder with one of these may be that of a run; what lies below it is the run's."""
SWEEP_FILE = "sweep.json"
READ = (
    *(*RUN_FILES, SWEEP_FILE, "progress.json", "manifest.json", "config.yaml", "history.json", "baseline.json"),
    *("predictions.jsonl", "base_predictions.jsonl", "examples.jsonl", "checkpoints", ".lock"),
)
"""What is read of the folders of runs and sweeps."""


@dataclass(frozen=True)
class ServedFolder:
    """A folder whose contents may be shown; `root` has no links in it."""

    root: Path

    def find(self, relative: str) -> Path | None:
        """Returns what lies at a path below the folder; None for a path that leads out or to a hidden file."""
        parts = relative.split("/")
        if "\x00" in relative or "\\" in relative or any(part.startswith(".") or not part for part in parts):
            return None
        return self._inside(self.root.joinpath(*parts))

    def find_run(self, relative: str) -> Path | None:
        """Returns the folder of a run; None: there is none, or it or what would be read of it leads out."""
        folder = self.find(relative)
        return folder if folder is not None and folder.is_dir() and self._is_readable(folder) else None

    def folders(self) -> tuple[list[Path], list[Path]]:
        """Returns the folders of runs, and those of sweeps."""
        runs, sweeps = list[Path](), list[Path]()
        for folder, names in self._walk(self.root, MAX_DEPTH):
            if SWEEP_FILE in names and self._is_readable(folder):
                sweeps.append(folder)
            if names.intersection(RUN_FILES) and folder != self.root and self._is_readable(folder):
                runs.append(folder)
        return runs, sweeps

    def _walk(self, folder: Path, depth: int) -> Iterator[tuple[Path, set[str]]]:
        """Yields folders with the names in them, without those below a run."""
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # of another owner, or removed just now
            return
        names = {entry.name for entry in listed}
        yield folder, names
        if depth == 0 or (names.intersection(RUN_FILES) and SWEEP_FILE not in names):
            return
        for entry in listed:
            if not entry.name.startswith(".") and not entry.is_symlink() and entry.is_dir():
                yield from self._walk(Path(entry.path), depth - 1)

    def _inside(self, path: Path) -> Path | None:
        try:
            actual = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # missing, a loop of links, or no path at all
            return None
        return actual if actual.is_relative_to(self.root) else None

    def _is_readable(self, folder: Path) -> bool:
        """Returns whether no file that is read of a run is a link that leads out."""
        links = [folder / name for name in READ if (folder / name).is_symlink()]
        checkpoints = folder / "checkpoints"
        if checkpoints.is_dir() and not checkpoints.is_symlink():
            links += [path for path in checkpoints.glob("*") if path.is_symlink()]
            links += [path for path in checkpoints.glob("*/trainer_state.json") if path.is_symlink()]
        return all(self._inside(path) is not None for path in links)
