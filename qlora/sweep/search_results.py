"""The results of a search: the file with the best trials, what is printed at its end, and which trials failed."""

from __future__ import annotations

import shlex
from typing import Any

import yaml
from optuna.trial import FrozenTrial

from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import say_rows
from qlora.sweep.launcher import JobsFailed, config_flags
from qlora.sweep.live_table import Screen
from qlora.sweep.study import JOB, Study
from qlora.sweep.trials import Search
from qlora.text import format_metric

RESULTS_FILE = "optimization_results.yaml"
MAX_PRINTED = 5
"""How many of several best trials are printed."""


def write_results(study: Study) -> None:
    """Writes the best trials so far, each with the command that runs it alone."""
    solutions = [
        {
            "params": trial.params,
            "values": trial.values,
            "job": trial.user_attrs.get(JOB),
            "command": run_again(study, trial),
        }
        for trial in study.best()
    ]
    if not solutions:
        return
    record: dict[str, Any] = {"name": "optuna", "solutions": solutions}
    if len(study.goals) == 1:
        [best] = solutions
        record = {"name": "optuna", "best_params": best["params"], "best_value": best["values"][0]}
        record |= {"job": best["job"], "command": best["command"]}
    write_text(study.sweep.folder / RESULTS_FILE, yaml.safe_dump(record, sort_keys=False, width=10_000))


def run_again(study: Study, trial: FrozenTrial) -> str:
    """Returns the command that runs a trial alone."""
    overrides = [*study.space.fixed, *study.space.overrides(trial.params)]
    mode = ["hydra.mode=RUN"] if any(override.startswith("sweep=") for override in overrides) else []
    return shlex.join(["qlora", *config_flags(), *overrides, *mode])


def print_summary(study: Study) -> None:
    """Prints the table, and the best trials with their commands."""
    Screen(study.sweep, 0).summary()
    rows = [("study", study.address)]
    if (results := study.sweep.folder / RESULTS_FILE).exists():
        rows.append(("results", str(results)))
    for trial in study.best()[:MAX_PRINTED]:
        values = "  ".join(f"{goal.metric} {format_metric(goal.metric, value)}"
                           for goal, value in zip(study.goals, trial.values, strict=True))  # fmt: skip
        overrides = " ".join(study.space.overrides(trial.params))
        rows += [("best", f"{values}  {overrides}"), ("again", run_again(study, trial))]
    say_rows(rows)


def raise_for_failures(search: Search) -> None:
    """Raises `JobsFailed` if a trial failed under this command."""
    if not search.failed:
        return
    board, count, limit = search.sweep.folder / "leaderboard.md", len(search.failed), search.settings.max_failures
    noun = "trial" if count == 1 else "trials"
    stopped = f"more than hydra.sweeper.max_failures={limit} allows, so the search stopped: " if count > limit else ""
    raise JobsFailed(
        f"{count} {noun} failed{', ' if stopped else ': '}{stopped}{shlex.quote(str(board))} says why; the same "
        "command resumes the search"
    )
