"""The report of runs: the page `report.html` of a sweep, and `task=report`, which makes it of any runs."""

from __future__ import annotations

import glob
import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qlora.config import compose
from qlora.config.schema import Config
from qlora.errors import ConfigError, DamagedFile, did_you_mean
from qlora.reporting.history import curves, read_history
from qlora.reporting.page import plain_value, short_value
from qlora.reporting.runs_page import RunsReport, RunView, TableLine, runs_page
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import say_rows
from qlora.runtime.folder_lock import in_turn
from qlora.runtime.run_folder import RunFolder, flatten, is_below
from qlora.runtime.saved_run import RESULTS, STATUS_FILE, find_damage, read_result, read_status
from qlora.runtime.task_result import TaskResult
from qlora.sweep.job_processes import tail
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, list_damage, name_damage, read_job
from qlora.sweep.leaderboard import SEED, build_leaderboard, cell, print_leaderboard, short_names, write_leaderboard
from qlora.sweep.overview import OVERVIEW_FILE, Sweep, common_facts, read_sweep

log = logging.getLogger(__name__)

FILE = "report.html"
RESULT = "result.json"
DEFAULT_OBJECTIVE = next(item.default for item in fields(Config) if item.name == "objective")
NAMED_GROUPS = ("model", "data")
"""Their other keys mostly follow from their name."""


def write_report(sweep: Sweep, *, title: str | None = None, is_sweep: bool = True) -> Path:
    """Writes the page of a sweep as its jobs' folders tell now, and returns its path.

    Runs that are no sweep are called by their folders, not by what varies.
    """
    path = sweep.folder / FILE
    write_text(path, runs_page(build_report(sweep, title=title, is_sweep=is_sweep)))
    return path


PAGE_SHARE = 0.05
"""The page of a large sweep takes a while to write; no more than this share of the time goes to it."""


def write_overview(folder: Path, objective: str | None) -> None:
    """Brings the files of a sweep up to date from the folders of its jobs, one process after the other.

    Where other jobs are still to end, the page may wait for them.
    """
    with in_turn(folder):
        sweep = read_sweep(folder, objective)
        is_last = not (sweep.with_status(Status.queued, Status.running) or sweep.to_come)
        _write_files(sweep, with_page=is_last or _is_page_due(sweep))


def refresh(sweep: Sweep) -> None:
    """Takes into `sweep` what the folders of its jobs tell, and brings its files up to date."""
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
    """Returns whether the page is so old that to write it takes no more than its share of the time."""
    page = sweep.folder / FILE
    return not page.is_file() or time.time() - page.stat().st_mtime > sweep.page_seconds / PAGE_SHARE


def build_report(sweep: Sweep, *, title: str | None = None, is_sweep: bool = True) -> RunsReport:
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
        keys=board.keys,
        metrics=board.metrics,
        lines=lines,
        unfinished=[views[job.folder] for job in board.unfinished],
        common=sweep.common,
        command=_command(best) if best else None,
        goals=board.goals,
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
    """Returns what starts a run again, as far as its folder tells."""
    try:
        if (words := compose.read_overrides(folder / ".hydra" / "overrides.yaml")) is not None:
            single = ["hydra.mode=RUN"] if any(word.startswith("sweep=") for word in words) else []
            return shlex.join(["qlora", *words, *single])
        command = (RunFolder(folder).stored_manifest() or {}).get("command")
    except DamagedFile as error:
        log.warning("%s is damaged (%s); the page does not say how to run the best one again", error.path, error.fault)
        return None
    return command if isinstance(command, str) else None


# task=report


def report(config: Config, output_dir: Path) -> TaskResult:
    """Reports on the runs that `runs=` names, in `output_dir`; returns the result as stored there.

    Raises `ConfigError` where there are none, or where none has the metric of `objective=`.
    """
    assert config.runs is not None, "Config checks it"
    folders = find_runs(config.runs, without=output_dir)
    RunFolder(output_dir).create()
    sweep = collect(folders, output_dir, config.objective)
    board = write_leaderboard(sweep)
    origin = _sweep_of(folders)
    title = config.name or (origin.name if origin else config.runs)
    page = write_report(sweep, title=title, is_sweep=origin is not None)
    print_leaderboard(board)
    paths = {"report": str(page), "leaderboard": str(output_dir / "leaderboard.md")}
    say_rows(list(paths.items()))
    metrics = {"report_runs": len(sweep.jobs), "report_finished": len(sweep.with_status(Status.finished))}
    result = TaskResult("report", metrics, paths | {"table": str(output_dir / "leaderboard.csv")})
    write_text(RunFolder(output_dir).result("report"), json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def find_runs(pattern: str, *, without: Path | None = None) -> list[Path]:
    """Returns the folders of runs that a glob matches; a match that is no run stands for the runs right below it.

    Raises `ConfigError` where there are none. `without` is left out.
    """
    matches = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]  # noqa: PTH111, PTH207
    found = [run for path in matches if path.is_dir() for run in ([path] if _is_run(path) else _runs_below(path))]
    own = without.resolve() if without else None
    runs = [path for path in dict.fromkeys(found) if path.resolve() != own]
    if not runs:
        raise ConfigError(
            f"runs={pattern}: there is no run{_nearest(pattern)}; name folders of runs or of sweeps, e.g. "
            "runs='outputs/runs/*' or runs=outputs/sweeps/mine"
        )
    return runs


def _is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run that trains, measures or answers, whatever became of it."""
    if (folder / RESULT).is_file():
        return True
    try:
        return (read_status(folder / STATUS_FILE) or {}).get("result") in RESULTS
    except DamagedFile:
        return True


def _runs_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]


def _nearest(pattern: str) -> str:
    """Returns which folder may have been meant in place of the first part of a pattern that does not exist."""
    place = Path()
    for part in Path(pattern).expanduser().parts:
        if glob.has_magic(part):
            break
        if not (place / part).exists():
            siblings = [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
            return did_you_mean(str(place / part), map(str, siblings))
        place /= part
    return ""


def collect(folders: Sequence[Path], place: Path, objective: str | None) -> Sweep:
    """Returns runs of anywhere as a sweep in the folder `place`.

    Runs of one sweep vary as it says, others where their configs differ. `objective` is that of the runs, unless it is
    another than the default. Raises `ConfigError` where no finished run has it.
    """
    origin = _sweep_of(folders)
    jobs = [read_run(folder, in_sweep=origin is not None) for folder in folders]
    configs = [dict(flatten(_read_config(folder))) for folder in folders]
    own = {config["objective"] for config in configs if "objective" in config}
    chosen = own.pop() if objective == DEFAULT_OBJECTIVE and len(own) == 1 else objective
    sweep = Sweep(place, chosen, common=common_facts([config for config in configs if config] or [{}]))
    if origin is None:
        _name_differences(jobs, configs)
    elif (stored := read_sweep(origin)).objective == chosen:
        sweep.goals = stored.goals
    shared = os.path.commonpath([folder.parent.absolute() for folder in folders])
    sweep.jobs = {os.path.relpath(job.folder, shared): job for job in jobs}
    known = dict.fromkeys(name for job in jobs for name in job.metrics)
    if objective not in (None, DEFAULT_OBJECTIVE, *known):
        choice = f"choose one of {', '.join(known)}, or null" if known else "nothing was measured yet, so leave it out"
        raise ConfigError(
            f"objective={objective}: none of the {len(jobs)} runs has it{did_you_mean(str(objective), known)}; {choice}"
        )
    return sweep


def _sweep_of(folders: Sequence[Path]) -> Path | None:
    """Returns the folder of the sweep that all runs are of, or None."""
    parents = {folder.parent for folder in folders}
    parent = parents.pop()
    return parent if not parents and (parent / OVERVIEW_FILE).is_file() else None


def read_run(folder: Path, *, in_sweep: bool = False) -> Job:
    """Returns a run as its files tell: one with the result of a training is finished, whatever came after.

    A run with a damaged file has failed; a job of a sweep has not where its result is whole.
    """
    job = read_job(folder)
    job.damaged = list(find_damage(folder))
    stored = None if any(error.path.name == RESULT for error in job.damaged) else read_result(folder / RESULT)
    if stored is not None:
        job.status, job.reason = Status.finished, None
        job.objective, job.metrics = stored["objective"], stored["metrics"]
    if job.damaged and not (in_sweep and job.status is Status.finished):
        job.status, job.reason = Status.failed, list_damage(job)
    name_damage(job)
    return job


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of a run; {} where there is none, or a damaged one, which makes the run a failed one."""
    try:
        return compose.read_config(RunFolder(folder).config) or {}
    except DamagedFile:
        return {}


def _name_differences(jobs: Sequence[Job], configs: Sequence[dict[str, Any]]) -> None:
    """Gives each job, as its overrides, the keys of its config that are not the same in all."""
    known = [config for config in configs if config]
    keys = [key for key in dict.fromkeys(key for config in known for key in config) if not is_below(key, UNNAMED_KEYS)]
    texts = {key: [plain_value(config.get(key, "")) for config in known] for key in keys}
    varied = [key for key in keys if len(set(texts[key])) > 1 and not _follows_from_name(key, texts)]
    for job, config in zip(jobs, configs, strict=True):
        job.overrides = [f"{key}={plain_value(config.get(key, ''))}" for key in varied] if config else []


def _follows_from_name(key: str, texts: dict[str, list[str]]) -> bool:
    """Returns whether a key of a model or a data set differs only where their names differ: a column says it all."""
    name = f"{key.partition('.')[0]}.name"
    if key == name or key.partition(".")[0] not in NAMED_GROUPS or name not in texts:
        return False
    return len(set(zip(texts[name], texts[key], strict=True))) == len(set(texts[name]))
