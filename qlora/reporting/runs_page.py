"""The page of several runs: their table, curves, parameters, costs, and what became of those that did not finish."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from qlora.reporting.history import Curve
from qlora.reporting.importance import measure_importance, spans_decades, to_numbers
from qlora.reporting.page import (
    chart,
    first_smoothing,
    format_value,
    group,
    line,
    metric_title,
    plain_config,
    render,
    short_value,
)
from qlora.text import format_duration

HUES = 8
SHOWN = 30
"""So many lines of the table have their curves drawn at first."""
POINTS = 40_000
"""Of a metric's curves together: more make the page slow and show nothing."""
COSTS = ("seconds", "train_runtime", "train_tokens_per_second", "train_mfu", "peak_memory_gb")
STATUSES = ("failed", "interrupted", "pruned", "running", "queued")
"""Of runs that did not finish, in the order in which they need a look."""
MEASURED_COSTS = ("train_runtime", "peak_memory_gb")
"""Costs that stand among the parameters, for what they buy."""


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run."""

    label: str
    folder: str
    """Where it is, seen from the page."""
    status: str
    """`finished`, `failed`, `pruned`, `interrupted`, `running` or `queued`."""
    page: str | None = None
    """Its own page, seen from this one."""
    short: str = "open"
    """What tells it from the other runs of its line."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The varied keys."""
    objective: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    reason: str | None = None
    progress: str | None = None
    log: Sequence[str] = ()
    """The last lines that it wrote."""

    @property
    def costs(self) -> dict[str, float]:
        """What it took: seconds, tokens a second, share of the device's speed, gigabytes."""
        known = {**self.metrics, "seconds": self.seconds}
        return {name: float(known[name]) for name in COSTS if known.get(name) is not None}  # type: ignore[arg-type]


@dataclass(frozen=True)
class TableLine:
    """A line of the table: runs that differ by their seed only."""

    values: Mapping[str, str]
    cells: Sequence[tuple[str, float | None]]
    """Each metric as people read it, and as a number to sort by."""
    runs: Sequence[RunView]
    in_front: bool = False
    """Whether no other is better by one of several goals without being worse by another."""


@dataclass(frozen=True)
class RunsReport:
    """Everything on the page."""

    title: str
    over: str
    """What kind of page it is."""
    objective: str | None
    maximizes: bool
    """Whether a larger objective is the better one."""
    keys: Sequence[str]
    metrics: Sequence[str]
    lines: Sequence[TableLine]
    """Best first."""
    unfinished: Sequence[RunView] = ()
    common: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that all runs share."""
    command: str | None = None
    """What starts the best run again."""
    goals: Mapping[str, str] = field(default_factory=dict)
    """The metrics of a search, with `minimize` or `maximize`."""

    @property
    def finished(self) -> list[RunView]:
        """The runs of the table, in its order."""
        return [run for line in self.lines for run in line.runs]

    @property
    def runs(self) -> list[RunView]:
        """All runs, those of the table first."""
        return [*self.finished, *self.unfinished]

    @property
    def drawn(self) -> list[RunView]:
        """The runs of the legend, in its order."""
        return [*self.finished, *(run for run in self.unfinished if run.curves)]


def runs_page(report: RunsReport) -> str:
    """Returns the page as HTML."""
    runs, objective = report.runs, report.objective
    groups = _groups(report)
    curves = _charts(report.drawn)
    judged = [run for run in report.finished if _is_number(run.objective)]
    values = [run.values for run in judged]
    shares, note = measure_importance(values, [float(run.objective or 0) for run in judged])
    scatters = _scatters(judged, report) if len(judged) > 1 else []
    dimensions = [axis for axis in scatters if axis["key"]]
    if dimensions and objective:
        goal = {"title": metric_title(objective), "numeric": True, "log": False,
                "values": [run.objective for run in judged]}  # fmt: skip
        dimensions = [*dimensions, goal]
    shown = sum(group["shown"] for group in groups)
    data = {
        "groups": groups,
        "curves": curves,
        "smoothing": first_smoothing(curves),
        "objective": metric_title(objective) if objective else None,
        "better": "higher" if report.maximizes else "lower",
        "points": {
            "objective": [run.objective for run in judged],
            "labels": [run.label for run in judged],
            "groups": [place for place, run in enumerate(report.finished) if _is_number(run.objective)],
        },
        "fronts": (fronts := _fronts(report)),
        "scatters": scatters,
        "importance": [{"names": list(shares), "values": list(shares.values())}] if shares else [],
        "parallel": [{"dimensions": dimensions}] if len(dimensions) > 2 else [],
    }
    sections = {
        "leaderboard": "Leaderboard",
        "front": "Best compromises" if fronts else "",
        "curves": "Curves" if curves else "",
        "parameters": "Parameters" if scatters else "",
        "time": "Time and memory" if runs else "",
        "unfinished": "Not finished" if report.unfinished else "",
        "config": "Config" if report.common else "",
    }
    return render(
        "runs.html.jinja",
        data,
        title=report.title,
        over=report.over,
        summary=_summary(report),
        sections=[(anchor, name) for anchor, name in sections.items() if name],
        tiles=_tiles(report),
        command=report.command,
        objective=objective,
        order=_order(report),
        keys=report.keys,
        numeric=[key for key in report.keys if to_numbers([line.values.get(key, "") for line in report.lines])],
        metrics=report.metrics,
        first=int(objective in report.metrics),
        several_seeds=any(len(line.runs) > 1 for line in report.lines),
        lines=[_table_line(each, report.keys) for each in report.lines],
        fronts=fronts,
        many="" if shown == len(groups) else f"The curves of {shown} of {len(groups)} runs are shown at first.",
        scatters=scatters,
        importance=shares,
        importance_note=note,
        parallel=data["parallel"],
        costs=[name for name in COSTS if any(name in run.costs for run in runs)],
        jobs=_jobs(runs),
        unfinished=[_unfinished(run) for run in sorted(report.unfinished, key=_urgency)],
        common=list(plain_config(report.common)),
    )


def _table_line(line: TableLine, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "in_front": line.in_front,
        "values": {key: short_value(line.values.get(key, "")) for key in keys},
        "cells": [{"text": text, "value": value} for text, value in line.cells],
        "runs": [{"link": _link(run.page or run.folder), "label": run.label, "short": run.short} for run in line.runs],
    }


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _link(path: str) -> str:
    return quote(path) if path else "."


def _groups(report: RunsReport) -> list[dict[str, Any]]:
    """Returns the legend: a colour for each line of the table, and grey for runs that did not finish."""
    count, entries = len(report.lines), []
    for place, each in enumerate(report.lines):
        hue, rank = (place, 0.0) if count < HUES else (None, place / (count - 1))
        best = place == 0 and count > 1 and report.objective is not None
        entries += [group(run.label, hue=hue, rank=rank, shown=place < SHOWN, best=best) for run in each.runs]
    unfinished = [run for run in report.unfinished if run.curves]
    return entries + [group(run.label, hue=HUES - 1, shown=place < SHOWN) for place, run in enumerate(unfinished)]


def _charts(drawn: Sequence[RunView]) -> list[dict[str, Any]]:
    most = max(POINTS // max(len(drawn), 1), 100)
    names = dict.fromkeys(name for run in drawn for name in run.curves)
    return [
        chart(name, [line(place, run.curves[name].thin(most), smooth=not name.startswith("eval_"))
                     for place, run in enumerate(drawn) if name in run.curves])
        for name in names
    ]  # fmt: skip


def _scatters(runs: Sequence[RunView], report: RunsReport) -> list[dict[str, Any]]:
    """Returns a chart for each varied key, and for what a run costs, against the objective."""
    if report.objective is None:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.values)
    found = [_axis(key, [run.values.get(key) for run in runs]) for key in keys]
    costs = [name for name in MEASURED_COSTS if name != report.objective and all(name in run.costs for run in runs)]
    for name in costs:
        axis = {"title": metric_title(name), "unit": _unit(name)}
        found.append(axis | {"key": False, "numeric": True, "log": False, "values": [run.costs[name] for run in runs]})
    return [axis for axis in found if len(set(axis["values"])) > 1]


def _fronts(report: RunsReport) -> list[dict[str, Any]]:
    """Returns a chart for each two goals of a search, with the lines of the table as points."""
    places = itertools.accumulate((len(each.runs) for each in report.lines), initial=0)
    measured = [(dict(zip(report.metrics, (value for _, value in each.cells), strict=True)), each, place)
                for each, place in zip(report.lines, places, strict=False)]  # fmt: skip
    found = []
    for x, y in itertools.combinations(report.goals, 2):
        points = [point for point in measured if _is_number(point[0].get(x)) and _is_number(point[0].get(y))]
        found.append({
            "x": {"title": metric_title(x), "unit": _unit(x), "values": [values[x] for values, _, _ in points]},
            "y": {"title": metric_title(y), "unit": _unit(y), "values": [values[y] for values, _, _ in points]},
            "labels": [each.runs[0].label for _, each, _ in points],
            "groups": [place for _, _, place in points],
            "front": [each.in_front for _, each, _ in points],
            # Of more goals, the front is a surface, and no line of two.
            "stairs": None if len(report.goals) > 2 else "hv" if report.goals[x] == "minimize" else "vh",
        })  # fmt: skip
    return [each for each in found if each["groups"]]


def _unit(name: str) -> str:
    return "seconds" if name.endswith("_runtime") else ""


def _axis(key: str, texts: Sequence[str | None]) -> dict[str, Any]:
    """Returns a varied key as an axis; a run may lack it, where it is searched under a condition only."""
    there = [text for text in texts if text is not None]
    numbers = to_numbers(there)
    axis: dict[str, Any] = {"title": key, "unit": "", "key": True, "numeric": numbers is not None}
    if numbers is None:
        return axis | {"log": False, "values": texts}
    values = iter(numbers)
    return axis | {
        "log": spans_decades(numbers),
        "values": [None if text is None else next(values) for text in texts],
    }


def _jobs(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    names = [name for name in COSTS if any(name in run.costs for run in runs)]
    known = {name: [run.costs[name] for run in runs if name in run.costs] for name in names}
    most = {name: max(filter(math.isfinite, values), default=0.0) for name, values in known.items()}
    return [
        {
            "label": run.label,
            "status": run.status,
            "objective": run.objective,
            "page": run.page and _link(run.page),
            "folder": _link(run.folder),
            "costs": [
                {"text": format_value(value, name), "value": value, "share": _share(value, most[name])}
                for name, value in ((name, run.costs.get(name)) for name in names)
            ],
        }
        for run in runs
    ]


def _share(value: float | None, most: float) -> float:
    """Returns how long a cost's bar is; that of what is no number has no length."""
    return min(max(value / most, 0.0), 1.0) if value is not None and math.isfinite(value) and most > 0 else 0.0


def _urgency(run: RunView) -> int:
    return STATUSES.index(run.status)


def _unfinished(run: RunView) -> dict[str, Any]:
    return {
        "label": run.label,
        "status": run.status,
        "folder": _link(run.folder),
        "reason": run.reason,
        "progress": run.progress,
        "log": run.log,
    }


def _summary(report: RunsReport) -> str:
    counts: dict[str, int] = {}
    for run in report.runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no runs yet"


def _order(report: RunsReport) -> str:
    if report.objective is None:
        return "In no order: these runs have no objective."
    better = "higher" if report.maximizes else "lower"
    several = any(len(line.runs) > 1 for line in report.lines)
    spread = "; ± is the standard error over seeds" if several else ""
    goals = " or ".join(map(metric_title, report.goals))
    front = (
        f"; * marks the front: none is better by {goals} without being worse by another"
        if len(report.goals) > 1
        else ""
    )
    return f"By {metric_title(report.objective)}, {better} is better{spread}{front}."


def _tiles(report: RunsReport) -> list[tuple[str, str, str]]:
    tiles, objective = list[tuple[str, str, str]](), report.objective
    if report.lines and objective is not None and objective in report.metrics:
        best = report.lines[0]
        words = " ".join(f"{key}={short_value(value)}" for key, value in best.values.items())
        tiles.append((f"best {metric_title(objective)}", best.cells[list(report.metrics).index(objective)][0], words))
        base = best.runs[0].metrics.get(f"base_{objective}")
        if base is not None:
            tiles.append((f"{metric_title(objective)} of the untuned base", format_value(base, objective), ""))
    tiles.append(("finished", f"{len(report.finished)} of {len(report.runs)}", ""))
    seconds = [run.seconds for run in report.runs if run.seconds is not None]
    if seconds:
        mean = format_duration(sum(seconds) / len(seconds))
        tiles.append(("time of all runs", format_duration(sum(seconds)), f"{mean} each"))
    memory = [run.costs["peak_memory_gb"] for run in report.finished if "peak_memory_gb" in run.costs]
    if memory:
        tiles.append(("most memory", f"{max(memory):.3g} GB", ""))
    return tiles
