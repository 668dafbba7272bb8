"""How the verdicts of a sweep read: as a line, and as a table with intervals, seeds and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora.errors import DamagedFile
from qlora.reporting.runs_page_parts import Verdicts
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.saved_run import read_manifest
from qlora.sweep.jobs import Job, Status
from qlora.sweep.verdicts import ERROR, Comparison, Question, Verdict, judge, read_comparison, read_question
from qlora.text import format_duration, format_number, format_range, is_share, listed, plural


def build_verdict_table(question: Question, jobs: Mapping[str, Job]) -> Verdicts:
    """Returns the table of what the finished jobs, by their names, say."""
    comparisons = judge(question, jobs)
    values = [question.baseline, *(item.value for item in comparisons)]
    finished = {value: [job for name in question.jobs[value]
                        if (job := jobs.get(name)) is not None and job.status is Status.finished]
                for value in values}  # fmt: skip
    hours = {value: gpu_hours(finished[value]) for value in values}
    with_hours = all(count is not None for count in hours.values())

    def costs(value: str) -> list[str]:
        time = format_duration(math.fsum(job.seconds or 0.0 for job in finished[value]))
        return [time, *([format_number(hours[value] or 0.0, 2)] if with_hours else [])]

    baseline = [question.baseline, "baseline", str(len(finished[question.baseline])), "", "", *costs(question.baseline)]
    lines = [
        [item.value, _verdict(item), str(item.count), *_interval(question, item), *costs(item.value)]
        for item in comparisons
    ]
    return Verdicts(
        _title(question),
        _note(question),
        [question.by, "verdict", "seeds", "difference", "interval", "time", *(["GPU hours"] if with_hours else [])],
        [baseline, *lines],
        [f"{question.by}={item.value} stays open: {item.reason}" for item in comparisons if item.reason is not None],
    )


def describe_comparison(question: Question, item: Comparison) -> str:
    """Returns a verdict in one line: `lora.r=2: worse, +0.012 to +0.034 after 5 seeds`."""
    seeds = f"after {plural(item.count, 'seed')}"
    text = _interval(question, item)[1]
    ending = f", {text} {seeds}" if item.interval is not None else ""
    return f"{question.by}={item.value}: {_verdict(item)}{ending}{f' ({item.reason})' if item.reason else ''}"


def recorded_verdicts(overview: Mapping[str, Any]) -> list[str]:
    """Returns the verdicts that the overview of a sweep holds, each in one line."""
    try:
        question = read_question(overview.get("compare"))
        return [] if question is None else [
            describe_comparison(question, read_comparison(record)) for record in overview["verdicts"]
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return []


def describe_question(question: Question) -> str:
    """Returns the question, and how many seeds it may take, in one line."""
    first, last = question.seeds[0], question.seeds[-1]
    return (
        f"{_title(question)}; seeds {first} to {last}, {question.fewest_seeds} at first, then one more for what is open"
    )


def _verdict(item: Comparison) -> str:
    return "same within the margin" if item.verdict is Verdict.same else item.verdict.value


def _title(question: Question) -> str:
    better = "higher" if question.maximizes else "lower"
    values = listed(question.candidates)
    return (
        f"{question.by} = {values} against {question.baseline} by {question.metric} ({better} is better, margin "
        f"{_margin(question)})"
    )


def _margin(question: Question) -> str:
    return f"{100 * question.margin:g} points" if _in_points(question) else f"{question.margin:g}"


def _in_points(question: Question) -> bool:
    return is_share(question.metric)


def _note(question: Question) -> str:
    return (
        f"Differences are those of the same seeds. With a probability of {1 - ERROR:.0%} all intervals hold at once, "
        "at every number of seeds and for every candidate (the t-test's confidence sequence, Bonferroni's correction): "
        f"better and worse are intervals on one side of 0, same lies within ±{_margin(question)}."
    )


def _interval(question: Question, item: Comparison) -> list[str]:
    """Returns the mean difference and its interval as texts."""
    if item.interval is None:
        return ["–", "–"]
    mean, low, high = item.interval
    points = format_range(question.metric, mean, mean, signed=True).split(" to ")[1]
    finite = math.isfinite(low)
    return [points, format_range(question.metric, low, high, signed=True) if finite else "–"]


def gpu_hours(jobs: Iterable[Job]) -> float | None:
    """Returns the hours of GPUs that jobs took; None where one ran without, or does not say."""
    total = 0.0
    for job in jobs:
        try:
            manifest: dict[str, Any] = read_manifest(RunFolder(job.folder).manifest) or {}
        except DamagedFile:
            return None
        count = len(manifest.get("hardware", {}).get("gpus") or [])
        on_cpu = manifest.get("config", {}).get("device") == "cpu"
        if not count or on_cpu or job.seconds is None:
            return None
        total += count * job.seconds / 3600
    return total
