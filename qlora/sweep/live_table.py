"""Shows a running sweep: one bar for each job on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.text import Text

from qlora.errors import UserError
from qlora.reporting.rendering import short_value
from qlora.runtime.console import printable, progress, record, say, screen
from qlora.runtime.folder_lock import in_turn
from qlora.runtime.saved_run import cost
from qlora.sweep.job_processes import tail
from qlora.sweep.jobs import Job, Status
from qlora.sweep.leaderboard import build_leaderboard, describe, print_leaderboard, short_names, write_leaderboard
from qlora.sweep.sweep_folder import Sweep
from qlora.sweep.sweep_page import FILE, PAGE_FRACTION, write_report
from qlora.text import format_duration, format_metric, format_speed, shorten

log = logging.getLogger(__name__)

TABLES_FRACTION = 0.05
"""At most this fraction of the time is spent on writing the overview and the table."""

NOTE, LABEL = 38, 40
"""Characters of a running job's numbers, and the most for its label."""
BESIDE = 19
"""Characters of the bar and of the count on a line."""
MIN_LABEL = 12
"""The least characters for the best job's label; with less room it is left out."""


def label(job: Job, room: int) -> str:
    """Returns the varied keys and values of a job in at most `room` characters; the values alone if keys do not fit."""
    names = short_names(list(job.values))
    values = {names[key]: short_value(value) for key, value in job.values.items()}
    text = " ".join(f"{name}={value}" for name, value in values.items()) or job.name
    if values and len(text) > room:
        width = max(room // len(values) - 1, 6)
        text = " ".join(shorten(value, width) for value in values.values())
    return shorten(text, room)


def rooms(width: int) -> tuple[int, int]:
    """Returns the characters of a terminal line for the label and for the notes."""
    for_label = max(min(width - BESIDE - NOTE, LABEL), 10)
    return for_label, max(width - BESIDE - for_label, NOTE)


def describe_waiting(sweep: Sweep, waiting: int, *, is_known: bool = True) -> str:
    """Returns how many jobs of a sweep are to run; unless `is_known`, some of them may turn out to be finished."""
    known, noun = len(sweep.with_status(Status.finished)), "job" if waiting == 1 else "jobs"
    most = "" if is_known or not known else "up to "
    return f"sweep {sweep.folder}: {most}{waiting:,} {noun} to run, {known:,} finished already"


class Upkeep:
    """A file that is rewritten after changes, in no more than a `fraction` of the time."""

    def __init__(self, write: Callable[[], object], fraction: float, *, is_due: bool = True) -> None:
        self._write, self._fraction, self._is_stale, self._next = write, fraction, is_due, 0.0

    def changed(self) -> None:
        """Writes the file now or soon."""
        self._is_stale = True
        self.poll()

    def poll(self) -> None:
        """Writes the file if it is stale and the fraction of time allows it."""
        if self._is_stale and time.monotonic() >= self._next:
            self.finish()

    def finish(self) -> None:
        """Writes the file if it is stale."""
        if self._is_stale:
            started = time.monotonic()
            self._write()
            now = time.monotonic()
            self._is_stale, self._next = False, now + (now - started) / self._fraction


class Screen:
    """Prints starts, steps and ends of jobs, and keeps the sweep's files up to date."""

    def __init__(self, sweep: Sweep, waiting: int, *, is_known: bool = True) -> None:
        self.sweep, self.waiting_jobs, self._is_known = sweep, waiting, is_known
        is_due = sweep.has_changed or not (sweep.folder / FILE).is_file()
        self._tables = Upkeep(self._write_tables, TABLES_FRACTION, is_due=is_due)
        self._page = Upkeep(self._write_page, PAGE_FRACTION, is_due=is_due)
        self._bars: dict[str, tuple[contextlib.ExitStack, Any]] = {}
        self._all = contextlib.ExitStack()
        self._begun: dict[str, float] = {}
        self._durations: list[float] = []
        self._done = 0

    def __enter__(self) -> Self:
        say(describe_waiting(self.sweep, self.waiting_jobs, is_known=self._is_known))
        self._update = self._all.enter_context(progress("sweep", self.waiting_jobs))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stack, _ in self._bars.values():
            stack.close()
        self._all.close()
        self._tables.finish()
        self._page.finish()

    def _write_tables(self) -> None:
        with in_turn(self.sweep.folder):
            self.sweep.write()
            write_leaderboard(self.sweep)

    def _write_page(self) -> None:
        try:
            write_report(self.sweep)
        except UserError:
            raise
        except Exception:  # the running jobs matter more than the page
            log.exception("%s cannot be written", self.sweep.folder / "report.html")

    @property
    def done(self) -> int:
        """How many jobs have ended."""
        return self._done

    def expect(self, count: int) -> None:
        """Sets how many jobs are still to end; a search learns this while it runs."""
        self.waiting_jobs = self._done + count

    def started(self, job: Job) -> None:
        """Shows that a job has started."""
        job.status = Status.running
        self.sweep.jobs[job.name] = job
        self._tables.changed()
        record(f"started {job.name}")
        stack = contextlib.ExitStack()
        bar = stack.enter_context(progress(label(job, rooms(screen().width)[0]), None))
        bar(0, note="starting")
        self._bars[job.name], self._begun[job.name] = (stack, bar), time.monotonic()

    def waiting(self, jobs: list[Job]) -> None:
        """Moves the bars of the running jobs, and removes the bar of a job that is queued again."""
        for job in jobs:
            if job.status is Status.queued and job.reason is not None and job.name in self._bars:
                self._close(job)
        running = [job for job in jobs if job.name in self._bars]
        for job in running:
            steps = job.progress
            if steps:
                notes = [f"loss {format_metric('loss', steps['loss'])}"] if steps.get("loss") is not None else []
                if steps.get("tokens_per_second"):
                    notes.append(f"{format_speed(steps['tokens_per_second'])} tokens/s")
                if steps.get("seconds_left"):
                    notes.append(f"{format_duration(steps['seconds_left'])} left")
                self._bars[job.name][1](steps["step"], note="  ".join(notes), total=steps["max_steps"])
        self._update(self._done, note=self._standing(running), total=self.waiting_jobs)
        self._tables.poll()
        self._page.poll()

    def _close(self, job: Job) -> None:
        stack, _ = self._bars.pop(job.name)
        stack.close()
        if job.status is Status.queued:
            self.sweep.jobs[job.name] = job
            self._tables.changed()

    def ended(self, job: Job) -> None:
        """Prints how a job ended, and updates the files."""
        self._close(job)
        self._done += 1
        if job.seconds is not None and job.status is Status.finished:
            self._durations.append(job.seconds)
        self.sweep.jobs[job.name] = job
        self._tables.changed()
        self._page.changed()
        count = f"{self._done}/{self.waiting_jobs}"
        if job.status is Status.finished:
            value = "" if job.objective is None else f"  {self.sweep.objective} {self._objective(job.objective)}"
            say(f"{count}  {' '.join(job.overrides) or job.name}{value}  ({format_duration(job.seconds or 0)})")
            return
        say(Text(printable(f"{count}  {describe(job)}"), style="red" if job.status is Status.failed else "yellow"))
        if job.status is Status.failed:
            for line in (line for line in tail(job.folder) if line != f"error: {job.reason}"):  # printed already
                say(Text(printable(f"      {line}"), style="dim"))

    def _standing(self, running: list[Job]) -> str:
        failed = len(self.sweep.with_status(Status.failed))
        notes = [f"{failed} failed"] if failed else []
        if (left := self._seconds_left(running)) is not None:
            notes.append(f"{format_duration(left)} left")
        finished = [job for job in self.sweep.with_status(Status.finished) if job.objective is not None]
        if finished:
            best = min(finished, key=lambda job: cost(job.objective, maximizes=self.sweep.maximizes))
            assert best.objective is not None, "jobs without an objective are left out"
            notes.append(f"best {self._objective(best.objective)}")
            room = rooms(screen().width)[1] - len("  ".join(notes)) - 1
            notes[-1] += f" {label(best, room)}" if room >= MIN_LABEL else ""
        return "  ".join(notes)

    def _seconds_left(self, running: list[Job]) -> float | None:
        """Estimates the remaining time from the jobs that have ended and the progress of those that run."""
        now = time.monotonic()
        ages = {job.name: now - self._begun[job.name] for job in running}
        known = {job.name: job.progress["seconds_left"] for job in running if job.progress.get("seconds_left")}
        durations = [*self._durations, *(ages[name] + left for name, left in known.items())]
        if not durations or not running:
            return None
        mean = statistics.fmean(durations)
        begun = sum(known.get(name, max(mean - age, 0.0)) for name, age in ages.items())
        return (begun + (self.waiting_jobs - self._done - len(running)) * mean) / len(running)

    def _objective(self, value: float) -> str:
        return format_metric((self.sweep.objective or "").removeprefix("eval_"), value)

    def summary(self) -> None:
        """Prints the table and the jobs that did not finish."""
        print_leaderboard(build_leaderboard(self.sweep))
        say(f"leaderboard  {self.sweep.folder / 'leaderboard.md'}")
        say(f"report       {self.sweep.folder / 'report.html'}")
