"""A sweep as a whole in its tracker: a run beside those of the jobs, with the leaderboard, a chart and the page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.schema import TrackingConfig
from qlora.errors import UserError
from qlora.runtime.console import printable, say
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import Status
from qlora.sweep.leaderboard import Leaderboard, build_leaderboard
from qlora.sweep.sweep_folder import Sweep, read_sweep
from qlora.sweep.verdicts import judge
from qlora.training.trackers import tracker_class
from qlora.training.trackers.base import SweepSummary, TrackedRun

REPORT_FILE, CHART_FILE = "report.html", "parallel.png"
LEADERBOARD_FILES = ("leaderboard.md", "leaderboard.csv")
JOB_TYPE = "sweep"


def track_sweep(sweep: Sweep, tracking: TrackingConfig) -> None:
    """Creates or updates the run that shows the sweep in each tracker that has one for sweeps (wandb and MLflow).

    A tracker that cannot be reached costs a line on the screen only: the jobs are done.
    """
    for single in tracking.trackers:
        try:
            lines = tracker_class(single).log_sweep(single, summary_run(sweep), summarize(sweep))
        except UserError as error:
            say(Text(printable(f"the sweep as a whole is not tracked: {error}"), style="yellow"))
            continue
        for label, text in lines:
            say(f"{label:<12} {text}")


def track_other_engine(folder: Path, choices: Mapping[str, Any], tracking: TrackingConfig) -> None:
    """Tracks the sweep of a folder, if a launcher that knows nothing of sweeps ran its jobs.

    `choices` are the options that were chosen for Hydra's groups.
    """
    sweep = read_sweep(folder)
    if sweep.jobs and choices["hydra/launcher"] != "processes" and choices["hydra/sweeper"] != "optuna":
        track_sweep(sweep, tracking)


def summary_run(sweep: Sweep) -> TrackedRun:
    """Returns the run of the sweep as the tracker receives it; its id is kept in the sweep's folder."""
    name = sweep.folder.name
    config = {"objective": sweep.objective, "varied": sweep.varied, "common": sweep.common}
    return TrackedRun(name, sweep.folder, config, SweepJob(name, []), job_type=JOB_TYPE)


def summarize(sweep: Sweep) -> SweepSummary:
    """Returns what the run of a sweep shows."""
    board = build_leaderboard(sweep)
    columns, rows = typed_table(board)
    page = sweep.folder / REPORT_FILE
    files = [path for path in (*(sweep.folder / name for name in LEADERBOARD_FILES), page) if path.is_file()]
    return SweepSummary(
        numbers=count_jobs(sweep, board),
        finished=len(sweep.with_status(Status.finished)),
        columns=columns,
        rows=rows,
        unfinished=[
            [" ".join(job.overrides), job.status.value, job.reason or "", job.name] for job in board.unfinished
        ],
        files=files,
        page=page if page in files else None,
        draw_chart=partial(_draw_chart, sweep, board) if len(rows) > 1 and board.objective in columns else None,
    )


def _draw_chart(sweep: Sweep, board: Leaderboard) -> Path:
    from qlora.reporting.parallel_axes import plot_parallel  # matplotlib takes long to import

    assert board.objective is not None
    head, rows = typed_table(board)
    columns = {name: [row[head.index(name)] for row in rows] for name in [*board.columns, board.objective]}
    plot_parallel(columns, path := sweep.folder / CHART_FILE, maximizes=board.maximizes)
    return path


def typed_table(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """Returns the head and the rows of the leaderboard; a column with a value that is not a number holds texts."""
    several = any(len(row.jobs) > 1 for row in board.rows)
    columns: dict[str, list[Any]] = {"place": list(range(1, len(board.rows) + 1))}
    for key in board.keys:
        texts = [row.values[key] for row in board.rows]
        numbers = [_number(text) for text in texts]
        columns[key] = texts if None in numbers else numbers
    if several:
        columns["seeds"] = [len(row.jobs) for row in board.rows]
    for name in board.metrics:
        columns[name] = [row.metrics.get(name, (None, None))[0] for row in board.rows]
        if several:
            columns[f"{name} ±"] = [row.metrics.get(name, (None, None))[1] for row in board.rows]
    columns["job"] = [row.best.name for row in board.rows]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def count_jobs(sweep: Sweep, board: Leaderboard) -> dict[str, Any]:
    """Returns how many jobs of the sweep have each status, and the best of them."""
    numbers: dict[str, Any] = {f"jobs/{status.value}": len(sweep.with_status(status)) for status in Status}
    if sweep.question is not None:
        verdicts = judge(sweep.question, sweep.jobs)
        numbers |= {f"verdict/{sweep.question.by}={item.value}": item.verdict.value for item in verdicts}
    if board.rows and board.objective in board.rows[0].metrics:
        numbers[f"best/{board.objective}"] = board.rows[0].metrics[board.objective][0]
        numbers["best/overrides"] = " ".join(board.rows[0].best.overrides)
    return numbers
