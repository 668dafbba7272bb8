"""The runs and sweeps of a folder as the board's table shows them; what has not changed is not read again."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.board.served_folder import ServedFolder
from qlora.config.saved_config import flatten, read_config
from qlora.errors import DamagedFile, describe_fault
from qlora.reporting.rendering import plain_value
from qlora.runtime.saved_run import RESULTS, STATUS_FILE, Status, json_number, read_manifest, read_status
from qlora.sweep.jobs import Job, read_job
from qlora.sweep.measured_runs import adapter_name
from qlora.sweep.sweep_folder import OVERVIEW_FILE, read_overview
from qlora.sweep.verdict_table import recorded_verdicts

FRESH_SECONDS = 1.0
"""The list is made again at most this often, however many pages ask for it."""
STAMPED = (STATUS_FILE, "progress.json", "manifest.json", "report.html", *RESULTS)
"""The files whose time and size say that a run has changed."""
SHOWN_KEYS = ("model.name", "data.name", "lora.r", "trainer.learning_rate", "trainer.max_steps", "seed")
"""Keys of the config that are columns of the table."""


class RunList:
    """The list of runs, made when it is asked for; several threads may ask at once."""

    def __init__(self, folder: ServedFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._rows: dict[Path, tuple[Any, dict[str, Any]]] = {}
        self._said: dict[Path, tuple[Any, list[str]]] = {}
        self._made, self._list = 0.0, dict[str, Any]()

    def read(self) -> dict[str, Any]:
        """Returns the runs and the sweeps, the newest first."""
        with self._lock:
            if not self._list or time.monotonic() - self._made > FRESH_SECONDS:
                self._list, self._made = self._make(), time.monotonic()
            return self._list

    def _make(self) -> dict[str, Any]:
        runs, sweeps = self.folder.folders()
        of_sweep = {folder: self._name(folder) for folder in sweeps}
        rows, kept = list[dict[str, Any]](), dict[Path, tuple[Any, dict[str, Any]]]()
        for folder in runs:
            stamp = _stamp(folder)
            previous = self._rows.get(folder)
            # The process of a run that is at work may end without a word.
            if previous is None or previous[0] != stamp or previous[1].get("status") == Status.running.value:
                previous = stamp, _row(folder)
            kept[folder] = previous
            if row := previous[1]:
                sweep = of_sweep.get(folder.parent)
                rows.append({"path": self._name(folder), "sweep": sweep, **row})
        self._rows = kept
        counts = {name: sum(row["sweep"] == name for row in rows) for name in of_sweep.values()}
        return {
            "root": str(self.folder.root),
            "keys": list(SHOWN_KEYS),
            "runs": sorted(rows, key=lambda row: -(row["started"] or 0)),
            "sweeps": [
                {"path": name, "runs": counts[name], "page": (folder / "report.html").is_file()}
                | ({"verdicts": texts} if (texts := self._verdicts(folder)) else {})
                for folder, name in of_sweep.items()
            ],
        }

    def _verdicts(self, folder: Path) -> list[str]:
        """Returns what a sweep says about the question that it answers; its overview is read when it has changed."""
        try:
            stamp = _file_stamp(folder / OVERVIEW_FILE)
            if self._said.get(folder, (None, []))[0] != stamp:
                self._said[folder] = stamp, recorded_verdicts(read_overview(folder / OVERVIEW_FILE))
            return self._said[folder][1]
        except (DamagedFile, OSError):
            return []

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.folder.root).as_posix()


def _stamp(folder: Path) -> list[tuple[int, int] | None]:
    stamp = list[tuple[int, int] | None]()
    for name in STAMPED:
        try:
            stamp.append(_file_stamp(folder / name))
        except OSError:
            stamp.append(None)
    return stamp


def _file_stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _row(folder: Path) -> dict[str, Any]:
    """Returns what the table shows of a run; {}: the folder is not that of a run that trains, measures or answers."""
    try:
        job = read_job(folder)
        status = _intact(read_status, folder / STATUS_FILE) or {}
        manifest = _intact(read_manifest, folder / "manifest.json") or {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # one run must not hide the others
        reason = f"its files cannot be read ({describe_fault(error)})"
        job, status, manifest = Job(folder, status=Status.failed, reason=reason), {}, {}
    if status and status.get("result") not in RESULTS:
        return {}
    task = str(status.get("result") or "result.json").removesuffix(".json").replace("result", "train")
    saved = manifest.get("config") if task == "train" else _intact(read_config, folder / "config.yaml")
    config = dict(flatten(saved or {}))
    return {
        "name": folder.name,
        "task": task,
        "of": adapter_name(config.get("adapter")) if task != "train" and config else None,
        "status": job.status.value,
        "reason": job.reason,
        "overrides": job.overrides,
        "step": json_number(job.progress.get("step")),
        "steps": json_number(job.progress.get("max_steps")),
        "left": json_number(job.progress.get("seconds_left")),
        "loss": json_number(job.progress.get("loss")),
        "metrics": {name: json_number(value) for name, value in job.metrics.items()},
        "objective": json_number(job.objective),
        "seconds": json_number(job.seconds),
        "started": _started(status, folder),
        "config": {key: plain_value(config[key]) for key in SHOWN_KEYS if key in config},
        "page": (folder / "report.html").is_file(),
    }


def _started(status: Mapping[str, Any], folder: Path) -> float:
    """Returns when a run began, in seconds since 1970; of a run without a record, when its folder changed last."""
    started = status.get("started")
    if isinstance(started, int | float) and not isinstance(started, bool):
        return float(started)
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _intact(read: Any, path: Path) -> Any:
    try:
        return read(path)
    except DamagedFile:
        return None
