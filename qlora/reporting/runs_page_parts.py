"""What the page of several runs shows: each run, the lines of the table, and the page as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.reporting.history import Curve

COSTS = ("seconds", "train_runtime", "train_tokens_per_second", "train_mfu", "peak_memory_gb")


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run."""

    label: str
    folder: str
    """Its path, relative to the page."""
    status: str
    """`finished`, `failed`, `pruned`, `interrupted`, `running` or `queued`."""
    page: str | None = None
    """The path of its own page, relative to this one."""
    short: str = "open"
    """Its label among the runs of one line."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The varied keys."""
    objective: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    reason: str | None = None
    progress: str | None = None
    log: Sequence[str] = ()
    """The last lines of its output."""

    @property
    def costs(self) -> dict[str, float]:
        """Its costs: seconds, tokens a second, fraction of the device's speed, gigabytes."""
        known = {**self.metrics, "seconds": self.seconds}
        return {name: float(known[name]) for name in COSTS if known.get(name) is not None}  # type: ignore[arg-type]


@dataclass(frozen=True)
class TableLine:
    """A line of the table: runs that differ only by their seed."""

    values: Mapping[str, str]
    cells: Sequence[tuple[str, float | None]]
    """Each metric as a text, and as a number to sort by."""
    runs: Sequence[RunView]
    in_front: bool = False
    """Whether no other line is better by one goal without being worse by another."""


@dataclass(frozen=True)
class Answers:
    """The answers of two runs to one row."""

    asked: str
    reference: str | None
    first: str
    second: str


@dataclass(frozen=True)
class SideBySide:
    """What differs between two runs."""

    names: tuple[str, str]
    settings: Sequence[tuple[str, str, str]]
    """The full keys whose values differ, with both values."""
    knows_configs: bool
    """Whether the configs of both can be read."""
    shared: int
    """The rows that both answered."""
    differing: Sequence[Answers]
    """Those with other answers."""


@dataclass(frozen=True)
class Verdicts:
    """What a sweep says about the question that it answers."""

    title: str
    """The question."""
    note: str
    """What the words mean."""
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    reasons: Sequence[str]
    """Why candidates stay open."""


@dataclass(frozen=True)
class RunsReport:
    """The content of the page."""

    title: str
    over: str
    """The kind of page, printed above the title."""
    objective: str | None
    maximizes: bool
    """Whether a larger objective is better."""
    keys: Sequence[str]
    metrics: Sequence[str]
    lines: Sequence[TableLine]
    """Best first."""
    unfinished: Sequence[RunView] = ()
    common: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that all runs share."""
    command: str | None = None
    """The command that starts the best run again."""
    goals: Mapping[str, str] = field(default_factory=dict)
    """The metrics of a search, with `minimize` or `maximize`."""
    verdicts: Verdicts | None = None
    """The verdicts on what the sweep compares."""
    left_out: Sequence[str] = ()
    """Varied keys that have no column, and are shown on demand."""
    is_sweep: bool = True
    """Whether the runs are the jobs of one sweep; others are known by their names."""
    pair: SideBySide | None = None
    """What differs, where there are two runs."""
    measured: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Head and lines of the table of runs that only measured what others trained, which are not ranked."""

    @property
    def finished(self) -> list[RunView]:
        """The runs in the table, in order."""
        return [run for line in self.lines for run in line.runs]

    @property
    def runs(self) -> list[RunView]:
        """All runs, those of the table first."""
        return [*self.finished, *self.unfinished]

    @property
    def charted(self) -> list[RunView]:
        """The runs in the legend, in order."""
        return [*self.finished, *(run for run in self.unfinished if run.curves)]
