"""The table of a sweep: best job first, seeds averaged, failed jobs below with their reasons."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.text import Text

from qlora.reporting.escape import csv_cell, markdown_block, markdown_code, markdown_table, markdown_text
from qlora.reporting.rendering import short_value
from qlora.reporting.runs_page_parts import Verdicts
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import printable, say, say_rows
from qlora.runtime.saved_run import cost
from qlora.sweep.job_processes import tail
from qlora.sweep.jobs import Job, Status
from qlora.sweep.sweep_folder import Sweep
from qlora.sweep.verdict_table import build_verdict_table
from qlora.text import format_duration, format_metric, format_number, plural, shorten_cells, terminal_width

SEED = "seed"
BESIDE = ("eval_loss", "eval_exact_match", "train_runtime", "peak_memory_gb")
"""Metrics that are shown beside the objective if the jobs have them."""
ON_SCREEN = {"train_runtime": "time", "peak_memory_gb": "GB"}
"""The heads of columns on a terminal that differ from the name of the metric."""
NAME = "run"
"""The head of the column of names."""
MOST_KEYS = 8
"""The varied keys that a table has columns for."""
GAP = 2
"""Characters between two columns of a terminal."""
WIDTHS = (24, 16, 11, 8)
"""The most characters of a value; the smaller ones, with short heads, where the table is too wide."""
NAME_WIDTH = 19
"""The least characters of a run's name: those of a folder that is named by the time."""
SHORT_HEADS = {
    "model.name": "model",
    "data.name": "data",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accum",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "weight_decay": "decay",
    "target_modules": "targets",
    "double_quant": "double",
    "exact_match": "match",
}
"""The heads of narrow columns."""


@dataclass(frozen=True)
class Row:
    """Jobs whose configs differ only by their seed."""

    values: dict[str, str]
    """The varied keys except the seed."""
    jobs: list[Job]
    metrics: dict[str, tuple[float, float | None]]
    """Means over the seeds with their standard errors; None for a single seed."""
    in_front: bool = False
    """Whether no other row is better by one goal without being worse by another."""

    @property
    def best(self) -> Job:
        """The job of the first seed, whose command is shown."""
        return self.jobs[0]


@dataclass(frozen=True)
class Leaderboard:
    """The finished jobs of a sweep, best first, and the others."""

    objective: str | None
    maximizes: bool
    """Whether a larger objective is the better one."""
    keys: list[str]
    """The varied keys, one a column."""
    rows: list[Row]
    unfinished: list[Job]
    goals: Mapping[str, str]
    """The metrics of a search, with `minimize` or `maximize`."""
    verdicts: Verdicts | None = None
    """What the sweep says about the question that it answers."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What runs that form no sweep are called, by their folders; {}: jobs are known by what varies."""

    @property
    def columns(self) -> list[str]:
        """The varied keys that have a column."""
        return self.keys[:MOST_KEYS]

    @property
    def left_out(self) -> list[str]:
        """The varied keys that have none; `leaderboard.csv` and the page have them."""
        return self.keys[MOST_KEYS:]

    @property
    def metrics(self) -> list[str]:
        """The metrics, one a column, the objective first."""
        names = [*([self.objective] if self.objective else []), *self.goals, *BESIDE]
        return [name for name in dict.fromkeys(names) if any(name in row.metrics for row in self.rows)]


def build_leaderboard(sweep: Sweep) -> Leaderboard:
    """Returns the table of the jobs that have finished so far."""
    finished = sweep.with_status(Status.finished)
    several_seeds = len({job.values.get(SEED) for job in finished}) > 1
    keys = [key for key in sweep.varied if key != SEED or not several_seeds]
    groups: dict[tuple[str | None, ...], list[Job]] = {}
    for job in finished:
        groups.setdefault((*(job.values.get(key, "") for key in keys), job.seedless), []).append(job)
    rows = [Row({key: jobs[0].values.get(key, "") for key in keys}, jobs, _means(jobs)) for jobs in groups.values()]
    if len(sweep.goals) > 1:
        rows = _mark_front(rows, sweep.goals)
    return Leaderboard(
        sweep.objective,
        sweep.maximizes,
        keys,
        sorted(rows, key=lambda row: _cost(row, sweep.objective, maximizes=sweep.maximizes)),
        [job for job in sweep.jobs.values() if job.status is not Status.finished],
        sweep.goals,
        None if sweep.question is None else build_verdict_table(sweep.question, sweep.jobs),
        sweep.names,
    )


def _mark_front(rows: Sequence[Row], goals: Mapping[str, str]) -> list[Row]:
    costs = [[_cost(row, name, maximizes=way == "maximize") for name, way in goals.items()] for row in rows]

    def is_beaten(cost: list[float]) -> bool:
        return any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)

    return [replace(row, in_front=not is_beaten(cost)) for row, cost in zip(rows, costs, strict=True)]


def write_leaderboard(sweep: Sweep) -> Leaderboard:
    """Writes the table as Markdown and as CSV into the sweep's folder."""
    board = build_leaderboard(sweep)
    write_text(sweep.folder / "leaderboard.md", to_markdown(board, sweep.folder.name))
    write_text(sweep.folder / "leaderboard.csv", to_csv(board))
    return board


def _means(jobs: Sequence[Job]) -> dict[str, tuple[float, float | None]]:
    names = dict.fromkeys(name for job in jobs for name in job.metrics)
    return {name: _mean([job.metrics[name] for job in jobs if name in job.metrics]) for name in names}


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean with its standard error; NaN where a value is NaN or infinite."""
    if len(values) == 1:
        return values[0], None
    try:
        return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    except (ArithmeticError, AttributeError, ValueError):  # raised for infinite and for too large values
        return math.nan, None


def _cost(row: Row, name: str | None, *, maximizes: bool) -> float:
    return cost(row.metrics[name][0] if name in row.metrics else None, maximizes=maximizes)


def cell(row: Row, name: str) -> str:
    """Returns a metric of a row as text: `0.031 ± 0.004`."""
    if name not in row.metrics:
        return "–"
    value, error = row.metrics[name]
    text = format_duration(value) if name.endswith("_runtime") else format_metric(name, value)
    if error is None:
        return text
    if name.endswith("_runtime"):
        return f"{text} ± {format_duration(error)}"
    scale, digits = (100 if text.endswith("%") else 1), len(text.removesuffix(" %").partition(".")[2])
    return f"{text} ± {format_number(scale * error, digits)}" if "e" not in text else f"{text} ± {error:.3g}"


def table(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the lines of the table of finished jobs."""
    several = any(len(row.jobs) > 1 for row in board.rows)
    head = ["", *([NAME] if board.names else []), *board.columns, *(["seeds"] if several else []), *board.metrics]
    lines = [
        [
            f"{rank} *" if row.in_front else str(rank),
            *([name_of(row, board)] if board.names else []),
            *(row.values[key] for key in board.columns),
            *([str(len(row.jobs))] if several else []),
            *(cell(row, name) for name in board.metrics),
        ]
        for rank, row in enumerate(board.rows, start=1)
    ]
    return head, lines


def name_of(row: Row, board: Leaderboard) -> str:
    """Returns what the runs of a row are called."""
    first, *others = (board.names[str(job.folder)] for job in row.jobs)
    return f"{first} and {len(others)} more" if others else first


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each key, or the whole key where two last parts are equal."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def fit(board: Leaderboard, room: int) -> tuple[list[str], list[str]]:
    """Returns the table's lines on a terminal `room` characters wide, the head first, and the columns left out.

    Columns become narrower first. Then metrics are left out, from the right, the count of seeds, and keys; time and
    memory only where nothing else is left to leave out.
    """
    head, lines = table(board)
    names = short_names(board.columns) | {
        name: ON_SCREEN.get(name, name.removeprefix("eval_")) for name in board.metrics
    }
    columns = {name: list(texts) for name, *texts in zip(head, *lines, strict=True)}
    others = [name for name in board.metrics if name not in (board.objective, *ON_SCREEN)]
    spare = [
        *reversed(others),
        "seeds",
        *board.columns[:0:-1],
        *(board.columns[:1] if board.names else []),
        *(name for name in reversed(board.metrics) if name in ON_SCREEN and name != board.objective),
    ]
    return fit_columns(columns, names, room, numeric=board.metrics, spare=spare)


def fit_columns(
    columns: Mapping[str, Sequence[str]],
    heads: Mapping[str, str],
    room: int,
    *,
    numeric: Collection[str],
    spare: Sequence[str],
) -> tuple[list[str], list[str]]:
    """Returns a table's lines in `room` characters, the head first, and the columns left out: the first of `spare`.

    Columns of `numeric` are aligned to the right and never shortened.
    """
    for count in range(len(spare) + 1):
        kept = {name: texts for name, texts in columns.items() if name not in spare[:count]}
        for width in WIDTHS:
            cells = [_cells(name, heads.get(name, name), kept[name], width, name in numeric) for name in kept]
            if sum(len(column[0]) for column in cells) + GAP * (len(cells) - 1) <= room:
                break
        else:
            continue
        break
    printed = [(" " * GAP).join(line).rstrip() for line in zip(*cells, strict=True)]
    return printed, [name for name in columns if name not in kept]


def _cells(name: str, head: str, texts: Sequence[str], width: int, is_number: bool) -> list[str]:
    """Returns the cells of a column, all of one width."""
    if width < WIDTHS[0]:
        head = SHORT_HEADS.get(head, head)
    if not is_number:
        least = max(width, NAME_WIDTH) if name == NAME else width
        (head,) = shorten_cells([head], width)
        texts = shorten_cells(["–" if text == "null" else short_value(text) for text in texts], least)
    size = max(map(len, (head, *texts)))
    return [text.rjust(size) if is_number else text.ljust(size) for text in (head, *texts)]


def front_note(board: Leaderboard) -> str:
    """Returns what the marks in the table of a search by several goals mean."""
    return f"in front: no other job is better by {' or '.join(board.goals)} without being worse by another"


def describe(job: Job, name: str | None = None) -> str:
    """Returns the status of an unfinished job in one line; it is called `name`, or else by what varies."""
    parts = [job.status.value, *([job.reason] if job.reason not in (None, job.status.value) else [])]
    return f"{name or ' '.join(job.overrides) or job.name}: {', '.join(parts)}"


def print_leaderboard(board: Leaderboard) -> None:
    """Prints the table and the jobs that did not finish."""
    say()
    if board.rows:
        (head, *lines), left_out = fit(board, terminal_width())
        say(Text(head, style="dim"))
        for line in lines:
            say(line)
        if any(row.in_front for row in board.rows):
            say_rows([("*", front_note(board))])
        if board.left_out:
            more = f"{plural(len(board.left_out), 'more key')} differ{'s' if len(board.left_out) == 1 else ''}"
            say_rows([("more", f"{more}; see the page and leaderboard.csv")])
        if left_out:
            say_rows([("left out", f"{', '.join(left_out)}: the terminal is too narrow; see leaderboard.md")])
    if board.verdicts is not None:
        _print_verdicts(board.verdicts)
    for job in board.unfinished:
        name = board.names.get(str(job.folder))
        say(Text(printable(f"  {describe(job, name)}"), style="red" if job.status is Status.failed else "yellow"))
    say()


def _print_verdicts(table: Verdicts) -> None:
    say()
    say(Text(printable(table.title), style="bold"))
    columns = {name: list(texts) for name, *texts in zip(table.head, *table.lines, strict=True)}
    (head, *lines), _ = fit_columns(
        columns, {}, terminal_width(), numeric=table.head[2:], spare=["GPU hours", "time", "difference"]
    )
    say(Text(head, style="dim"))
    for line in lines:
        say(line)
    for reason in table.reasons:
        say(Text(printable(f"  {reason}"), style="yellow"))


def to_markdown(board: Leaderboard, name: str) -> str:
    """Returns the table as Markdown, with the last output lines of failed jobs."""
    head, lines = table(board)
    parts = [f"# {markdown_text(name)}"]
    if lines:
        parts.append(markdown_table(head, lines))
        better = "higher" if board.maximizes else "lower"
        spread = "; ± is the standard error over seeds" if any(len(row.jobs) > 1 for row in board.rows) else ""
        parts.append(f"By {markdown_code(str(board.objective))}, {better} is better{spread}.")
        if any(row.in_front for row in board.rows):
            parts.append(f"\\* {markdown_text(front_note(board))}")
        if board.left_out:
            keys = ", ".join(map(markdown_code, board.left_out))
            parts.append(f"These keys differ too, and `leaderboard.csv` has them: {keys}.")
    if (verdicts := board.verdicts) is not None:
        parts += [f"## {markdown_text(verdicts.title)}", markdown_table(verdicts.head, verdicts.lines)]
        parts += [f"- {markdown_text(reason)}" for reason in verdicts.reasons]
        parts.append(markdown_text(verdicts.note))
    for job in board.unfinished:
        called = board.names.get(str(job.folder))
        parts.append(f"- {markdown_text(describe(job, called))} ({markdown_code(job.name)})")
        if job.status is Status.failed and (last := tail(job.folder)):
            parts.append(markdown_block("\n".join(last)))
    return "\n\n".join(parts) + "\n"


def to_csv(board: Leaderboard) -> str:
    """Returns the jobs as CSV, one a line: values, status and all metrics."""
    jobs = [*(job for row in board.rows for job in row.jobs), *board.unfinished]
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")

    def write(row: Sequence[Any]) -> None:
        writer.writerow(map(csv_cell, row))

    front = {job.name for row in board.rows if row.in_front for job in row.jobs}
    write(["job", *keys, *(["front"] if front else []), "status", "reason", "seconds", *names])
    for job in jobs:
        values: list[Any] = [job.values.get(key, "") for key in keys]
        ending = [job.status.value, job.reason or "", "" if job.seconds is None else round(job.seconds, 3)]
        marks = [["no", "yes"][job.name in front]] if front else []
        write([job.name, *values, *marks, *ending, *(job.metrics.get(name, "") for name in names)])
    return text.getvalue()
