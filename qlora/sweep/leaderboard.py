"""The table of a sweep: best first, seeds averaged, failed jobs below with their reasons."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora.console import printable, say, screen
from qlora.folder import write_text
from qlora.sweep.jobs import Job, Status
from qlora.sweep.overview import Sweep
from qlora.sweep.processes import tail
from qlora.wording import format_duration, format_metric

SEED = "seed"
BESIDE = ("eval_loss", "eval_exact_match", "train_runtime", "peak_memory_gb")
"""Metrics that stand beside the objective, where the jobs have them."""


@dataclass(frozen=True)
class Row:
    """Jobs that differ by their seed only."""

    values: dict[str, str]
    """The varied keys but the seed."""
    jobs: list[Job]
    metrics: dict[str, tuple[float, float | None]]
    """Means over the seeds with their standard errors; None: a single seed."""

    @property
    def best(self) -> Job:
        """The job of the first seed, to copy a command from."""
        return self.jobs[0]


@dataclass(frozen=True)
class Leaderboard:
    """The finished jobs of a sweep in order, and the others."""

    objective: str | None
    maximizes: bool
    """Whether a larger objective is the better one."""
    keys: list[str]
    """The varied keys, in columns."""
    rows: list[Row]
    unfinished: list[Job]

    @property
    def metrics(self) -> list[str]:
        """The metrics in columns: the objective first."""
        names = [*([self.objective] if self.objective else []), *BESIDE]
        return [name for name in dict.fromkeys(names) if any(name in row.metrics for row in self.rows)]


def build_leaderboard(sweep: Sweep) -> Leaderboard:
    """Returns the table of what has finished so far."""
    finished = sweep.with_status(Status.finished)
    several_seeds = len({job.values.get(SEED) for job in finished}) > 1
    keys = [key for key in sweep.varied if key != SEED or not several_seeds]
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in finished:
        groups.setdefault(tuple(job.values.get(key, "") for key in keys), []).append(job)
    rows = [Row(dict(zip(keys, values, strict=True)), jobs, _means(jobs)) for values, jobs in groups.items()]
    return Leaderboard(
        sweep.objective,
        sweep.maximizes,
        keys,
        sorted(rows, key=lambda row: _rank(row, sweep)),
        [job for job in sweep.jobs.values() if job.status is not Status.finished],
    )


def write_leaderboard(sweep: Sweep) -> Leaderboard:
    """Writes the table as Markdown and as CSV into the sweep's folder."""
    board = build_leaderboard(sweep)
    write_text(sweep.folder / "leaderboard.md", to_markdown(board, sweep.folder.name))
    write_text(sweep.folder / "leaderboard.csv", to_csv(board))
    return board


def _means(jobs: Sequence[Job]) -> dict[str, tuple[float, float | None]]:
    names = dict.fromkeys(name for job in jobs for name in job.metrics)
    found = {}
    for name in names:
        values = [float(job.metrics[name]) for job in jobs if name in job.metrics]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[name] = (statistics.fmean(values), error)
    return found


def _rank(row: Row, sweep: Sweep) -> float:
    value = row.metrics.get(sweep.objective or "", (math.nan, None))[0]
    if math.isnan(value):
        return math.inf
    return -value if sweep.maximizes else value


def cell(row: Row, name: str) -> str:
    """Returns a metric of a row for people: `0.031 ± 0.004`."""
    if name not in row.metrics:
        return "–"
    value, error = row.metrics[name]
    shown = format_duration(value) if name.endswith("_runtime") else format_metric(name, value)
    if error is None:
        return shown
    spread = format_duration(error) if name.endswith("_runtime") else format_metric(name, error).removesuffix(" %")
    return f"{shown} ± {spread}"


def table(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Returns head and lines of the table of finished jobs."""
    several = any(len(row.jobs) > 1 for row in board.rows)
    head = ["", *board.keys, *(["seeds"] if several else []), *board.metrics]
    lines = [
        [
            str(place),
            *row.values.values(),
            *([str(len(row.jobs))] if several else []),
            *(cell(row, name) for name in board.metrics),
        ]
        for place, row in enumerate(board.rows, start=1)
    ]
    return head, lines


def describe(job: Job) -> str:
    """Returns what became of an unfinished job in one line."""
    return f"{' '.join(job.overrides) or job.name}: {job.status.value}" + (f", {job.reason}" if job.reason else "")


def print_leaderboard(board: Leaderboard) -> None:
    """Prints the table, and what did not finish."""
    head, lines = table(board)
    say()
    if lines:
        shown = Table(*(text.removeprefix("eval_") for text in head), box=None, header_style="dim", pad_edge=False)
        for line in lines:
            shown.add_row(*(Text(printable(text)) for text in line))
        screen().print(shown, soft_wrap=True)
    for job in board.unfinished:
        say(Text(printable(f"  {describe(job)}"), style="red" if job.status is Status.failed else "yellow"))
    say()


def to_markdown(board: Leaderboard, name: str) -> str:
    """Returns the table as Markdown, with the last lines that failed jobs wrote."""
    head, lines = table(board)
    parts = [f"# {name}"]
    if lines:
        rows = [head, ["---"] * len(head), *lines]
        parts.append("\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in rows))
        better = "higher" if board.maximizes else "lower"
        parts.append(f"By `{board.objective}`, {better} is better; ± is the standard error over seeds.")
    for job in board.unfinished:
        parts.append(f"- {describe(job)} (`{job.name}`)")
        if job.status is Status.failed and (last := tail(job.folder)):
            parts.append("```\n" + "\n".join(last) + "\n```")
    return "\n\n".join(parts) + "\n"


def to_csv(board: Leaderboard) -> str:
    """Returns every job in a line: its values, status and all metrics."""
    jobs = [*(job for row in board.rows for job in row.jobs), *board.unfinished]
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", "reason", "seconds", *names])
    for job in jobs:
        values: list[Any] = [job.values.get(key, "") for key in keys]
        facts = [job.status.value, job.reason or "", "" if job.seconds is None else round(job.seconds, 3)]
        writer.writerow([job.name, *values, *facts, *(job.metrics.get(name, "") for name in names)])
    return text.getvalue()
