"""The study of a search in Optuna's database: opening it, asking it for trials, and recording how they ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution, check_distribution_compatibility
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from qlora.config.schema import Config
from qlora.errors import RunError
from qlora.runtime.run_folder import describe_changes
from qlora.runtime.search_trial import TrialLink, build_optuna, build_pruner, hide_password, open_storage
from qlora.sweep.engine_config import SearchSettings
from qlora.sweep.goals import Goal
from qlora.sweep.presence import Presence
from qlora.sweep.space import Space
from qlora.sweep.sweep_folder import Sweep
from qlora.upstream.optuna import SafeCmaEsSampler, create_running_trial, fail_trial, start_waiting_trial, trial_id

DEFAULT_TRIALS = 20
"""The trials of a search whose `n_trials` is unset."""
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
JOB, SHARED = "job", "shared"
"""Our attributes in the study: a trial's job folder, and the keys that all jobs share."""
CUT_OFF, RETRY, GIVEN_BACK = "cut off", "retry of", "given back"
"""Attributes of a trial: its command is gone and another trial retries it; the index of the trial that it retries; the
limit of trials was reached before it began."""
AGAIN = "again"
"""The value of `CUT_OFF` where the retrying trial has the attribute `RETRY`."""
SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "grid": RandomSampler,  # never asked: every point of a grid is enqueued
    "cmaes": SafeCmaEsSampler,
}


class Study:
    """Optuna's study of a search, which several commands may share."""

    def __init__(
        self,
        settings: SearchSettings,
        space: Space,
        goals: list[Goal],
        sweep: Sweep,
        example: Config,
        variable: str | None = None,
    ) -> None:
        """`variable` is the variable of the environment that holds the storage's URL, if any."""
        self.settings, self.space, self.goals, self.sweep = settings, space, goals, sweep
        self._pruner_kwargs = {**_pruner_defaults(settings, example), **settings.pruner_kwargs}
        self._storage = settings.storage or f"sqlite:///{(sweep.folder / 'study.db').absolute()}"
        self._variable = variable
        self._study = self._open()
        self._study.sampler = self._build_sampler(0)  # refuses wrong arguments before anything is changed
        self.presence = Presence(self._study, sweep.folder, is_alone=settings.storage is None)
        self._points = list(space.points()) if settings.sampler == "grid" else None
        self._asked: set[tuple[tuple[str, Any], ...]] = set()
        """The points of a grid that this command has asked for: it tries none twice."""

    @property
    def address(self) -> str:
        """The URL of the database without its password."""
        return hide_password(self._storage)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Returns the trials of these states, or all."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def abandoned(self) -> list[FrozenTrial]:
        """Returns the running trials whose commands are gone."""
        beats = self._study.user_attrs
        return [trial for trial in self.trials(TrialState.RUNNING) if self.presence.is_gone(trial, beats)]

    def best(self) -> list[FrozenTrial]:
        """Returns the best trial; with several objectives those that no other surpasses in all of them."""
        if not self.trials(TrialState.COMPLETE):
            return []
        return [self._study.best_trial] if len(self.goals) == 1 else self._study.best_trials

    def left(self, trials: Sequence[FrozenTrial]) -> int:
        """Returns how many trials are still to be asked for."""
        count = sum(map(_is_held, trials))
        if self._points is None:
            return max((self.settings.n_trials or DEFAULT_TRIALS) - count, 0)
        points = len(self._open_points(trials))
        return points if self.settings.n_trials is None else max(min(points, self.settings.n_trials - count), 0)

    def _open_points(self, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """Returns the points of a grid that this command has not asked for and no trial holds."""
        held = {_point_key(trial.params) for trial in trials if _is_held(trial)} | self._asked
        return [point for point in self._points or () if _point_key(point) not in held]

    def _open(self) -> optuna.Study:
        settings, sweep = self.settings, self.sweep
        storage = open_storage(self._storage)
        known = [study.study_name for study in storage.get_all_studies()] if settings.storage is None else []
        # A folder that was moved or copied keeps the study that it began.
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

    def _build_sampler(self, asked: int) -> BaseSampler:
        """Returns the sampler of the next point after `asked` points, so that a kill does not change what it samples.

        That holds where one job runs at a time.
        """
        defaults: dict[str, Any] = {"seed": self.settings.seed + asked}
        if self.settings.sampler == "cmaes":
            defaults["warn_independent_sampling"] = False  # CMA-ES leaves choices to chance
        return build_optuna(
            "sampler", self.settings.sampler, SAMPLERS[self.settings.sampler], self.settings.sampler_kwargs, **defaults
        )

    def _check_same_study(self, study: optuna.Study) -> None:
        """Raises a `UserError` if the study belongs to another search."""
        remedy = "choose another folder with name=NAME, or start the same search to resume it"
        names = study.metric_names or [goal.metric for goal in self.goals]
        saved = [f"{way.name.lower()} {name}" for way, name in zip(study.directions, names, strict=False)]
        requested = [f"{goal.direction} {goal.metric}" for goal in self.goals]
        if saved != requested:
            raise RunError(
                f"the study in {self.sweep.folder} is to {', '.join(saved)}, not to {', '.join(requested)}; {remedy}"
            )
        common = json.loads(study.user_attrs.get(SHARED, "{}"))
        if changes := describe_changes(common, self.sweep.common, {*common} & {*self.sweep.common}):
            raise RunError(
                f"hydra.sweeper.storage={self.address} holds a study {study.study_name!r} of another "
                f"config; changed:{changes}\nchoose another name with name=NAME, or start with the same config to "
                "search together"
            )
        for parameter in self.space.parameters:
            for trial in study.get_trials(deepcopy=False):
                if (previous := trial.distributions.get(parameter.name)) is None:
                    continue
                try:
                    check_distribution_compatibility(previous, parameter.distribution)
                except ValueError:
                    raise RunError(
                        f"{parameter.name}: the study in {self.sweep.folder} started with {_describe(previous)}, and "
                        f"now it is {_describe(parameter.distribution)}, which Optuna cannot mix; {remedy}"
                    ) from None

    def ask(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """Returns a new trial; None: another command was first, and this one gave up its trial."""
        mark = self.presence.attribute
        if self._points is not None:
            new_id = self._create(point := self._open_points(trials)[0], mark)
            self._asked.add(_point_key(point))
        elif (retry := _next_retry(trials)) is not None:
            new_id = self._create(retry.params, {**mark, RETRY: retry.number}, retry.distributions)
        elif (waiting := start_waiting_trial(self._study, mark)) is not None:
            new_id = waiting
        else:
            new_id = self._create({}, mark)
        trials = self.trials()
        new = next(trial for trial in trials if trial_id(trial) == new_id)
        if self._is_beaten(new, [trial for trial in trials if trial.number < new.number]):
            fail_trial(self._study, new, GIVEN_BACK, True)
            self._asked.discard(_point_key(new.params))
            return None
        asked = sum(
            not {CUT_OFF, GIVEN_BACK} & trial.user_attrs.keys() for trial in trials if trial.number < new.number
        )
        self._study.sampler = self._build_sampler(asked)
        return optuna.Trial(self._study, new_id)

    def _create(
        self, params: Mapping[str, Any], attributes: Mapping[str, Any], distributions: Mapping[str, Any] | None = None
    ) -> int:
        """Creates a running trial with its values and attributes, and returns its id."""
        known = distributions or {
            parameter.name: parameter.distribution for parameter in self.space.parameters if parameter.name in params
        }
        return create_running_trial(self._study, params, attributes, known)

    def _is_beaten(self, new: FrozenTrial, earlier: Sequence[FrozenTrial]) -> bool:
        """Returns whether earlier trials, those of other commands included, leave no room for this one."""
        held = [trial for trial in earlier if _is_held(trial)]
        limit = (self.settings.n_trials or DEFAULT_TRIALS) if self._points is None else self.settings.n_trials
        if limit is not None and len(held) >= limit:
            return True
        if self._points is not None:
            return any(_point_key(trial.params) == _point_key(new.params) for trial in held)
        retry = new.user_attrs.get(RETRY)
        return retry is not None and retry in _retried(earlier)

    def link(self, trial: optuna.Trial) -> TrialLink | None:
        """Returns where the job of a trial reports to, if trials may be pruned."""
        if self.settings.pruner == "none":
            return None
        return TrialLink(
            storage=self._storage if self._variable is None else None,
            variable=self._variable,
            study=self._study.study_name,
            trial_id=trial_id(trial),
            metric=self.goals[0].metric,
            pruner=self.settings.pruner,
            pruner_kwargs=self._pruner_kwargs,
        )

    def record(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Records how a trial ended, unless another command considered this one gone and has done so."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._study.tell(number, values, state=state, skip_if_finished=True)

    def give_up(self, trial: FrozenTrial) -> None:
        """Fails a trial whose command is gone, so that it is tried again."""
        fail_trial(self._study, trial, CUT_OFF, AGAIN)


def _is_held(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts: it has a result, or it is running."""
    return trial.state in (*COUNTED, TrialState.RUNNING)


def _point_key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _retried(trials: Sequence[FrozenTrial]) -> set[int]:
    """Returns the indices of the trials that other trials retry."""
    return {trial.user_attrs[RETRY] for trial in trials
            if RETRY in trial.user_attrs and GIVEN_BACK not in trial.user_attrs}  # fmt: skip


def _next_retry(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Returns the first trial that was cut off and that no other trial retries yet."""
    retried = _retried(trials)
    return next((trial for trial in trials if trial.user_attrs.get(CUT_OFF) == AGAIN and trial.params
                 and trial.state is TrialState.FAIL and trial.number not in retried), None)  # fmt: skip


def _pruner_defaults(settings: SearchSettings, example: Config) -> dict[str, Any]:
    """Returns the steps between which Hyperband prunes: the first evaluation and the end of training."""
    trainer = example.trainer
    if settings.pruner != "hyperband" or not isinstance(trainer.eval_steps, int):  # a share of an epoch needs the rows
        return {}
    return {"min_resource": trainer.eval_steps, "max_resource": trainer.max_steps or "auto"}


def _describe(space: Any) -> str:
    if isinstance(space, CategoricalDistribution):
        return f"choice({','.join(map(str, space.choices))})"
    kind = "a logarithmic" if space.log else "a linear"
    return f"{kind} scale of {'whole' if isinstance(space, IntDistribution) else 'real'} numbers"
