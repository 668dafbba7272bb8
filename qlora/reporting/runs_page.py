"""The page of several runs: table, curves, parameters, costs, and the runs that did not finish."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from qlora.reporting.importance import measure_importance, spans_decades, to_numbers
from qlora.reporting.rendering import (
    chart,
    first_smoothing,
    format_value,
    group,
    metric_title,
    plain_config,
    render,
    short_value,
)
from qlora.reporting.rendering import (
    line as curve_line,
)
from qlora.reporting.runs_page_parts import COSTS, RunsReport, RunView, TableLine
from qlora.text import brief_text, format_bytes, format_duration

HUES = 8
MAX_VISIBLE = 30
"""The lines of the table whose curves are visible at first."""
MAX_POINTS = 40_000
"""The points of all curves of a metric; more make the page slow and show nothing new."""
MAX_ANSWERS = 100
"""The answers of two runs that are laid side by side."""
STATUSES = ("failed", "interrupted", "pruned", "running", "queued")
"""The statuses of runs that did not finish, the most urgent first."""
LONGEST_NOTE = 120
"""Characters below the number of a tile."""
MEASURED_COSTS = ("train_runtime", "peak_memory_gb")
"""Costs that are shown among the parameters, against the objective."""


def runs_page(report: RunsReport) -> str:
    """Returns the page as HTML."""
    measured = [run for run in report.finished if _is_finite(run.objective)]
    importance, note = measure_importance(
        [run.values for run in measured], [float(run.objective or 0) for run in measured]
    )
    scatters = _scatters(measured, report) if len(measured) > 1 else []
    data = _chart_data(report, measured, scatters, importance)
    visible = sum(group["shown"] for group in data["groups"])
    return render(
        "runs.html.jinja",
        data,
        title=report.title,
        over=report.over,
        summary=_summary(report),
        sections=_sections(report, data),
        tiles=_tiles(report),
        command=report.command,
        objective=report.objective,
        order=_order(report),
        keys=report.keys,
        numeric=[key for key in report.keys if to_numbers([line.values.get(key, "") for line in report.lines])],
        metrics=report.metrics,
        first=int(report.objective in report.metrics),
        several_seeds=any(len(line.runs) > 1 for line in report.lines),
        lines=[_table_line(line, report) for line in report.lines],
        named=not report.is_sweep,
        left_out=report.left_out,
        pair=report.pair,
        measured=report.measured,
        verdicts=report.verdicts,
        most_answers=MAX_ANSWERS,
        fronts=data["fronts"],
        many=""
        if visible == len(data["groups"])
        else f"The curves of {visible} of {len(data['groups'])} runs are shown at first.",
        scatters=scatters,
        importance=importance,
        importance_note=note,
        parallel=data["parallel"],
        costs=[name for name in COSTS if any(name in run.costs for run in report.runs)],
        jobs=_jobs(report.runs),
        unfinished=[_unfinished(run) for run in sorted(report.unfinished, key=_urgency)],
        common=list(plain_config(report.common)),
    )


def _chart_data(
    report: RunsReport,
    measured: Sequence[RunView],
    scatters: Sequence[dict[str, Any]],
    importance: Mapping[str, float],
) -> dict[str, Any]:
    """Returns what `page.js` draws; `measured` are the finished runs with a finite objective."""
    objective, curves = report.objective, _charts(report.charted)
    dimensions = [axis for axis in scatters if axis["key"]]
    if dimensions and objective:
        goal = {"title": metric_title(objective), "numeric": True, "log": False,
                "values": [run.objective for run in measured]}  # fmt: skip
        dimensions = [*dimensions, goal]
    return {
        "groups": _groups(report),
        "curves": curves,
        "smoothing": first_smoothing(curves),
        "objective": metric_title(objective) if objective else None,
        "better": "higher" if report.maximizes else "lower",
        "points": {
            "objective": [run.objective for run in measured],
            "labels": [run.label for run in measured],
            "groups": [index for index, run in enumerate(report.finished) if _is_finite(run.objective)],
        },
        "fronts": _fronts(report),
        "scatters": scatters,
        "importance": [{"names": list(importance), "values": list(importance.values())}] if importance else [],
        "parallel": [{"dimensions": dimensions}] if len(dimensions) > 2 else [],
    }


def _sections(report: RunsReport, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the anchors and titles of the sections that have content."""
    sections = {
        "leaderboard": "Leaderboard",
        "verdicts": "Verdicts" if report.verdicts is not None else "",
        "front": "Best compromises" if data["fronts"] else "",
        "measured": "Evaluations" if report.measured is not None else "",
        "pair": "Side by side" if report.pair is not None else "",
        "curves": "Curves" if data["curves"] else "",
        "parameters": "Parameters" if data["scatters"] else "",
        "time": "Time and memory" if report.runs else "",
        "unfinished": "Not finished" if report.unfinished else "",
        "config": "Config" if report.common else "",
    }
    return [(anchor, title) for anchor, title in sections.items() if title]


def _table_line(line: TableLine, report: RunsReport) -> dict[str, Any]:
    return {
        "name": ", ".join(run.label for run in line.runs),
        "more": [(key, short_value(line.values.get(key, ""))) for key in report.left_out],
        "in_front": line.in_front,
        "values": {key: short_value(line.values.get(key, "")) for key in report.keys},
        "cells": [{"text": text, "value": value} for text, value in line.cells],
        "runs": [{"link": _link(run.page or run.folder), "label": run.label, "short": run.short} for run in line.runs],
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _link(path: str) -> str:
    return quote(path) if path else "."


def _groups(report: RunsReport) -> list[dict[str, Any]]:
    """Returns the legend: a colour for each line of the table, and grey for runs that did not finish."""
    count, entries = len(report.lines), []
    for index, line in enumerate(report.lines):
        hue, rank = (index, 0.0) if count < HUES else (None, index / (count - 1))
        best = index == 0 and count > 1 and report.objective is not None
        entries += [group(run.label, hue=hue, rank=rank, visible=index < MAX_VISIBLE, best=best) for run in line.runs]
    unfinished = [run for run in report.unfinished if run.curves]
    return entries + [
        group(run.label, hue=HUES - 1, visible=index < MAX_VISIBLE) for index, run in enumerate(unfinished)
    ]


def _charts(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    most = max(MAX_POINTS // max(len(runs), 1), 100)
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return [
        chart(name, [curve_line(index, run.curves[name].thin(most), smooth=not name.startswith("eval_"))
                     for index, run in enumerate(runs) if name in run.curves])
        for name in names
    ]  # fmt: skip


def _scatters(runs: Sequence[RunView], report: RunsReport) -> list[dict[str, Any]]:
    """Returns a chart of the objective for each varied key and each cost."""
    if report.objective is None:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.values)
    axes = [_axis(key, [run.values.get(key) for run in runs]) for key in keys]
    costs = [name for name in MEASURED_COSTS if name != report.objective and all(name in run.costs for run in runs)]
    for name in costs:
        axis = {"title": metric_title(name), "unit": _unit(name)}
        axes.append(axis | {"key": False, "numeric": True, "log": False, "values": [run.costs[name] for run in runs]})
    return [axis for axis in axes if len(set(axis["values"])) > 1]


def _fronts(report: RunsReport) -> list[dict[str, Any]]:
    """Returns a chart for each pair of goals of a search, with the lines of the table as points."""
    starts = itertools.accumulate((len(line.runs) for line in report.lines), initial=0)
    measured = [(dict(zip(report.metrics, (value for _, value in line.cells), strict=True)), line, start)
                for line, start in zip(report.lines, starts, strict=False)]  # fmt: skip
    fronts = []
    for x, y in itertools.combinations(report.goals, 2):
        points = [point for point in measured if _is_finite(point[0].get(x)) and _is_finite(point[0].get(y))]
        fronts.append({
            "x": {"title": metric_title(x), "unit": _unit(x), "values": [values[x] for values, _, _ in points]},
            "y": {"title": metric_title(y), "unit": _unit(y), "values": [values[y] for values, _, _ in points]},
            "labels": [line.runs[0].label for _, line, _ in points],
            "groups": [start for _, _, start in points],
            "front": [line.in_front for _, line, _ in points],
            # With more than two goals the front is a surface, not a line.
            "stairs": None if len(report.goals) > 2 else "hv" if report.goals[x] == "minimize" else "vh",
        })  # fmt: skip
    return [front for front in fronts if front["groups"]]


def _unit(name: str) -> str:
    return "seconds" if name.endswith("_runtime") else ""


def _axis(key: str, texts: Sequence[str | None]) -> dict[str, Any]:
    """Returns a varied key as an axis; a run lacks a key that is searched under a condition."""
    known = [text for text in texts if text is not None]
    numbers = to_numbers(known)
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
                {"text": format_value(value, name), "value": value, "share": _fraction(value, most[name])}
                for name, value in ((name, run.costs.get(name)) for name in names)
            ],
        }
        for run in runs
    ]


def _fraction(value: float | None, most: float) -> float:
    """Returns the length of a cost's bar; the bar of NaN or an infinite value has no length."""
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
        f"; * marks the front: no other line is better by {goals} without being worse by another"
        if len(report.goals) > 1
        else ""
    )
    return f"By {metric_title(report.objective)}, {better} is better{spread}{front}."


def _tiles(report: RunsReport) -> list[tuple[str, str, str]]:
    tiles, objective = list[tuple[str, str, str]](), report.objective
    if report.lines and objective is not None and objective in report.metrics:
        best = report.lines[0]
        values = " ".join(f"{key}={short_value(value)}" for key, value in best.values.items())
        note = brief_text(values if report.is_sweep else best.runs[0].label, LONGEST_NOTE)
        tiles.append((f"best {metric_title(objective)}", best.cells[list(report.metrics).index(objective)][0], note))
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
        tiles.append(("most memory", format_bytes(1e9 * max(memory)), ""))
    return tiles
