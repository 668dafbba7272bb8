"""Runs that measured what others trained (`task=evaluate`, `task=predict`): a table beside that of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.reporting.escape import markdown_table
from qlora.runtime.console import printable, say
from qlora.runtime.saved_run import Status
from qlora.sweep.jobs import Job
from qlora.sweep.leaderboard import NAME, describe, fit_columns, short_names
from qlora.text import format_metric, is_detail, terminal_width

TITLE = "Evaluations and predictions"
MOST_METRICS = 4
"""The metrics that have a column."""
ENDINGS = ("adapter", "model", "merged")
"""Folders of a run that `adapter=` may name; the run's name says more."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run that measured, or answered with, what another one trained."""

    name: str
    task: str
    adapter: str
    """The name of the run that was measured."""
    job: Job


def measured_runs(jobs: Mapping[str, Job], configs: Sequence[Mapping[str, Any]]) -> list[MeasuredRun]:
    """Returns the runs by their names, with their flat configs."""
    return [
        MeasuredRun(name, str(config.get("task.name") or "–"), adapter_name(config.get("adapter")), job)
        for (name, job), config in zip(jobs.items(), configs, strict=True)
    ]


def adapter_name(adapter: Any) -> str:
    """Returns what is measured, as a table names it: the run that trained the adapter, or the untuned base."""
    if adapter in (None, "none"):
        return "untuned base" if adapter else "–"
    path = Path(str(adapter))
    return (path.parent if path.name in ENDINGS else path).name


def measured_table(runs: Sequence[MeasuredRun]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the lines of the table of finished runs."""
    finished = [run for run in runs if run.job.status is Status.finished]
    known = dict.fromkeys(name for run in finished for name in run.job.metrics)
    metrics = [name for name in known if name.startswith("eval_") and not is_detail(name)][:MOST_METRICS]
    names = short_names([name.removeprefix("eval_") for name in metrics])
    lines = [
        [run.name, run.task, run.adapter, *(format_metric(name, run.job.metrics.get(name)) for name in metrics)]
        for run in finished
    ]
    return [NAME, "task", "adapter", *(names[name.removeprefix("eval_")] for name in metrics)], lines


def print_measured_runs(runs: Sequence[MeasuredRun]) -> None:
    """Prints the table, and the runs that did not finish."""
    say(Text(TITLE, style="bold"))
    head, lines = measured_table(runs)
    if lines:
        columns = {name: list(texts) for name, *texts in zip(head, *lines, strict=True)}
        (first, *rest), _ = fit_columns(columns, {}, terminal_width(), numeric=head[3:], spare=head[:2:-1])
        say(Text(first, style="dim"))
        for line in rest:
            say(line)
    for run in unfinished(runs):
        say(Text(printable(f"  {describe(run.job, run.name)}"), style="yellow"))
    say()


def unfinished(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """Returns the runs that have no result."""
    return [run for run in runs if run.job.status is not Status.finished]


def measured_markdown(runs: Sequence[MeasuredRun]) -> str:
    """Returns the table as Markdown."""
    head, lines = measured_table(runs)
    return f"\n## {TITLE}\n\n{markdown_table(head, lines)}\n"
