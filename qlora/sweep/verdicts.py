"""The question that a sweep answers with `sweep.compare`, and the verdicts that its finished jobs allow.

The unit is the seed: each candidate's metric less the baseline's, with the same seed, is one value. Verdicts depend on
nothing but these values in the order of the seeds, whenever and in whatever order the jobs ran.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from qlora.errors import DamagedFile
from qlora.runtime.saved_run import RESULTS, json_number, read_result, to_number
from qlora.sweep.confidence_sequence import Interval, confidence_interval, fewest_values
from qlora.sweep.jobs import Job, Status
from qlora.text import is_share

ERROR = 0.05
"""The most that the probability of any wrong verdict in a sweep may be."""


def alpha_of(candidates: int) -> float:
    """Returns the error of each candidate: Bonferroni's, valid although all share the baseline's jobs."""
    return ERROR / candidates


def fewest_seeds(candidates: int) -> int:
    """Returns how many seeds the first verdict on any of the candidates needs."""
    return fewest_values(alpha_of(candidates))


Verdict = StrEnum("Verdict", "better worse same open")
"""`same`: the difference is smaller than the margin; `open`: the seeds so far do not tell."""


@dataclass(frozen=True)
class Question:
    """What a sweep compares."""

    by: str
    """The swept key."""
    baseline: str
    """Its value with which the others are compared, as an override writes it."""
    metric: str
    maximizes: bool
    """Whether a larger metric is better."""
    margin: float
    seeds: list[int]
    """The seeds in the order in which they are added, the last ones only where they are needed."""
    jobs: dict[str, list[str]]
    """The names of the jobs of each value, one for each seed."""

    def __post_init__(self) -> None:
        counts = {len(names) for names in self.jobs.values()}
        if self.baseline not in self.jobs or len(self.jobs) < 2 or counts != {len(self.seeds)}:
            raise ValueError("its values and seeds do not fit together")

    @property
    def candidates(self) -> list[str]:
        """The values that are compared with the baseline."""
        return [value for value in self.jobs if value != self.baseline]

    @property
    def alpha(self) -> float:
        """The error of a single candidate."""
        return alpha_of(len(self.candidates))

    @property
    def fewest_seeds(self) -> int:
        """How many seeds the first verdict needs."""
        return fewest_seeds(len(self.candidates))

    def to_dict(self) -> dict[str, Any]:
        """Returns the question in JSON's types."""
        return asdict(self)


def read_question(record: Any) -> Question | None:
    """Returns the question that `to_dict` wrote; None for None. Raises `ValueError` for anything else."""
    if record is None:
        return None
    try:
        question = Question(**{name: record[name] for name in Question.__dataclass_fields__})
        texts = (
            question.by,
            question.baseline,
            question.metric,
            *(name for row in question.jobs.values() for name in row),
        )
        is_valid = (
            all(isinstance(text, str) for text in texts)
            and all(type(seed) is int for seed in question.seeds)
            and isinstance(question.margin, int | float)
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it is not a question") from error
    if not is_valid:
        raise ValueError("it is not a question")
    return question


@dataclass(frozen=True)
class Comparison:
    """What the finished jobs say about one candidate."""

    value: str
    verdict: Verdict
    count: int
    """The seeds that the verdict rests on."""
    interval: Interval | None
    """The mean difference to the baseline, with its interval; None: no seed is finished."""
    reason: str | None = None
    """Why no further seed can decide it."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison in JSON's types."""
        mean, low, high = self.interval or (None, None, None)
        numbers = {"difference": json_number(mean), "low": json_number(low), "high": json_number(high)}
        return {
            "value": self.value,
            "verdict": self.verdict.value,
            "seeds": self.count,
            **numbers,
            "reason": self.reason,
        }


def read_comparison(record: Mapping[str, Any]) -> Comparison:
    """Returns the comparison that `to_dict` wrote; raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    interval = None
    if record["difference"] is not None:
        interval = Interval(*(to_number(record[name]) for name in ("difference", "low", "high")))
    return Comparison(record["value"], Verdict(record["verdict"]), record["seeds"], interval, record["reason"])


def judge(question: Question, jobs: Mapping[str, Job]) -> list[Comparison]:
    """Returns what the finished jobs, by their names, say about each candidate.

    Seeds are looked at one after the other, and those behind a verdict, or behind a gap, change nothing.
    """
    return [_judge(question, value, jobs) for value in question.candidates]


def _judge(question: Question, value: str, jobs: Mapping[str, Job]) -> Comparison:
    differences, interval = list[float](), None
    for seed, name, name_of_baseline in zip(
        question.seeds, question.jobs[value], question.jobs[question.baseline], strict=True
    ):
        pair = jobs.get(name), jobs.get(name_of_baseline)
        first, second = (job if job is not None and job.status is Status.finished else None for job in pair)
        if first is None or second is None:
            break
        if reason := _unequal(question, seed, first, second):
            return Comparison(value, Verdict.open, len(differences), interval, reason)
        differences.append(first.metrics[question.metric] - second.metrics[question.metric])
        interval = confidence_interval(differences, question.alpha, variance=_rounding(question.metric, second))
        verdict = decide(interval, question.margin, maximizes=question.maximizes)
        if verdict is not Verdict.open:
            return Comparison(value, verdict, len(differences), interval)
    return Comparison(value, Verdict.open, len(differences), interval)


def decide(interval: Interval, margin: float, *, maximizes: bool) -> Verdict:
    """Returns the verdict that an interval of the difference to the baseline allows.

    An interval on one side of zero says which is better; one that lies within the margin, that they are the same.
    """
    if -margin < interval.low and interval.high < margin:
        return Verdict.same
    if interval.low > 0:
        return Verdict.better if maximizes else Verdict.worse
    if interval.high < 0:
        return Verdict.worse if maximizes else Verdict.better
    return Verdict.open


def _unequal(question: Question, seed: int, candidate: Job, baseline: Job) -> str | None:
    """Returns why the difference of two jobs means nothing."""
    for job, whose in ((candidate, "its"), (baseline, "the baseline's")):
        number = job.metrics.get(question.metric)
        if number is None:
            return f"seed {seed}: {whose} {question.metric} is missing"
        if not math.isfinite(number):
            return f"seed {seed}: {whose} {question.metric} is not finite"
    rows = [_rows(job) for job in (candidate, baseline)]
    if question.metric.startswith("eval_") and None not in rows and rows[0] != rows[1]:
        return f"seed {seed}: it is measured on {rows[0]} rows, and the baseline on {rows[1]}"
    return None


def _rounding(metric: str, job: Job) -> float:
    """Returns the variance that a difference of two shares of the same rows lacks because rows are whole.

    Equal counts of right answers to few rows do not say that the shares are equal.
    """
    rows = _rows(job) if metric.startswith("eval_") and is_share(metric.removeprefix("eval_")) else None
    return 1 / (6 * rows**2) if rows else 0.0


def _rows(job: Job) -> int | None:
    """Returns how many rows a job has measured, as its result says."""
    for name in RESULTS:
        try:
            result = read_result(job.folder / name)
        except DamagedFile:
            return None
        if result is not None:
            measured = result.get("measured")
            data = measured.get("data") if isinstance(measured, dict) else None
            rows = data.get("rows") if isinstance(data, dict) else None
            return rows if type(rows) is int else None
    return None


def missing_jobs(question: Question, comparisons: Sequence[Comparison]) -> list[str]:
    """Returns the names of the jobs on which open candidates wait, finished ones among them: seed by seed.

    The next round is one seed for the baseline and each open candidate; before the first verdict is possible, all
    the seeds that it needs.
    """
    names = dict[str, None]()
    until = {
        item.value: max(item.count + 1, question.fewest_seeds)
        for item in comparisons
        if item.verdict is Verdict.open and item.reason is None
    }
    for index in range(len(question.seeds)):
        values = [value for value, end in until.items() if index < end]
        names |= dict.fromkeys(
            question.jobs[value][index] for value in ([question.baseline, *values] if values else [])
        )
    return list(names)
