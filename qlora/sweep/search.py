"""Searches by Optuna: a study in the sweep's folder proposes a job whenever a slot is free, and can be continued."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import CategoricalDistribution, IntDistribution, check_distribution_compatibility
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from rich.text import Text

from qlora.compose import explain, to_config
from qlora.console import printable, say, say_rows
from qlora.errors import ConfigError
from qlora.files import write_text
from qlora.membership import TRIAL_VARIABLE
from qlora.schema import Config, EvaluationName, TaskName
from qlora.study import TrialLink, build, build_pruner, hide_password, open_storage
from qlora.sweep.jobs import Job, Status, identity, read_job, slug, write_status
from qlora.sweep.launcher import JobsFailed, command, config_flags, find_job, open_sweep, prepare
from qlora.sweep.leaderboard import describe, write_leaderboard
from qlora.sweep.overview import Sweep
from qlora.sweep.processes import RunTasks, Task
from qlora.sweep.screen import Screen
from qlora.sweep.settings import SearchSettings
from qlora.sweep.space import Space, build_space
from qlora.sweep.trackers import track_sweep
from qlora.wording import format_metric, higher_is_better

RESULTS_FILE = "optimization_results.yaml"
SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "grid": RandomSampler,  # never asked: every point of a grid is enqueued
    "cmaes": CmaEsSampler,
}
TRIALS = 20
"""Of a study whose `n_trials` is unset."""
SHOWN = 5
"""Of a front of best trials."""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
JOB, SWEEP, CUT_OFF = "job", "sweep", "cut off"
"""What the study knows of ours: a trial's job folder, the sweep's, and that a trial is tried again as another."""


@dataclass(frozen=True)
class Goal:
    """A metric and where it shall go."""

    metric: str
    direction: Literal["minimize", "maximize"]

    def worst(self) -> float:
        """Returns what a diverged training counts as."""
        return -math.inf if self.direction == "maximize" else math.inf


@dataclass(frozen=True)
class Planned:
    """A trial whose job is to run."""

    job: Job
    words: list[str]
    """All overrides."""
    link: TrialLink | None
    """Where the job reports to, if it may be pruned."""


def search(
    config: DictConfig,
    loader: ConfigLoader,
    overrides: list[str],
    *,
    launch: Callable[..., Any],
    build: Callable[[Config], RunTasks] | None,
) -> None:
    """Runs the trials that the study lacks: by an engine of our own, or in batches by another launcher's `launch`.

    Raises `ConfigError` for every mistake before a job starts, and `JobsFailed` at the end where a trial failed.
    """
    prepare(config)
    settings = OmegaConf.to_object(config.hydra.sweeper)
    assert isinstance(settings, SearchSettings)
    settings.check()
    space = build_space(overrides, settings.params, settings.conditions, loader)

    def compose(words: list[str]) -> Config:
        return to_config(loader.load_sweep_config(config, words))

    if settings.objectives:  # the jobs return the first
        space.fixed.append(f"objective={settings.objectives[0]}")
    examples = dict.fromkeys(tuple(space.words(point)) for point in space.examples())
    configs = [compose([*space.fixed, *words]) for words in examples]
    goals = find_goals(settings, configs)
    check_pruning(settings, configs, goals)
    if configs[0].sweep.detach:
        raise ConfigError("sweep.detach=true: a search waits for the results that it goes on from; leave it out")
    run = build(configs[0]) if build is not None else None
    with open_sweep(Path(str(config.hydra.sweep.dir)), configs) as sweep:
        sweep.goals = {goal.metric: goal.direction for goal in goals}
        own = Search(settings, space, goals, sweep, compose, configs[0])
        OmegaConf.save(config, sweep.folder / "multirun.yaml")  # as Hydra's own sweeper does
        try:
            if run is None:
                _run_in_batches(own, launch)
            else:
                _run_one_by_one(own, config, run)
        finally:
            own.write_results()
            write_leaderboard(sweep)
        own.summary()
        track_sweep(sweep, configs[0].tracking)
        own.complain()


def find_goals(settings: SearchSettings, configs: Sequence[Config]) -> list[Goal]:
    """Returns the metrics to search by; raises `ConfigError` for one that the jobs do not measure."""
    names = settings.objectives or ([configs[0].objective] if configs[0].objective else [])
    if not names:
        raise ConfigError("objective=null: a search needs a metric to go by, e.g. objective=eval_loss")
    given = settings.directions
    if given is not None and len(given) != len(names):
        raise ConfigError(
            f"hydra.sweeper.direction has {len(given)} of them for {len(names)} objectives ({', '.join(names)}); give "
            "each its own, or leave it out"
        )
    for config in configs:
        for name in names:
            _check_measured(config, name)
    directions = given or ["maximize" if higher_is_better(name) else "minimize" for name in names]
    goals = [Goal(name, direction) for name, direction in zip(names, directions, strict=True)]
    if len(goals) > 1 and settings.sampler == "cmaes":
        raise ConfigError("hydra.sweeper.sampler=cmaes knows a single objective; choose tpe for several")
    return goals


def _check_measured(config: Config, name: str) -> None:
    try:
        dataclasses.replace(config, objective=name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("objective=", "hydra.sweeper.objectives: ", 1)) from error
    if missing := _what_lacks(config, name):
        raise ConfigError(f"objective={name} is not measured by these jobs; it needs {missing}")


def _what_lacks(config: Config, name: str) -> str | None:
    """Returns the override without which a job's result lacks a metric; None: it is there."""
    task, training = config.task, config.task.name is TaskName.train
    of_rows, of_base = name.startswith(("eval_", "base_eval_")), name.startswith("base_eval_")
    measuring = (
        (TaskName.train, TaskName.evaluate) if of_base else (TaskName.train, TaskName.evaluate, TaskName.predict)
    )
    needs = {
        "task=train": training or (of_rows and task.name in measuring),
        "task.train=true": task.train or of_rows,
        "task.evaluate=true": task.evaluate or not of_rows or not (training or of_base),
        "evaluation.baseline=true": config.evaluation.baseline or not of_base,
    }
    return next((need for need, fulfilled in needs.items() if not fulfilled), None)


def check_pruning(settings: SearchSettings, configs: Sequence[Config], goals: Sequence[Goal]) -> None:
    """Raises `ConfigError` where trials could not be judged while they train."""
    chosen = f"hydra.sweeper.pruner={settings.pruner}"
    if settings.pruner == "none":
        return
    if len(goals) > 1:
        names = ", ".join(goal.metric for goal in goals)
        raise ConfigError(f"{chosen} judges by a single objective, got {names}; leave one, or choose pruner=none")
    seen = ["eval_loss", "eval_perplexity"]
    if configs[0].evaluation.name is EvaluationName.mmlu:
        seen += [f"eval_mmlu_{configs[0].evaluation.split.value}_{name}" for name in ("accuracy", "loss")]
    if goals[0].metric not in seen:
        raise ConfigError(
            f"{chosen} needs an objective that is measured during training ({', '.join(seen)}), got "
            f"{goals[0].metric}; choose one of them, or pruner=none"
        )
    if any(config.trainer.eval_steps is None for config in configs):
        raise ConfigError(
            f"{chosen} judges by evaluations during training, but trainer.eval_steps is not set; set it, e.g. to a "
            "tenth of trainer.max_steps"
        )


def _run_one_by_one(own: Search, config: DictConfig, run: RunTasks) -> None:
    """Runs jobs by an engine that asks for the next trial whenever it has room."""
    with Screen(own.sweep, own.left) as screen:

        def next_task() -> Task | None:
            planned = own.next()
            screen.expect(own.left + len(own.open))
            if planned is None:
                return None
            environment = {} if planned.link is None else {TRIAL_VARIABLE: planned.link.to_text()}
            return Task(planned.job, command(config, planned.job.folder, planned.words), environment)

        def ended(job: Job) -> None:
            screen.ended(job)
            own.ended(job)

        run(next_task, on_start=screen.started, on_end=ended, on_wait=screen.waiting)


def _run_in_batches(own: Search, launch: Callable[..., Any]) -> None:
    """Runs jobs by another project's launcher, which waits for all of a batch."""
    started = 0
    while True:
        batch: list[Planned] = []
        while len(batch) < own.settings.batch_size and (planned := own.next()) is not None:
            write_status(planned.job.folder, Status.queued, overrides=planned.job.overrides, reason=None)
            batch.append(planned)
        if not batch:
            return
        launch([[*planned.words, *_link_words(planned.link)] for planned in batch], initial_job_idx=started)
        started += len(batch)
        for planned in batch:
            job = read_job(planned.job.folder)
            if job.status not in (Status.finished, Status.pruned, Status.failed):
                write_status(job.folder, Status.failed, reason="ended without a result")
                job = read_job(job.folder)
            own.sweep.update(job)
            own.ended(job)


def _link_words(link: TrialLink | None) -> list[str]:
    """Returns the override by which every launcher hands an environment variable to a job."""
    if link is None:
        return []
    return [f"++hydra.job.env_set.{TRIAL_VARIABLE}={QuotedString(link.to_text(), Quote.single).with_quotes()}"]


class Search:
    """Asks the study for trials, plans their jobs, and tells it what became of them."""

    def __init__(
        self,
        settings: SearchSettings,
        space: Space,
        goals: list[Goal],
        sweep: Sweep,
        compose: Callable[[list[str]], Config],
        example: Config,
    ) -> None:
        self.settings, self.space, self.goals, self.sweep, self._compose = settings, space, goals, sweep, compose
        self.open: dict[str, list[int]] = {}
        """The running jobs, with the numbers of the trials that wait for each: several if they are the same."""
        self.failed: list[str] = []
        """The jobs of the trials that failed under this command."""
        self._impossible: set[str] = set()
        self._pruner_kwargs = {**_pruner_defaults(settings, example), **settings.pruner_kwargs}
        self._storage = settings.storage or f"sqlite:///{(sweep.folder / 'study.db').absolute()}"
        self._study = self._open_study()
        self._study.sampler = self._build_sampler()  # refuses wrong arguments before anything is changed
        self._counted = 0
        self._recover()
        trials = self._study.get_trials(deepcopy=False)
        done = [trial.params for trial in trials if trial.state in COUNTED]
        self._counted, self._wanted = len(done), settings.n_trials or TRIALS
        self._grid: deque[dict[str, Any]] | None = None
        if settings.sampler == "grid":
            self._grid = deque(point for point in space.points() if point not in done)
            self._wanted = settings.n_trials or len(done) + len(self._grid)

    @property
    def left(self) -> int:
        """How many trials are still to be asked for."""
        left = self._wanted - self._counted - sum(map(len, self.open.values()))
        return max(left if self._grid is None else min(left, len(self._grid)), 0)

    def _open_study(self) -> optuna.Study:
        settings, folder = self.settings, self.sweep.folder
        pruner = build_pruner(settings.pruner, self._pruner_kwargs)
        study = optuna.create_study(
            storage=open_storage(self._storage),
            pruner=pruner,
            study_name=folder.name,
            directions=[goal.direction for goal in self.goals],
            load_if_exists=True,
        )
        self._check_same_study(study)
        if study.metric_names is None:
            study.set_metric_names([goal.metric for goal in self.goals])
            study.set_user_attr(SWEEP, str(folder.absolute()))
        return study

    def _build_sampler(self) -> BaseSampler:
        """Returns what draws the next point, by how many were drawn: so kills change nothing where one job runs."""
        settings, trials = self.settings, self._study.get_trials(deepcopy=False)
        own: dict[str, Any] = {"seed": settings.seed + sum(CUT_OFF not in trial.user_attrs for trial in trials)}
        if settings.sampler == "cmaes":
            own["warn_independent_sampling"] = False  # of choices, which are left to chance
        return build("sampler", settings.sampler, SAMPLERS[settings.sampler], settings.sampler_kwargs, **own)

    def _check_same_study(self, study: optuna.Study) -> None:
        """Raises `ConfigError` where the study is that of another search."""
        remedy = "choose another folder with name=NAME, or start with the same search to go on"
        names = study.metric_names or [goal.metric for goal in self.goals]
        stored = [f"{way.name.lower()} {name}" for way, name in zip(study.directions, names, strict=False)]
        wanted = [f"{goal.direction} {goal.metric}" for goal in self.goals]
        if stored != wanted:
            raise ConfigError(
                f"the study in {self.sweep.folder} is to {', '.join(stored)}, not to {', '.join(wanted)}; {remedy}"
            )
        owner = study.user_attrs.get(SWEEP)
        if self.settings.storage is not None and owner not in (None, str(self.sweep.folder.absolute())):
            raise ConfigError(
                f"hydra.sweeper.storage={hide_password(self._storage)} holds a study {study.study_name!r} of the sweep "
                f"in {owner}; choose another name with name=NAME"
            )
        for parameter in self.space.parameters:
            for trial in study.get_trials(deepcopy=False):
                if (before := trial.distributions.get(parameter.name)) is None:
                    continue
                try:
                    check_distribution_compatibility(before, parameter.distribution)
                except ValueError:
                    raise ConfigError(
                        f"{parameter.name}: the study in {self.sweep.folder} was begun with {_in_words(before)}, and "
                        f"now it is {_in_words(parameter.distribution)}, which Optuna cannot mix; {remedy}"
                    ) from None

    def _recover(self) -> None:
        """Takes up the trials of a command that was killed: told if their jobs have finished, else tried again."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            job = read_job(self.sweep.folder / trial.user_attrs[JOB]) if JOB in trial.user_attrs else None
            if job is not None and job.status in (Status.finished, Status.pruned):
                self._tell(trial.number, job)
                continue
            if self.settings.sampler != "grid" and trial.params:  # a grid knows what it lacks
                self._study.enqueue_trial(trial.params)
            self._study._storage.set_trial_user_attr(trial._trial_id, CUT_OFF, True)
            self._study.tell(trial.number, state=TrialState.FAIL)
        if self.settings.sampler == "grid":
            for _ in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self._study.tell(self._study.ask(), state=TrialState.FAIL)

    def next(self) -> Planned | None:
        """Returns the next job to run; None: there is none for now.

        A trial whose job has run, or runs now, is told what becomes of that.
        """
        while self.left > 0 and len(self.failed) <= self.settings.max_failures:
            trial = self._ask()
            own = self.space.words(self.space.suggest(trial))
            job = self._find_job(own)
            trial.set_user_attr(JOB, job.name)
            if job.name in self.open:
                self.open[job.name].append(trial.number)
            elif job.status in (Status.finished, Status.pruned) or job.name in (*self.failed, *self._impossible):
                self._tell(trial.number, job)
            else:
                self.open[job.name] = [trial.number]
                job.queue(own)
                self.sweep.update(job)
                return Planned(job, [*self.space.fixed, *own], self._link(trial))
        return None

    def ended(self, job: Job) -> None:
        """Tells the study how a job ended; trials of an interrupted one stay open for the next command."""
        numbers = self.open.pop(job.name)
        if job.status is not Status.interrupted:
            for number in numbers:
                self._tell(number, job)

    def _ask(self) -> optuna.Trial:
        if self._grid is not None:
            self._study.enqueue_trial(self._grid.popleft())
        self._study.sampler = self._build_sampler()
        return self._study.ask()

    def _find_job(self, own: list[str]) -> Job:
        """Returns the job of a trial's overrides; where they exclude each other, one that has failed."""
        try:
            return find_job(self.sweep, self._compose([*self.space.fixed, *own]), own)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            folder = self.sweep.folder / f"{slug(own)}-{identity({'overrides': own})}"
            write_status(folder, Status.failed, overrides=own, reason=str(explain(error)))
            job = read_job(folder)
            if job.name not in self._impossible:
                say(Text(printable(describe(job)), style="red"))
            self._impossible.add(job.name)
            self.sweep.update(job)
            return job

    def _link(self, trial: optuna.Trial) -> TrialLink | None:
        if self.settings.pruner == "none":
            return None
        return TrialLink(
            storage=self._storage,
            study=self._study.study_name,
            trial_id=trial._trial_id,
            metric=self.goals[0].metric,
            pruner=self.settings.pruner,
            pruner_kwargs=self._pruner_kwargs,
        )

    def _tell(self, number: int, job: Job) -> None:
        values = [job.metrics.get(goal.metric) for goal in self.goals]
        if job.status is Status.pruned:
            self._study.tell(number, state=TrialState.PRUNED)
        elif job.status is Status.finished and None not in values:
            # A training that diverged tells the sampler something; a failed trial would not.
            told = [goal.worst() if value is None or math.isnan(value) else value
                    for goal, value in zip(self.goals, values, strict=True)]  # fmt: skip
            self._study.tell(number, told, state=TrialState.COMPLETE)
        else:
            if job.status is Status.finished:
                say(f"{job.name} has finished, but measured no {', '.join(goal.metric for goal in self.goals)}")
            self._study.tell(number, state=TrialState.FAIL)
            self.failed.append(job.name)
            return
        self._counted += 1

    def _best(self) -> list[FrozenTrial]:
        """Returns the best trial, or with several objectives those that none is better than in all of them."""
        if not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return []
        return [self._study.best_trial] if len(self.goals) == 1 else self._study.best_trials

    def write_results(self) -> None:
        """Writes the best trials so far with the commands that run them alone."""
        solutions = [
            {
                "params": trial.params,
                "values": trial.values,
                "job": trial.user_attrs.get(JOB),
                "command": self._again(trial),
            }
            for trial in self._best()
        ]
        if not solutions:
            return
        record: dict[str, Any] = {"name": "optuna", "solutions": solutions}
        if len(self.goals) == 1:
            [best] = solutions
            record = {"name": "optuna", "best_params": best["params"], "best_value": best["values"][0]}
            record |= {"job": best["job"], "command": best["command"]}
        write_text(self.sweep.folder / RESULTS_FILE, yaml.safe_dump(record, sort_keys=False, width=10_000))

    def _again(self, trial: FrozenTrial) -> str:
        words = [*self.space.fixed, *self.space.words(trial.params)]
        plain = ["hydra.mode=RUN"] if any(word.startswith("sweep=") for word in words) else []
        return shlex.join(["qlora", *config_flags(), *words, *plain])

    def summary(self) -> None:
        """Prints the table, and the best trials with their commands."""
        Screen(self.sweep, 0).summary()
        rows = [("study", hide_password(self._storage))]
        if (results := self.sweep.folder / RESULTS_FILE).exists():
            rows.append(("results", str(results)))
        for trial in self._best()[:SHOWN]:
            found = "  ".join(f"{goal.metric} {format_metric(goal.metric, value)}"
                              for goal, value in zip(self.goals, trial.values, strict=True))  # fmt: skip
            rows += [("best", f"{found}  {' '.join(self.space.words(trial.params))}"), ("again", self._again(trial))]
        say_rows(rows)

    def complain(self) -> None:
        """Raises `JobsFailed` if a trial failed under this command."""
        if not self.failed:
            return
        board, count, limit = self.sweep.folder / "leaderboard.md", len(self.failed), self.settings.max_failures
        noun = "trial" if count == 1 else "trials"
        stopped = (
            f"more than hydra.sweeper.max_failures={limit} allows, so the search stopped: " if count > limit else ""
        )
        raise JobsFailed(
            f"{count} {noun} failed{', ' if stopped else ': '}{stopped}{shlex.quote(str(board))} says why; the same "
            "command goes on with the search"
        )


def _pruner_defaults(settings: SearchSettings, example: Config) -> dict[str, Any]:
    """Returns what the pruner can know of the training: from its first evaluation to its end."""
    trainer = example.trainer
    if settings.pruner != "hyperband" or trainer.eval_steps is None:
        return {}
    return {"min_resource": trainer.eval_steps, "max_resource": trainer.max_steps or "auto"}


def _in_words(space: Any) -> str:
    if isinstance(space, CategoricalDistribution):
        return f"choice({','.join(map(str, space.choices))})"
    kind = "a logarithmic" if space.log else "a linear"
    return f"{kind} scale of {'whole' if isinstance(space, IntDistribution) else 'real'} numbers"
