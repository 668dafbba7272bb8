"""The base class of trackers, what it receives of a run or a sweep, and the record of what it has sent."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from qlora.config.schema import TrackingConfig
from qlora.errors import ResourceError
from qlora.runtime.atomic_files import append_line, write_text
from qlora.runtime.run_folder import flatten
from qlora.runtime.sweep_job import SweepJob

PREDICTION_COLUMNS = ("prompt", "reference", "prediction", "match")
PREDICTIONS = "predictions"

MAIN_KEYS = (
    *("model.name", "data.name", "quantization.bits", "quantization.quant_type", "lora.r", "lora.alpha"),
    *("lora.dropout", "trainer.learning_rate", "trainer.max_steps", "trainer.per_device_train_batch_size"),
    *("trainer.gradient_accumulation_steps", "seed"),
)
"""The hyperparameters of a run that belongs to no sweep."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives about a run when the run starts."""

    name: str
    folder: Path
    """The run's folder."""
    config: dict[str, Any]
    """The whole resolved config, nested."""
    sweep: SweepJob | None = None
    """The sweep that the run is a job of."""
    job_type: str | None = None
    """The kind of run, where a project has several kinds."""
    resumes: bool = True
    """Whether a later start in the folder resumes and may repeat steps; else each start is a new run."""

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The values of the config by their full keys."""
        return dict(flatten(self.config))

    @cached_property
    def varied(self) -> dict[str, Any]:
        """The keys that the sweep varies, with the run's values; empty outside a sweep."""
        return self.sweep.values(self.flat) if self.sweep is not None else {}

    @property
    def title(self) -> str:
        """The name in the tracker: the varied overrides of a job of a sweep, else the run's name."""
        return (self.sweep.label if self.sweep is not None else "") or self.name

    def group(self, config: TrackingConfig) -> str | None:
        """Returns the group: `tracking.group`, or the sweep."""
        return config.group or (self.sweep.sweep if self.sweep is not None else None)

    def tags(self, config: TrackingConfig) -> list[str]:
        """Returns `tracking.tags` and the sweep's name."""
        return list(dict.fromkeys([*config.tags, *([self.sweep.sweep] if self.sweep is not None else [])]))

    @property
    def hyperparameters(self) -> dict[str, bool | int | float | str]:
        """What the sweep varies, else the main keys, in types that tables can show."""
        chosen = self.varied or {key: self.flat[key] for key in MAIN_KEYS if key in self.flat}
        return {key: value if isinstance(value, bool | int | float | str) else str(value)
                for key, value in chosen.items() if value is not None}  # fmt: skip


@dataclass(frozen=True)
class SweepSummary:
    """What a tracker receives about a sweep as a whole."""

    numbers: dict[str, Any]
    """How many jobs ended in each status, and the best of them."""
    finished: int
    """How many jobs have finished."""
    columns: list[str]
    """The head of the leaderboard."""
    rows: list[list[Any]]
    """Its lines; a column holds values of one type."""
    unfinished: list[list[str]]
    """The overrides, status, reason and name of each other job."""
    files: list[Path]
    """The leaderboard and the page, as far as they exist."""
    page: Path | None
    """The page that shows the sweep, if it exists."""
    draw_chart: Callable[[], Path] | None
    """Draws the chart of parallel axes and returns its file; None: there is nothing to compare."""


class Tracker:
    """Where metrics go besides the run folder. A subclass overrides what its service can record."""

    url: str | None = None
    """The page that shows the run, if there is one."""

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self.config, self.run = config, run

    @classmethod
    def check_access(cls, config: TrackingConfig) -> str:
        """Returns what `task=doctor` reports; raises a `UserError` where the package or the login is missing."""
        return config.in_use

    @classmethod
    def account(cls, config: TrackingConfig) -> str | None:
        """Asks the service which account it accepts, for `task.online=true`; None: it has no accounts."""
        return None

    @classmethod
    def log_sweep(cls, config: TrackingConfig, run: TrackedRun, sweep: SweepSummary) -> list[tuple[str, str]]:
        """Shows a sweep as a whole in `run`; returns the lines to print, each a label and a text."""
        return []

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records `metrics` at an optimizer step."""

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records answers with the columns prompt, reference, prediction and match."""

    def log_adapter(self, folder: Path) -> None:
        """Stores the finished adapter if `tracking.log_adapter` is set."""

    def closing_lines(self) -> list[tuple[str, str]]:
        """Returns the lines to print when the run has ended, each a label and a text."""
        return []

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Ends the run with `status` (`finished`, or why it stopped) and its final metrics."""


class NoTracker(Tracker):
    """Records nothing."""

    def __init__(self, config: TrackingConfig | None = None, run: TrackedRun | None = None) -> None:
        pass


class Sent:
    """The rows that a run has sent to a tracker, kept in a file of its folder that outlives a killed process.

    A run that resumes from a checkpoint repeats steps; this record keeps it from sending a step twice.
    """

    def __init__(self, folder: Path, backend: str) -> None:
        self._file = folder / f"{backend}_sent.jsonl"
        self.rows: list[tuple[int, list[str]]] = []
        """The step and the names of each row."""
        self.last_start: tuple[str, int] | None = None
        """The tracker's name of the latest start of the run, and the number of rows before it."""
        for entry in _intact_lines(self._file):
            if "start" in entry:
                self.last_start = entry["start"], len(self.rows)
            else:
                self.rows.append((entry["step"], entry["names"]))
        self._steps = self._count()

    def begin(self, start: str) -> None:
        """Records a start of the run."""
        self.last_start = start, len(self.rows)
        self._append({"start": start})

    def add(self, names: Iterable[str], step: int) -> None:
        """Records a row that was sent."""
        self.rows.append((step, list(names)))
        self._append({"step": step, "names": self.rows[-1][1]})
        self._steps |= {name: max(step, self._steps.get(name, step)) for name in self.rows[-1][1]}

    def has(self, name: str, step: int) -> bool:
        """Returns whether a metric was sent at this step or at a later one."""
        return step <= self._steps.get(name, -1)

    @property
    def last_step(self) -> int:
        """The highest step of all."""
        return max(self._steps.values(), default=0)

    def keep(self, count: int) -> None:
        """Forgets all rows but the first `count`: the others never arrived."""
        if count < len(self.rows):
            self.rows, self.last_start = self.rows[:count], None
            self._steps = self._count()
            lines = [json.dumps({"step": step, "names": names}) + "\n" for step, names in self.rows]
            write_text(self._file, "".join(lines))

    def _count(self) -> dict[str, int]:
        """Returns the last step of each metric."""
        return {name: step for step, names in sorted(self.rows, key=itemgetter(0)) for name in names}

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(self._file, json.dumps(entry))


def _intact_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; a line that was cut off is skipped."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(entry := json.loads(line), dict) and _is_entry(entry):
                yield entry


def _is_entry(entry: dict[str, Any]) -> bool:
    """Returns whether `Sent` wrote this object: a start, or the step and names of a row."""
    step, sent = entry.get("step"), entry.get("names")
    is_row = isinstance(step, int) and isinstance(sent, list) and all(isinstance(name, str) for name in sent)
    return is_row or isinstance(entry.get("start"), str)


class ResumingTracker(Tracker):
    """A tracker that sends nothing twice when a run resumes; a subclass says how a row is sent."""

    backend: str
    """Its name, which the file of the rows that were sent begins with."""

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        self.sent = Sent(run.folder, self.backend)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records the metrics of an optimizer step that are not recorded yet."""
        new = {name: value for name, value in metrics.items() if self._is_new(name, step)}
        if new:
            self.send(new, step)
            self.sent.add(new, step)

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records a table of answers, unless the step has one already."""
        if self._is_new(PREDICTIONS, step):
            self.send_predictions([[str(row.get(name, "")) for name in PREDICTION_COLUMNS] for row in rows], step)
            self.sent.add([PREDICTIONS], step)

    def _is_new(self, name: str, step: int) -> bool:
        return not (self.run.resumes and self.sent.has(name, step))

    def send(self, metrics: dict[str, float], step: int) -> None:
        """Sends metrics to the service."""
        raise NotImplementedError

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Sends answers to the service, in the order of `PREDICTION_COLUMNS`."""
        raise NotImplementedError


def import_package(name: str, module: str | None = None) -> Any:
    """Returns a module of a tracker's package; raises `ResourceError` where the package is missing."""
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise ResourceError(
            f"tracking={name} needs the {name} package; pip install 'qlora[{name}]', or use tracking=none"
        ) from error
