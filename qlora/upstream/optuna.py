"""Private parts of Optuna: trials that begin with their values, the ids of trials, and a sampler's pickled state."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial, TrialState

from qlora.errors import DataError

CMAES_STATE = {
    *(("cmaes._cma", "CMA"), ("cmaes._sepcma", "SepCMA"), ("cmaes._cmawm", "CMAwM")),
    *((module, name) for module in ("numpy._core.multiarray", "numpy.core.multiarray")
      for name in ("scalar", "_reconstruct")),
    *(("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")),
}  # fmt: skip
"""The classes and functions that the pickled state of Optuna's CMA-ES names."""


class SafeCmaEsSampler(CmaEsSampler):
    """Optuna's sampler, which keeps its state in the study as a pickle; a pickle that calls anything else is refused.

    Optuna has no setting for this, so the method that unpickles is overridden.
    """

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            name = self._attr_key_optimizer
            parts = {key: text for key, text in trial.system_attrs.items() if key.startswith(name)}
            if parts:
                return _StateReader(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(parts)))).load()
        return None


class _StateReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CMAES_STATE:
            raise DataError(
                f"the study holds a sampler's state that would run {module}.{name}, so it is not Optuna's; choose "
                "another folder with name=NAME"
            )
        return super().find_class(module, name)


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Returns the id of a trial in the database, by which another process opens it."""
    return trial._trial_id


def create_running_trial(
    study: optuna.Study,
    params: Mapping[str, Any],
    attributes: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
) -> int:
    """Creates a running trial with its values and attributes in one transaction, and returns its id.

    `Study.ask` creates the trial first and sets the rest later, so that another process could see it without them.
    """
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING, params=dict(params), distributions=dict(distributions), user_attrs=dict(attributes)
    )
    return study._storage.create_new_trial(study._study_id, template_trial=template)


def start_waiting_trial(study: optuna.Study, attributes: Mapping[str, Any]) -> int | None:
    """Starts a trial that was enqueued, sets its attributes, and returns its id; None: no trial is waiting."""
    if (waiting := study._pop_waiting_trial_id()) is not None:
        for key, value in attributes.items():
            study._storage.set_trial_user_attr(waiting, key, value)
    return waiting


def fail_trial(study: optuna.Study, trial: FrozenTrial, attribute: str, value: Any) -> None:
    """Ends a trial as failed and says why in an attribute; does nothing if another process has ended it already.

    `Study.tell` takes no attribute, and a trial that has ended accepts none.
    """
    with contextlib.suppress(UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial._trial_id, attribute, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
