"""A sweep as a whole in wandb: a run beside those of the jobs, with the table, a chart and the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.schema import TrackingBackend, TrackingConfig
from qlora.errors import UserError
from qlora.runtime.console import printable, say
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import Status
from qlora.sweep.leaderboard import Leaderboard, build_leaderboard
from qlora.sweep.overview import Sweep, read_sweep
from qlora.training.trackers.base import Sent, TrackedRun

REPORT_FILE, CHART_FILE = "report.html", "parallel.png"
JOB_TYPE, LEADERBOARD = "sweep", "leaderboard"


def track_sweep(sweep: Sweep, tracking: TrackingConfig) -> None:
    """Writes the run that shows the sweep, or brings it up to date, with `tracking=wandb` and `tracking=mlflow`.

    A tracker that cannot be reached costs a line on the screen only: the jobs are done.
    """
    if tracking.in_use is TrackingBackend.mlflow and sweep.with_status(Status.finished):
        _track_in_mlflow(sweep, tracking)
    if tracking.in_use is not TrackingBackend.wandb:
        return
    from qlora.training.trackers.wandb import WandbTracker, wandb_mode

    finished = len(sweep.with_status(Status.finished))
    if not Sent(sweep.folder, WandbTracker.backend).has(LEADERBOARD, finished):
        board = build_leaderboard(sweep)
        try:
            tracker = WandbTracker(tracking, summary_run(sweep))
            tracker.log(shown(tracker.wandb, sweep, board), finished)
            tracker.finish("finished", facts(sweep, board))
        except UserError as error:
            say(Text(printable(f"the sweep as a whole is not tracked: {error}"), style="yellow"))
            return
        if tracker.url:
            say(f"wandb        {tracker.url}")
    if wandb_mode(tracking) == "offline":
        say(f"sync         {sync_command(sweep.folder)}")


def _track_in_mlflow(sweep: Sweep, tracking: TrackingConfig) -> None:
    """Ends the run that holds those of the jobs, with the table and the page among its artifacts."""
    from qlora.training.trackers.mlflow import MlflowTracker

    try:
        tracker = MlflowTracker(tracking, summary_run(sweep))
    except UserError as error:
        say(Text(printable(f"the sweep as a whole is not tracked: {error}"), style="yellow"))
        return
    files = [sweep.folder / name for name in ("leaderboard.md", "leaderboard.csv", REPORT_FILE)]
    tracker.log_sweep(facts(sweep, build_leaderboard(sweep)), [file for file in files if file.is_file()])


def track_other_engine(folder: Path, choices: Mapping[str, Any], tracking: TrackingConfig) -> None:
    """Tracks the sweep of a folder, if its jobs ran by an engine that knows nothing of sweeps.

    `choices` are the options that were chosen for Hydra's groups.
    """
    sweep = read_sweep(folder)
    if sweep.jobs and choices["hydra/launcher"] != "processes" and choices["hydra/sweeper"] != "optuna":
        track_sweep(sweep, tracking)


def summary_run(sweep: Sweep) -> TrackedRun:
    """Returns what the tracker is told of the sweep; its id is kept in the sweep's folder."""
    name = sweep.folder.name
    config = {"objective": sweep.objective, "varied": sweep.varied, "common": sweep.common}
    return TrackedRun(name, sweep.folder, config, SweepJob(name, []), job_type=JOB_TYPE)


def shown(wandb: Any, sweep: Sweep, board: Leaderboard) -> dict[str, Any]:
    """Returns what the run shows: the leaderboard, the other jobs, a chart of both, and the page `report.html`."""
    media: dict[str, Any] = {}
    head, lines = typed_table(board)
    if lines:
        media[LEADERBOARD] = wandb.Table(columns=head, data=lines)
    if len(lines) > 1 and board.objective in head:
        from qlora.reporting.parallel_axes import plot_parallel  # matplotlib takes its time

        names = [*board.keys, board.objective]
        columns = {name: [line[head.index(name)] for line in lines] for name in names}
        plot_parallel(columns, picture := sweep.folder / CHART_FILE, maximizes=board.maximizes)
        media["parallel_coordinates"] = wandb.Image(str(picture))
    if board.unfinished:
        others = [[" ".join(job.overrides), job.status.value, job.reason or "", job.name] for job in board.unfinished]
        media["unfinished"] = wandb.Table(columns=["overrides", "status", "reason", "job"], data=others)
    if (page := sweep.folder / REPORT_FILE).is_file():
        media["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    return media


def typed_table(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """Returns head and lines of the leaderboard, numbers as numbers; a column has values of one type."""
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


def facts(sweep: Sweep, board: Leaderboard) -> dict[str, Any]:
    """Returns the numbers of the sweep: how many jobs ended how, and the best of them."""
    found: dict[str, Any] = {f"jobs/{status.value}": len(sweep.with_status(status)) for status in Status}
    if board.rows and board.objective in board.rows[0].metrics:
        found[f"best/{board.objective}"] = board.rows[0].metrics[board.objective][0]
        found["best/overrides"] = " ".join(board.rows[0].best.overrides)
    return found


def sync_command(folder: Path) -> str:
    """Returns the command that sends the offline runs of a sweep's folder, those of its jobs and of itself.

    Starts of a job that was interrupted are runs of one id; with `WANDB_RESUME` each is added to those before, without
    it the last one replaces them.
    """
    place = shlex.quote(str(folder))
    return f"WANDB_RESUME=allow wandb sync {place}/wandb/offline-run-* {place}/*/wandb/offline-run-*"
