"""Runs a sweep that answers a question (`sweep.compare`): seeds are added in rounds where the answer is open."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.config.combinations import Axis, Combinations
from qlora.config.overrides import parse_overrides, plain_value
from qlora.config.saved_config import config_to_dict, flatten
from qlora.config.schema import CompareConfig, Config, Direction
from qlora.config.schema.values import written
from qlora.errors import ConfigError, did_you_mean
from qlora.runtime.console import say
from qlora.sweep.goals import check_measured
from qlora.sweep.jobs import Job, Status, identity
from qlora.sweep.launcher import find_job
from qlora.sweep.leaderboard import SEED
from qlora.sweep.sweep_folder import Sweep
from qlora.sweep.verdict_table import describe_comparison, describe_question
from qlora.sweep.verdicts import Question, Verdict, fewest_seeds, judge, missing_jobs
from qlora.text import better_direction, listed

SPLIT_KEYS = (
    *("data.path", "data.subset", "data.split", "data.revision", "data.data_files", "data.max_samples", "data.mix"),
    *("data.eval_dataset_size", "data.split_seed"),
)
"""Keys that decide which rows are held out where they are split off."""
HELD_OUT_KEYS = ("data.eval_path", "data.eval_split", "data.max_eval_samples", "evaluation.path")
"""Keys that always decide which rows are held out."""


@dataclass(frozen=True)
class Compared:
    """The runs that a question may need."""

    axis: Axis
    """The key whose values are compared."""
    grid: Combinations
    """All values with all seeds."""
    baseline: str
    """The value with which the others are compared, as an override writes it."""
    metric: str
    maximizes: bool
    margin: float
    seeds: list[int]

    def question(self, sweep: Sweep) -> tuple[Question, dict[str, tuple[list[str], list[str]]]]:
        """Returns the question, and for each job's name its overrides, all of them and those that distinguish it."""
        names: dict[str, list[str]] = {_value(text): [] for text in self.axis.overrides}
        overrides = dict[str, tuple[list[str], list[str]]]()
        for positions in self.grid:
            texts = self.grid.overrides(positions)
            distinct = [text for axis, text in zip(self.grid.axes, texts, strict=True)
                        if axis.key in (self.axis.key, SEED)]  # fmt: skip
            job = find_job(sweep, self.grid.config(positions), distinct)
            names[next(_value(text) for text in distinct if text in self.axis.overrides)].append(job.name)
            overrides[job.name] = texts, distinct
        by = self.axis.key.lstrip("+")
        question = Question(by, self.baseline, self.metric, self.maximizes, self.margin, self.seeds, names)
        return question, overrides


def _value(override: str) -> str:
    return override.partition("=")[2]


def plan_comparison(settings: CompareConfig, overrides: Sequence[str], base: Any, config_dir: str | None) -> Compared:
    """Returns the runs that a question may need, having checked all of it; raises `ConfigError`."""
    axis = _find_axis(settings, Combinations(overrides, config_dir, base=base).axes)
    seeds = list(range(base.seed, base.seed + settings.max_seeds))
    values = ",".join(map(str, seeds))
    grid = Combinations([*overrides, f"{SEED}={values}"], config_dir, base=base)
    index = next(index for index, other in enumerate(grid.axes) if other.key == axis.key)
    baseline = _find_baseline(axis, settings)
    configs = [
        grid.config([position if number == index else 0 for number in range(len(grid.axes))])
        for position in range(len(axis.overrides))
    ]
    metric, direction = _find_metric(settings, configs)
    _check_configs(axis, metric, configs)
    if settings.max_seeds < (needed := fewest_seeds(len(configs) - 1)):
        raise ConfigError(
            f"sweep.compare.max_seeds={settings.max_seeds} can decide nothing: beside {len(configs) - 1} "
            f"candidate{'s' if len(configs) > 2 else ''} the first verdict needs {needed} seeds; raise it, e.g. to 20"
        )
    assert settings.margin is not None, "its group checks it"
    return Compared(axis, grid, baseline, metric, direction == "maximize", settings.margin, seeds)


def _find_axis(settings: CompareConfig, axes: Sequence[Axis]) -> Axis:
    """Returns the axis that is compared; raises `ConfigError` where it does not vary, or where another one does."""
    swept = {axis.key.lstrip("+"): axis for axis in axes if len(set(axis.overrides)) > 1}
    by = str(settings.by)
    if SEED in swept:
        raise ConfigError(
            f"sweep.compare adds the seeds itself, and {SEED}={listed(map(_value, swept[SEED].overrides))} sweeps them "
            "too; leave it out (or give the first one alone), and set sweep.compare.max_seeds"
        )
    if by not in swept:
        raise ConfigError(
            f"sweep.compare.by={by} has a single value here{did_you_mean(by, swept)}; give it several, the baseline "
            f"among them, e.g. -m {by}=A,B"
        )
    if others := [key for key in swept if key != by]:
        raise ConfigError(
            f"sweep.compare compares the values of {by}, and {others[0]} varies too; give it one value, or start a "
            "sweep for each"
        )
    return swept[by]


def _find_baseline(axis: Axis, settings: CompareConfig) -> str:
    """Returns the baseline as its override writes it; raises `ConfigError` if it is none of the values."""
    baseline = settings.baseline
    for text, override in zip(axis.overrides, parse_overrides(axis.overrides), strict=True):
        value = plain_value(override.value())
        is_equal = value == baseline and isinstance(value, bool) == isinstance(baseline, bool)
        if is_equal or (isinstance(baseline, str) and baseline == _value(text)):
            return _value(text)
    texts = listed(map(_value, axis.overrides))
    if baseline is None:
        raise ConfigError(f"sweep.compare.baseline is not set; name the value to compare with, one of {texts}")
    raise ConfigError(
        f"sweep.compare.baseline={written(baseline)} is no value of {settings.by} here; choose one of {texts}"
    )


def _find_metric(settings: CompareConfig, configs: Sequence[Config]) -> tuple[str, str]:
    """Returns the metric and its direction; raises `ConfigError` where the runs do not measure it."""
    if configs[0].sweep.detach:
        raise ConfigError(
            "sweep.detach=true: sweep.compare needs the result of each seed to add the next one; leave it out"
        )
    metric = settings.metric or configs[0].objective
    if metric is None:
        raise ConfigError("sweep.compare.metric is not set, and objective=null; name a metric, e.g. eval_loss")
    for config in configs:
        check_measured(config, metric, "sweep.compare.metric")
    direction = better_direction(metric) if settings.direction is Direction.auto else settings.direction.value
    if direction is None:
        raise ConfigError(
            f"sweep.compare.metric={metric}: its name does not say which values are better; add "
            "sweep.compare.direction=maximize or sweep.compare.direction=minimize"
        )
    return metric, direction


def _check_configs(axis: Axis, metric: str, configs: Sequence[Config]) -> None:
    """Raises `ConfigError` for runs whose differences say nothing."""
    task = configs[0].task
    if not (task.name.trains and task.train):
        raise ConfigError(
            f"sweep.compare adds training runs with other seeds, and these runs (task={written(task.name)}) train "
            "nothing; train each value with task=train"
        )
    dicts = [config_to_dict(config) for config in configs]
    known: dict[str, str] = {}
    for text, saved in zip(axis.overrides, dicts, strict=True):
        if (digits := identity(saved)) in known:
            raise ConfigError(f"{known[digits]} and {text} are the same run; leave one of them out")
        known[digits] = text
    keys = (*HELD_OUT_KEYS, *(SPLIT_KEYS if any(config.data.splits_off for config in configs) else ()))
    flat = [dict(flatten(saved)) for saved in dicts]
    for text, values in zip(axis.overrides, flat, strict=True):
        key = next((key for key in keys if _below(flat[0], key) != _below(values, key)), None)
        if key is not None and metric.startswith("eval_"):
            raise ConfigError(
                f"{axis.overrides[0]} and {text} are measured on other rows ({key} differs), so their {metric} cannot "
                "be compared; name the same rows for all with data.eval_path=FILE"
            )


def _below(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name == key or name.startswith(f"{key}.")}


class Rounds:
    """The jobs of a sweep that answers a question: those of a round, and the next round when all of them have ended."""

    is_known = True

    def __init__(self, sweep: Sweep, compared: Compared) -> None:
        self.sweep = sweep
        self.question, self._overrides = compared.question(sweep)
        self._waiting = deque[Job]()
        self._given = dict[str, None]()
        """The jobs that this command has planned so far."""
        self._decided: dict[str, Verdict] | None = None
        sweep.question = self.question
        for name in self._overrides:  # that a killed command had queued
            if name in sweep.jobs and sweep.jobs[name].status is Status.queued and not sweep.jobs[name].folder.exists():
                del sweep.jobs[name]
        say(describe_question(self.question))
        self._plan()

    def __len__(self) -> int:
        """How many jobs of this round are still to start."""
        return len(self._waiting)

    def next(self) -> tuple[Job, list[str]] | None:
        """Returns the next job with its overrides; None: there is none now, and none at all once all have ended."""
        if not self._waiting and not self._runs:
            self._plan()
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        return job, self._overrides[job.name][0]

    @property
    def failed(self) -> list[Job]:
        """The jobs of this command that failed or were interrupted."""
        return [job for job in self._jobs(self._given) if job.status in (Status.failed, Status.interrupted)]

    @property
    def _runs(self) -> bool:
        return any(job.status in (Status.queued, Status.running) for job in self._jobs(self._given))

    def _jobs(self, names: Iterable[str]) -> list[Job]:
        return [self.sweep.jobs[name] for name in names]

    def _plan(self) -> None:
        """Queues the next round; a job that has failed under this command is not tried again."""
        comparisons = judge(self.question, self.sweep.jobs)
        told, self._decided = self._decided, {item.value: item.verdict for item in comparisons}
        for item in comparisons:
            if told is not None and item.verdict is not told[item.value]:
                say(f"     {describe_comparison(self.question, item)}")
        for name in missing_jobs(self.question, comparisons):
            if name in self._given:
                continue
            distinct = self._overrides[name][1]
            job = self.sweep.jobs.setdefault(name, Job(self.sweep.folder / name, overrides=distinct))
            if job.status is not Status.finished:
                job.queue(distinct)
                self._given[name] = None
                self._waiting.append(job)
        self.sweep.write()
