"""`task=report`: a table and a page that compare any runs: one sweep, or several folders."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qlora.config import saved_config
from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.errors import ConfigError, DamagedFile, did_you_mean
from qlora.reporting.rendering import plain_value
from qlora.reporting.runs_page_parts import SideBySide
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import say, say_rows
from qlora.runtime.run_folder import RunFolder, flatten, is_below
from qlora.runtime.saved_run import RESULTS, STATUS_FILE, find_damage, read_result, read_status
from qlora.runtime.task_result import TaskResult
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, list_damage, name_damage, read_job, seedless
from qlora.sweep.leaderboard import print_leaderboard, write_leaderboard
from qlora.sweep.measured_runs import MeasuredRun, measured_markdown, measured_runs, print_measured_runs
from qlora.sweep.side_by_side import lay_side_by_side, print_side_by_side
from qlora.sweep.sweep_folder import OVERVIEW_FILE, Sweep, common_keys, read_sweep
from qlora.sweep.sweep_page import write_report

RESULT = "result.json"
DEFAULT_OBJECTIVE = next(item.default for item in fields(Config) if item.name == "objective")
NAMED_GROUPS = ("model", "data")
"""Groups whose other keys mostly follow from their name."""


def report(config: Config, output_dir: Path) -> TaskResult:
    """Reports on the runs that `runs=` names, in `output_dir`; returns the result that it writes there.

    Raises a `UserError` if there are none, or if none has the metric of `objective=`.
    """
    assert config.runs is not None, "Config checks it"
    patterns = [config.runs] if isinstance(config.runs, str) else config.runs
    folders = find_runs(*patterns, without=output_dir)
    RunFolder(output_dir).create()
    origin = _sweep_of(folders)
    ranked, others = _split(folders) if origin is None else (folders, [])
    sweep = collect(ranked, output_dir, config.objective)
    board = write_leaderboard(sweep)
    measured = _measured(others, folders)
    leaderboard = output_dir / "leaderboard.md"
    if measured:
        write_text(leaderboard, leaderboard.read_text(encoding="utf-8") + measured_markdown(measured))
    title = config.name or (origin.name if origin else ", ".join(patterns))
    pair = _pair(folders) if len(folders) == 2 else None
    page = write_report(sweep, title=title, is_sweep=origin is not None, pair=pair, measured=measured)
    print_leaderboard(board)
    if measured:
        print_measured_runs(measured)
    if pair is not None:
        print_side_by_side(pair)
        say()
    paths = {"report": str(page), "leaderboard": str(leaderboard)}
    say_rows([(name, short_path(path)) for name, path in paths.items()])
    jobs = [*sweep.jobs.values(), *(run.job for run in measured)]
    metrics = {"report_runs": len(jobs), "report_finished": sum(job.status is Status.finished for job in jobs)}
    more = {"side_by_side": asdict(pair)} if pair is not None else {}
    result = TaskResult("report", metrics, paths | {"table": str(output_dir / "leaderboard.csv")}, more=more)
    write_text(RunFolder(output_dir).result("report"), json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def find_runs(*patterns: str, without: Path | None = None) -> list[Path]:
    """Returns the folders of runs that globs match; a match that is not a run means the runs right below it.

    Raises `ConfigError` for a glob that matches none. `without` is left out.
    """
    excluded, matched = without.resolve() if without else None, dict[Path, None]()
    for pattern in patterns:
        matches = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]  # noqa: PTH111, PTH207
        candidates = [run for path in matches if path.is_dir()
                      for run in ([path] if _is_run(path) else _runs_below(path))]  # fmt: skip
        runs = [path for path in candidates if path.resolve() != excluded]
        if not runs:
            raise ConfigError(
                f"runs={pattern}: there is no run{_nearest(pattern)}; name folders of runs or of sweeps, e.g. "
                "runs='outputs/runs/*' or runs=outputs/sweeps/mine"
            )
        matched |= dict.fromkeys(runs)
    return list(matched)


def _pair(folders: Sequence[Path]) -> SideBySide:
    """Returns what differs between the two runs of a report."""
    return lay_side_by_side(names_of(folders), folders, [dict(flatten(_read_config(folder))) for folder in folders])


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns what runs are called: their folders, seen from the one that holds them all."""
    shared = os.path.commonpath([folder.parent.absolute() for folder in folders])
    return [os.path.relpath(folder, shared) for folder in folders]


def _split(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Returns the runs that are ranked, and those that only measured what others trained; alone they are ranked."""
    trained = [folder for folder in folders if _trains(folder)]
    if not trained:
        return list(folders), []
    return trained, [folder for folder in folders if folder not in trained]


def _trains(folder: Path) -> bool:
    """Returns whether a run trains, or nothing says what it does."""
    if (folder / RESULT).is_file():
        return True
    try:
        return (read_status(folder / STATUS_FILE) or {}).get("result") in (None, RESULT)
    except DamagedFile:
        return True


def _measured(folders: Sequence[Path], reported: Sequence[Path]) -> list[MeasuredRun]:
    """Returns the runs that only measured, called as all runs of the report are."""
    names = dict(zip(reported, names_of(reported), strict=True))
    return measured_runs(
        {names[folder]: read_run(folder) for folder in folders},
        [dict(flatten(_read_config(folder))) for folder in folders],
    )


def _is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run that trains, measures or answers, whatever its status."""
    if (folder / RESULT).is_file():
        return True
    try:
        return (read_status(folder / STATUS_FILE) or {}).get("result") in RESULTS
    except DamagedFile:
        return True


def _runs_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]


def _nearest(pattern: str) -> str:
    """Returns a suggestion for the first part of a pattern that does not exist."""
    parent = Path()
    for part in Path(pattern).expanduser().parts:
        if glob.has_magic(part):
            break
        if not (parent / part).exists():
            siblings = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
            return did_you_mean(str(parent / part), map(str, siblings))
        parent /= part
    return ""


def collect(folders: Sequence[Path], target: Path, objective: str | None) -> Sweep:
    """Returns any runs as a sweep in the folder `target`.

    The varied keys of runs of one sweep are those of the sweep; those of other runs are the keys that differ. An
    `objective` other than the default replaces that of the runs. Raises `ConfigError` if no finished run has it.
    """
    origin = _sweep_of(folders)
    jobs = [read_run(folder, in_sweep=origin is not None) for folder in folders]
    configs = [dict(flatten(_read_config(folder))) for folder in folders]
    objectives = {config["objective"] for config in configs if "objective" in config}
    chosen = objectives.pop() if objective == DEFAULT_OBJECTIVE and len(objectives) == 1 else objective
    sweep = Sweep(target, chosen, common=common_keys([config for config in configs if config] or [{}]))
    if origin is None:
        _name_differences(jobs, configs)
    else:
        saved = read_sweep(origin)
        sweep.question = saved.question
        sweep.goals = saved.goals if saved.objective == chosen else {}
    sweep.jobs = dict(zip(names_of(folders), jobs, strict=True))
    if origin is None:
        sweep.names = {str(job.folder): name for name, job in sweep.jobs.items()}
        for job, config in zip(jobs, configs, strict=True):
            job.seedless = _group(job, config)
    known = dict.fromkeys(name for job in jobs for name in job.metrics)
    if objective not in (None, DEFAULT_OBJECTIVE, *known):
        choice = f"choose one of {', '.join(known)}, or null" if known else "nothing was measured yet, so leave it out"
        raise ConfigError(
            f"objective={objective}: none of the {len(jobs)} runs has it{did_you_mean(str(objective), known)}; {choice}"
        )
    return sweep


def _sweep_of(folders: Sequence[Path]) -> Path | None:
    """Returns the folder of the sweep to which all runs belong; None: there is none."""
    parents = {folder.parent for folder in folders}
    parent = parents.pop()
    return parent if not parents and (parent / OVERVIEW_FILE).is_file() else None


def read_run(folder: Path, *, in_sweep: bool = False) -> Job:
    """Returns a run as its files record it: a run with the result of training is finished, whatever came later.

    A run with a damaged file has failed, except a job of a sweep whose result is complete.
    """
    job = read_job(folder)
    job.damaged = list(find_damage(folder))
    result = None if any(error.path.name == RESULT for error in job.damaged) else read_result(folder / RESULT)
    if result is not None:
        job.status, job.reason = Status.finished, None
        job.objective, job.metrics = result["objective"], result["metrics"]
    if job.damaged and not (in_sweep and job.status is Status.finished):
        job.status, job.reason = Status.failed, list_damage(job)
    name_damage(job)
    return job


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of a run; {} if there is none or it is damaged. A run with a damaged config has failed."""
    try:
        return saved_config.read_config(RunFolder(folder).config) or {}
    except DamagedFile:
        return {}


def _group(job: Job, config: Mapping[str, Any]) -> str:
    """Returns what is equal for runs whose means may be formed: the same but for the seed, on the same rows and base.

    A run without a config is like no other.
    """
    if not config:
        return str(job.folder)
    measured: Any = next((result["measured"] for name in RESULTS if (result := _result(job, name)) is not None
                          and isinstance(result.get("measured"), dict)), {})  # fmt: skip
    prints = [part.get("fingerprint") for name in ("base", "data") if isinstance(part := measured.get(name), dict)]
    return json.dumps([seedless(config), *prints])


def _result(job: Job, name: str) -> dict[str, Any] | None:
    return None if any(error.path.name == name for error in job.damaged) else read_result(job.folder / name)


def _name_differences(jobs: Sequence[Job], configs: Sequence[dict[str, Any]]) -> None:
    """Sets the overrides of each job to the keys of its config that differ between the jobs."""
    known = [config for config in configs if config]
    keys = [key for key in dict.fromkeys(key for config in known for key in config) if not is_below(key, UNNAMED_KEYS)]
    texts = {key: [plain_value(config.get(key, "")) for config in known] for key in keys}
    varied = [key for key in keys if len(set(texts[key])) > 1 and not _follows_from_name(key, texts)]
    for job, config in zip(jobs, configs, strict=True):
        job.overrides = [f"{key}={plain_value(config.get(key, ''))}" for key in varied] if config else []


def _follows_from_name(key: str, texts: dict[str, list[str]]) -> bool:
    """Returns whether a key of a model or a data set differs only where the names differ, which have a column."""
    name = f"{key.partition('.')[0]}.name"
    if key == name or key.partition(".")[0] not in NAMED_GROUPS or name not in texts:
        return False
    return len(set(zip(texts[name], texts[key], strict=True))) == len(set(texts[name]))
