"""The page `report.html` of a sweep: what it shows, and when it is written."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlora.config import saved_config
from qlora.errors import DamagedFile
from qlora.reporting.history import curves, read_history
from qlora.reporting.rendering import short_value
from qlora.reporting.runs_page import runs_page
from qlora.reporting.runs_page_parts import RunsReport, RunView, SideBySide, TableLine
from qlora.runtime.atomic_files import write_text
from qlora.runtime.folder_lock import in_turn
from qlora.runtime.run_folder import RunFolder
from qlora.sweep.job_processes import tail
from qlora.sweep.jobs import Job, Status
from qlora.sweep.leaderboard import SEED, build_leaderboard, cell, short_names, write_leaderboard
from qlora.sweep.measured_runs import MeasuredRun, measured_table
from qlora.sweep.sweep_folder import Sweep, read_sweep

log = logging.getLogger(__name__)

FILE = "report.html"


def write_report(
    sweep: Sweep,
    *,
    title: str | None = None,
    is_sweep: bool = True,
    pair: SideBySide | None = None,
    measured: Sequence[MeasuredRun] = (),
) -> Path:
    """Writes the page of a sweep as the folders of its jobs record it, and returns its path.

    Runs that do not form a sweep are labelled with their folders, not with what varies; of two, `pair` says what
    differs. `measured` are runs that are not ranked.
    """
    path = sweep.folder / FILE
    write_text(path, runs_page(build_report(sweep, title=title, is_sweep=is_sweep, pair=pair, measured=measured)))
    return path


PAGE_FRACTION = 0.05
"""At most this fraction of the time is spent on writing the page, which takes long for a large sweep."""


def write_overview(folder: Path, objective: str | None) -> None:
    """Updates the files of a sweep from the folders of its jobs, one process at a time.

    While other jobs are still to end, the page may wait for them.
    """
    with in_turn(folder):
        sweep = read_sweep(folder, objective)
        is_last = not (sweep.with_status(Status.queued, Status.running) or sweep.to_come)
        _write_files(sweep, with_page=is_last or _is_page_due(sweep))


def refresh(sweep: Sweep) -> None:
    """Updates `sweep` from the folders of its jobs, and then its files."""
    with in_turn(sweep.folder):
        sweep.jobs |= read_sweep(sweep.folder, sweep.objective).jobs
        _write_files(sweep, with_page=True)


def _write_files(sweep: Sweep, *, with_page: bool) -> None:
    write_leaderboard(sweep)
    if with_page:
        started = time.monotonic()
        write_report(sweep)
        sweep.page_seconds = time.monotonic() - started
    sweep.write()


def _is_page_due(sweep: Sweep) -> bool:
    """Returns whether the page is old enough to be written again within its fraction of the time."""
    page = sweep.folder / FILE
    return not page.is_file() or time.time() - page.stat().st_mtime > sweep.page_seconds / PAGE_FRACTION


def build_report(
    sweep: Sweep,
    *,
    title: str | None = None,
    is_sweep: bool = True,
    pair: SideBySide | None = None,
    measured: Sequence[MeasuredRun] = (),
) -> RunsReport:
    """Returns what the page of a sweep shows."""
    board, names = build_leaderboard(sweep), short_names(sweep.varied)
    views = {
        job.folder: _view(
            sweep,
            job,
            label=" ".join(f"{names[key]}={short_value(value)}" for key, value in job.values.items())
            if is_sweep
            else name,
        )
        for name, job in sweep.jobs.items()
    }
    lines = [
        TableLine(
            row.values,
            [(cell(row, name), row.metrics[name][0] if name in row.metrics else None) for name in board.metrics],
            [
                replace(views[job.folder], short=f"seed {job.values.get(SEED, '?')}")
                if len(row.jobs) > 1
                else views[job.folder]
                for job in row.jobs
            ],
            row.in_front,
        )
        for row in board.rows
    ]
    best = board.rows[0].best.folder if board.rows else None
    return RunsReport(
        title=title or sweep.folder.name,
        over="Sweep report" if is_sweep else "Report of runs",
        objective=sweep.objective,
        maximizes=sweep.maximizes,
        keys=board.columns,
        metrics=board.metrics,
        lines=lines,
        unfinished=[views[job.folder] for job in board.unfinished],
        common=sweep.common,
        command=_command(best) if best else None,
        goals=board.goals,
        verdicts=board.verdicts,
        left_out=board.left_out,
        is_sweep=is_sweep,
        pair=pair,
        measured=measured_table(measured) if measured else None,
    )


def _view(sweep: Sweep, job: Job, *, label: str) -> RunView:
    folder = os.path.relpath(job.folder, sweep.folder)
    page = job.folder / FILE
    step = job.progress
    return RunView(
        label=label or job.name,
        folder=folder,
        status=job.status.value,
        page=f"{folder}/{FILE}" if page.is_file() else None,
        values=job.values,
        objective=job.metrics.get(sweep.objective or ""),
        metrics=job.metrics,
        seconds=job.seconds,
        curves=curves(read_history(job.folder)),
        reason=job.reason,
        progress=f"step {step['step']:,.0f} of {step['max_steps']:,.0f}" if step else None,
        log=tail(job.folder) if job.status is not Status.finished else (),
    )


def _command(folder: Path) -> str | None:
    """Returns the command that starts a run again, if its folder holds it."""
    try:
        if (overrides := saved_config.read_overrides(folder / ".hydra" / "overrides.yaml")) is not None:
            single = (
                ["hydra.mode=RUN"] if any(override.startswith(("sweep=", "sweep.")) for override in overrides) else []
            )
            return shlex.join(["qlora", *overrides, *single])
        command = (RunFolder(folder).stored_manifest() or {}).get("command")
    except DamagedFile as error:
        log.warning("%s is damaged (%s); the page does not say how to run the best one again", error.path, error.reason)
        return None
    return command if isinstance(command, str) else None
