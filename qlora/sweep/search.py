"""Searches by Optuna: a study in the sweep's folder proposes a job whenever a slot is free, and can be continued."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pickle
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
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
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from qlora.config.compose import config_to_dict, storage_variable, to_config
from qlora.config.schema import Config, EvaluationName, TaskName
from qlora.errors import ConfigError, UserError
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import say, say_rows
from qlora.runtime.folder_lock import in_turn
from qlora.runtime.run_folder import describe_changes
from qlora.runtime.search_trial import TrialLink, build, build_pruner, hide_password, open_storage
from qlora.runtime.sweep_job import TRIAL_VARIABLE
from qlora.sweep.engine_config import SearchSettings
from qlora.sweep.job_processes import ASK_SECONDS, RunTasks, Task
from qlora.sweep.jobs import Job, Status, read_job, write_status
from qlora.sweep.launcher import JobsFailed, command, config_flags, find_job, open_sweep, prepare, refuse
from qlora.sweep.leaderboard import write_leaderboard
from qlora.sweep.live_table import Screen
from qlora.sweep.overview import Sweep, common_facts
from qlora.sweep.searchers import Presence
from qlora.sweep.space import Space, build_space
from qlora.sweep.summary_run import track_sweep
from qlora.text import format_metric, higher_is_better

RESULTS_FILE = "optimization_results.yaml"
STATE = {
    *(("cmaes._cma", "CMA"), ("cmaes._sepcma", "SepCMA"), ("cmaes._cmawm", "CMAwM")),
    *((module, name) for module in ("numpy._core.multiarray", "numpy.core.multiarray")
      for name in ("scalar", "_reconstruct")),
    *(("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")),
}  # fmt: skip
"""What the pickled state of Optuna's CMA-ES is made of."""
TRIALS = 20
"""Of a study whose `n_trials` is unset."""
SHOWN = 5
"""Of a front of best trials."""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
JOB, SHARED = "job", "shared"
"""What the study knows of ours: a trial's job folder, and what all jobs share."""
CUT_OFF, RETRY, GIVEN_BACK = "cut off", "retry of", "given back"
"""Of a trial: that its command is gone, so that another tries it again; the number of the one that it tries again; and
that another command was first."""
AGAIN = "again"
"""The value of `CUT_OFF` where the retry is marked with `RETRY`."""


class SafeCmaEsSampler(CmaEsSampler):
    """Optuna's sampler, whose state is a pickle in the study: one that calls anything but what it wrote is refused."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            name = self._attr_key_optimizer
            parts = {key: text for key, text in trial.system_attrs.items() if key.startswith(name)}
            if parts:
                return _StateReader(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(parts)))).load()
        return None


class _StateReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STATE:
            raise ConfigError(
                f"the study holds a sampler's state that would run {module}.{name}, so it is not Optuna's; choose "
                "another folder with name=NAME"
            )
        return super().find_class(module, name)


SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "grid": RandomSampler,  # never asked: every point of a grid is enqueued
    "cmaes": SafeCmaEsSampler,
}


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
    shared = common_facts([config_to_dict(each) for each in configs])
    is_alone = settings.storage is None
    with (
        open_sweep(Path(str(config.hydra.sweep.dir)), shared, configs[0].objective, is_alone=is_alone) as sweep,
        contextlib.ExitStack() as stack,
    ):
        sweep.goals, sweep.is_shared = {goal.metric: goal.direction for goal in goals}, not is_alone
        variable = storage_variable(config.hydra.sweeper._get_node("storage")._value())
        own = Search(settings, space, goals, sweep, compose, configs[0], variable)
        stack.enter_context(own.presence.shown())
        own.recover()
        OmegaConf.save(config, sweep.folder / "multirun.yaml")  # as Hydra's own sweeper does
        try:
            if run is None:
                _run_in_batches(own, launch)
            else:
                _run_one_by_one(own, config, run)
        finally:
            own.write_results()
            with in_turn(sweep.folder):
                sweep.write()
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
    except UserError as error:
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

        run(
            next_task,
            on_start=screen.started,
            on_end=ended,
            on_wait=screen.waiting,
            may_come=own.may_come,
        )


def _run_in_batches(own: Search, launch: Callable[..., Any]) -> None:
    """Runs jobs by another project's launcher, which waits for all of a batch."""
    started = 0
    while True:
        batch: list[Planned] = []
        while len(batch) < own.settings.batch_size and (planned := own.next()) is not None:
            write_status(planned.job.folder, Status.queued, overrides=planned.job.overrides, reason=None)
            batch.append(planned)
        if not batch and own.may_come():
            time.sleep(ASK_SECONDS)
            continue
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
        variable: str | None = None,
    ) -> None:
        """`variable` is the one of the environment that the storage's URL comes from."""
        self.settings, self.space, self.goals, self.sweep, self._compose = settings, space, goals, sweep, compose
        self.open: dict[str, list[int]] = {}
        """The running jobs, with the numbers of the trials that wait for each: several if they are the same."""
        self.failed: list[str] = []
        """The jobs of the trials that failed under this command."""
        self._impossible: set[str] = set()
        self._pruner_kwargs = {**_pruner_defaults(settings, example), **settings.pruner_kwargs}
        self._storage = settings.storage or f"sqlite:///{(sweep.folder / 'study.db').absolute()}"
        self._variable = variable
        self._study = self._open_study()
        self._study.sampler = self._build_sampler(0)  # refuses wrong arguments before anything is changed
        self.presence = Presence(self._study, sweep.folder, is_alone=settings.storage is None)
        self._awaited: dict[str, list[int]] = {}
        """Jobs that another command runs in the folder, with the numbers of our trials that are the same."""
        self._follows = False
        """Whether jobs of commands that are gone still run in the folder."""
        self._looked = -math.inf
        """When the other commands were looked at."""
        self._points = list(space.points()) if settings.sampler == "grid" else None
        self._asked: set[tuple[tuple[str, Any], ...]] = set()
        """The points of a grid that this command has asked for: it tries none twice."""

    @property
    def left(self) -> int:
        """How many trials are still to be asked for."""
        return self._left(self._trials())

    def _left(self, trials: Sequence[FrozenTrial]) -> int:
        count = sum(map(_is_held, trials))
        if self._points is None:
            return max((self.settings.n_trials or TRIALS) - count, 0)
        points = len(self._open_points(trials))
        return points if self.settings.n_trials is None else max(min(points, self.settings.n_trials - count), 0)

    def _open_points(self, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """Returns the points of a grid that this command is still to ask for, and that no trial holds."""
        held = {_point_key(trial.params) for trial in trials if _is_held(trial)} | self._asked
        return [point for point in self._points or () if _point_key(point) not in held]

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def may_come(self) -> bool:
        """Returns whether trials of other commands may still fail to end, so that this one is to run them."""
        if time.monotonic() - self._looked > ASK_SECONDS:
            self.recover()
        if len(self.failed) > self.settings.max_failures:
            return False
        if self._awaited or self._follows:
            return True
        if self.settings.storage is None:
            return False
        trials = self._trials()
        return self._left(trials) > 0 or any(
            trial.state is TrialState.RUNNING and not self.presence.is_own(trial) for trial in trials
        )

    def _open_study(self) -> optuna.Study:
        settings, sweep = self.settings, self.sweep
        storage = open_storage(self._storage)
        known = [study.study_name for study in storage.get_all_studies()] if settings.storage is None else []
        # A folder that was moved, or copied, goes on with the study that it began.
        sweep.study = known[0] if len(known) == 1 else sweep.study or sweep.folder.name
        study = optuna.create_study(
            storage=storage,
            pruner=build_pruner(settings.pruner, self._pruner_kwargs),
            study_name=sweep.study,
            directions=[goal.direction for goal in self.goals],
            load_if_exists=True,
        )
        self._check_same_study(study)
        if study.metric_names is None:
            study.set_metric_names([goal.metric for goal in self.goals])
        if SHARED not in study.user_attrs:
            study.set_user_attr(SHARED, json.dumps(sweep.common))
        return study

    def _build_sampler(self, drawn: int) -> BaseSampler:
        """Returns what draws the next point where `drawn` were: so kills change nothing where one job runs."""
        own: dict[str, Any] = {"seed": self.settings.seed + drawn}
        if self.settings.sampler == "cmaes":
            own["warn_independent_sampling"] = False  # of choices, which are left to chance
        return build(
            "sampler", self.settings.sampler, SAMPLERS[self.settings.sampler], self.settings.sampler_kwargs, **own
        )

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
        common = json.loads(study.user_attrs.get(SHARED, "{}"))
        if changes := describe_changes(common, self.sweep.common, {*common} & {*self.sweep.common}):
            raise ConfigError(
                f"hydra.sweeper.storage={hide_password(self._storage)} holds a study {study.study_name!r} of another "
                f"config; changed:{changes}\nchoose another name with name=NAME, or start with the same config to "
                "search together"
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

    def recover(self) -> None:
        """Takes up the trials of commands that are gone: told if their jobs have finished, else tried again."""
        self._looked, self._follows = time.monotonic(), False
        beats = self._study.user_attrs
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self.presence.is_gone(trial, beats):
                continue
            job = self._own_job(trial)
            if job is not None and job.status in (Status.finished, Status.pruned):
                self._tell(trial.number, job)
            elif job is not None and job.status is Status.running:  # on a cluster, jobs outlive the command
                self._follows = True
            else:
                self._give_up(trial, CUT_OFF, AGAIN)
        for name, numbers in list(self._awaited.items()):
            job = read_job(self.sweep.folder / name)
            if job.status in (Status.finished, Status.pruned, Status.failed):
                for number in self._awaited.pop(name):
                    self._tell(number, job)
            elif job.status is not Status.running:
                del self._awaited[name]
                for trial in self._trials():
                    if trial.number in numbers:
                        self._give_up(trial, CUT_OFF, AGAIN)

    def _own_job(self, trial: FrozenTrial) -> Job | None:
        """Returns the job of a trial as its folder tells, if it is in ours."""
        name = trial.user_attrs.get(JOB)
        return read_job(self.sweep.folder / name) if name and (self.sweep.folder / name).is_dir() else None

    def _give_up(self, trial: FrozenTrial, mark: str, value: Any) -> None:
        """Ends a trial that gives nothing; another command may have done so, or told it, in the meantime."""
        storage = self._study._storage
        with contextlib.suppress(UpdateFinishedTrialError):
            storage.set_trial_user_attr(trial._trial_id, mark, value)
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def next(self) -> Planned | None:
        """Returns the next job to run; None: there is none for now.

        A trial whose job has run, or runs now, is told what becomes of that.
        """
        if time.monotonic() - self._looked > ASK_SECONDS:
            self.recover()
        while len(self.failed) <= self.settings.max_failures and self._left(trials := self._trials()) > 0:
            trial = self._ask(trials)
            if trial is None:
                continue
            own = self.space.words(self.space.suggest(trial))
            job = self._find_job(own)
            trial.set_user_attr(JOB, job.name)
            if job.name in self.open:
                self.open[job.name].append(trial.number)
            elif job.status in (Status.finished, Status.pruned) or job.name in (*self.failed, *self._impossible):
                self._tell(trial.number, job)
            elif self.sweep.is_shared and self._runs_elsewhere(job, trial.number):
                self._awaited.setdefault(job.name, []).append(trial.number)
            else:
                self.open[job.name] = [trial.number]
                job.queue(own)
                self.sweep.update(job)
                return Planned(job, [*self.space.fixed, *own], self._link(trial))
        return None

    def _runs_elsewhere(self, job: Job, number: int) -> bool:
        """Returns whether another command that shares the folder runs this job, or is about to."""
        return read_job(job.folder).status is Status.running or any(
            trial.state is TrialState.RUNNING and trial.user_attrs.get(JOB) == job.name and trial.number < number
            and not self.presence.is_own(trial) and self.presence.shares_folder(trial)
            for trial in self._trials()
        )  # fmt: skip

    def ended(self, job: Job) -> None:
        """Tells the study how a job ended; trials of an interrupted one stay open for the next command."""
        numbers = self.open.pop(job.name)
        if job.status is not Status.interrupted:
            for number in numbers:
                self._tell(number, job)

    def _ask(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """Returns a new trial; None: another command was first, and this one gave its trial back."""
        storage, mark = self._study._storage, self.presence.attribute
        if self._points is not None:
            trial_id = self._create(point := self._open_points(trials)[0], mark)
            self._asked.add(_point_key(point))
        elif (retry := _next_retry(trials)) is not None:
            trial_id = self._create(retry.params, {**mark, RETRY: retry.number}, retry.distributions)
        elif (enqueued := self._study._pop_waiting_trial_id()) is not None:
            trial_id = enqueued
            for key, value in mark.items():
                storage.set_trial_user_attr(trial_id, key, value)
        else:
            trial_id = self._create({}, mark)
        trials = self._trials()
        new = next(trial for trial in trials if trial._trial_id == trial_id)
        if self._is_beaten(new, [trial for trial in trials if trial.number < new.number]):
            self._give_up(new, GIVEN_BACK, True)
            self._asked.discard(_point_key(new.params))
            return None
        drawn = sum(
            not {CUT_OFF, GIVEN_BACK} & trial.user_attrs.keys() for trial in trials if trial.number < new.number
        )
        self._study.sampler = self._build_sampler(drawn)
        return optuna.Trial(self._study, trial_id)

    def _create(
        self, params: Mapping[str, Any], attributes: Mapping[str, Any], distributions: Mapping[str, Any] | None = None
    ) -> int:
        """Makes a running trial at once with its values and its marks, and returns its id."""
        known = distributions or {each.name: each.distribution for each in self.space.parameters if each.name in params}
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING, params=dict(params), distributions=dict(known), user_attrs=dict(attributes)
        )
        return self._study._storage.create_new_trial(self._study._study_id, template_trial=template)

    def _is_beaten(self, new: FrozenTrial, earlier: Sequence[FrozenTrial]) -> bool:
        """Returns whether the trials before this one, of other commands too, leave no room for it."""
        held = [trial for trial in earlier if _is_held(trial)]
        limit = (self.settings.n_trials or TRIALS) if self._points is None else self.settings.n_trials
        if limit is not None and len(held) >= limit:
            return True
        if self._points is not None:
            return any(_point_key(trial.params) == _point_key(new.params) for trial in held)
        retry = new.user_attrs.get(RETRY)
        return retry is not None and retry in _retried(earlier)

    def _find_job(self, own: list[str]) -> Job:
        """Returns the job of a trial's overrides; where they exclude each other, one that has failed."""
        try:
            return find_job(self.sweep, self._compose([*self.space.fixed, *own]), own)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            job = refuse(self.sweep, own, error)
            self._impossible.add(job.name)
            self.sweep.write()
            return job

    def _link(self, trial: optuna.Trial) -> TrialLink | None:
        if self.settings.pruner == "none":
            return None
        return TrialLink(
            storage=self._storage if self._variable is None else None,
            variable=self._variable,
            study=self._study.study_name,
            trial_id=trial._trial_id,
            metric=self.goals[0].metric,
            pruner=self.settings.pruner,
            pruner_kwargs=self._pruner_kwargs,
        )

    def _tell(self, number: int, job: Job) -> None:
        values = [job.metrics.get(goal.metric) for goal in self.goals]
        if job.status is Status.pruned:
            self._record(number, TrialState.PRUNED)
        elif job.status is Status.finished and None not in values:
            # A training that diverged tells the sampler something; a failed trial would not.
            told = [value if value is not None and math.isfinite(value) else goal.worst()
                    for goal, value in zip(self.goals, values, strict=True)]  # fmt: skip
            self._record(number, TrialState.COMPLETE, told)
        else:
            if job.status is Status.finished:
                say(f"{job.name} has finished, but measured no {', '.join(goal.metric for goal in self.goals)}")
            self._record(number, TrialState.FAIL)
            self.failed.append(job.name)

    def _record(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Tells the study how a trial ended, unless another command, which took this one for gone, has done so."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._study.tell(number, values, state=state, skip_if_finished=True)

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


def _is_held(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts: it gave something, or runs."""
    return trial.state in (*COUNTED, TrialState.RUNNING)


def _point_key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _retried(trials: Sequence[FrozenTrial]) -> set[int]:
    """Returns the numbers of the trials that others try again."""
    return {trial.user_attrs[RETRY] for trial in trials
            if RETRY in trial.user_attrs and GIVEN_BACK not in trial.user_attrs}  # fmt: skip


def _next_retry(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Returns the first trial that was cut off and that none tries again yet."""
    retried = _retried(trials)
    return next((trial for trial in trials if trial.user_attrs.get(CUT_OFF) == AGAIN and trial.params
                 and trial.state is TrialState.FAIL and trial.number not in retried), None)  # fmt: skip


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
