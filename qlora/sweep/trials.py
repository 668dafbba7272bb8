"""A search: it plans a job for each trial of the study and records in the study how the job ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import FrozenTrial, TrialState

from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.runtime.console import say
from qlora.runtime.search_trial import TrialLink
from qlora.sweep.job_processes import ASK_SECONDS
from qlora.sweep.jobs import Job, Status, read_job
from qlora.sweep.launcher import find_job, refuse
from qlora.sweep.study import JOB, Study


@dataclass(frozen=True)
class Planned:
    """The job to run for a trial."""

    job: Job
    overrides: list[str]
    link: TrialLink | None
    """Where the job reports its evaluations, if it may be pruned."""


class Search:
    """Asks the study for trials, plans their jobs, and reports to it how the jobs ended."""

    def __init__(self, study: Study, compose: Callable[[list[str]], Config]) -> None:
        self.study, self.sweep, self._compose = study, study.sweep, compose
        self.settings, self.space, self.goals = study.settings, study.space, study.goals
        self.open: dict[str, list[int]] = {}
        """The running jobs with the indices of the trials that wait for each: several if their configs are equal."""
        self.failed: list[str] = []
        """The jobs of the trials that failed under this command."""
        self._impossible: set[str] = set()
        self._awaited: dict[str, list[int]] = {}
        """Jobs that another command runs in the folder, with the indices of our trials of the same config."""
        self._follows = False
        """Whether jobs of commands that are gone still run in the folder."""
        self._last_look = -math.inf
        """When the other commands were last looked at."""

    @property
    def left(self) -> int:
        """How many trials are still to be asked for."""
        return self.study.left(self.study.trials())

    def may_come(self) -> bool:
        """Returns whether this command may have to run trials that other commands began and might not finish."""
        if time.monotonic() - self._last_look > ASK_SECONDS:
            self.recover()
        if len(self.failed) > self.settings.max_failures:
            return False
        if self._awaited or self._follows:
            return True
        if self.settings.storage is None:
            return False
        trials = self.study.trials()
        return self.study.left(trials) > 0 or any(
            trial.state is TrialState.RUNNING and not self.study.presence.is_own(trial) for trial in trials
        )

    def recover(self) -> None:
        """Takes over the trials of commands that are gone: records finished ones, and retries the others."""
        self._last_look, self._follows = time.monotonic(), False
        for trial in self.study.abandoned():
            job = self._local_job(trial)
            if job is not None and job.status in (Status.finished, Status.pruned):
                self._tell(trial.number, job)
            elif job is not None and job.status is Status.running:  # on a cluster, jobs outlive the command
                self._follows = True
            else:
                self.study.give_up(trial)
        for name, indices in list(self._awaited.items()):
            job = read_job(self.sweep.folder / name)
            if job.status in (Status.finished, Status.pruned, Status.failed):
                for index in self._awaited.pop(name):
                    self._tell(index, job)
            elif job.status is not Status.running:
                del self._awaited[name]
                for trial in self.study.trials():
                    if trial.number in indices:
                        self.study.give_up(trial)

    def _local_job(self, trial: FrozenTrial) -> Job | None:
        """Returns the job of a trial as its folder says, if this sweep's folder contains it."""
        name = trial.user_attrs.get(JOB)
        return read_job(self.sweep.folder / name) if name and (self.sweep.folder / name).is_dir() else None

    def next(self) -> Planned | None:
        """Returns the next job to run; None: there is none for now.

        A trial whose job has run already, or is running, gets the result of that job.
        """
        if time.monotonic() - self._last_look > ASK_SECONDS:
            self.recover()
        while len(self.failed) <= self.settings.max_failures and self.study.left(trials := self.study.trials()) > 0:
            trial = self.study.ask(trials)
            if trial is None:
                continue
            overrides = self.space.overrides(self.space.suggest(trial))
            job = self._find_job(overrides)
            trial.set_user_attr(JOB, job.name)
            if job.name in self.open:
                self.open[job.name].append(trial.number)
            elif job.status in (Status.finished, Status.pruned) or job.name in (*self.failed, *self._impossible):
                self._tell(trial.number, job)
            elif self.sweep.is_shared and self._runs_elsewhere(job, trial.number):
                self._awaited.setdefault(job.name, []).append(trial.number)
            else:
                self.open[job.name] = [trial.number]
                job.queue(overrides)
                self.sweep.update(job)
                return Planned(job, [*self.space.fixed, *overrides], self.study.link(trial))
        return None

    def _runs_elsewhere(self, job: Job, index: int) -> bool:
        """Returns whether another command that shares the folder runs this job or is about to run it."""
        return read_job(job.folder).status is Status.running or any(
            trial.state is TrialState.RUNNING and trial.user_attrs.get(JOB) == job.name and trial.number < index
            and not self.study.presence.is_own(trial) and self.study.presence.shares_folder(trial)
            for trial in self.study.trials()
        )  # fmt: skip

    def ended(self, job: Job) -> None:
        """Records in the study how a job ended; the trials of an interrupted job stay open for the next command."""
        indices = self.open.pop(job.name)
        if job.status is not Status.interrupted:
            for index in indices:
                self._tell(index, job)

    def _find_job(self, overrides: list[str]) -> Job:
        """Returns the job of a trial's overrides; overrides that exclude each other make a failed job."""
        try:
            return find_job(self.sweep, self._compose([*self.space.fixed, *overrides]), overrides)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            job = refuse(self.sweep, overrides, error)
            self._impossible.add(job.name)
            self.sweep.write()
            return job

    def _tell(self, index: int, job: Job) -> None:
        """Records in the study how the job of a trial ended."""
        values = [job.metrics.get(goal.metric) for goal in self.goals]
        if job.status is Status.pruned:
            self.study.record(index, TrialState.PRUNED)
        elif job.status is Status.finished and None not in values:
            # Divergence is information for the sampler; Optuna ignores a failed trial.
            finite = [value if value is not None and math.isfinite(value) else goal.worst()
                    for goal, value in zip(self.goals, values, strict=True)]  # fmt: skip
            self.study.record(index, TrialState.COMPLETE, finite)
        else:
            if job.status is Status.finished:
                say(f"{job.name} finished without measuring {', '.join(goal.metric for goal in self.goals)}")
            self.study.record(index, TrialState.FAIL)
            self.failed.append(job.name)
