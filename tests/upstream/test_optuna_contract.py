"""The private parts of Optuna that `qlora.upstream.optuna` uses exist and work as it expects."""

from __future__ import annotations

import hashlib
import inspect

import pytest

optuna = pytest.importorskip("optuna")

from optuna.distributions import FloatDistribution  # noqa: E402
from optuna.samplers import CmaEsSampler  # noqa: E402
from optuna.storages import BaseStorage  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from qlora.upstream.optuna import (  # noqa: E402
    SafeCmaEsSampler,
    create_running_trial,
    fail_trial,
    start_waiting_trial,
    trial_id,
)

RESTORE_OPTIMIZER = {
    "5.0.0": "d8243b3535295c384ede5338d81f7490f62630ac0356c67a8dffad4d58336759",
}
"""SHA-256 of the bodies of `CmaEsSampler._restore_optimizer` that the override was checked against, by version."""


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_overridden_method_of_cma_es_is_the_known_one() -> None:
    body = inspect.getsource(CmaEsSampler._restore_optimizer)
    assert hashlib.sha256(body.encode()).hexdigest() in RESTORE_OPTIMIZER.values()
    assert parameters(SafeCmaEsSampler._restore_optimizer) == parameters(CmaEsSampler._restore_optimizer)
    assert parameters(CmaEsSampler._concat_optimizer_attrs)[:2] == ["self", "optimizer_attrs"]
    assert isinstance(inspect.getattr_static(CmaEsSampler, "_attr_key_optimizer"), property)


def test_private_methods_of_studies_and_storages_have_the_known_parameters() -> None:
    assert parameters(BaseStorage.create_new_trial) == ["self", "study_id", "template_trial"]
    assert parameters(BaseStorage.set_trial_user_attr) == ["self", "trial_id", "key", "value"]
    assert parameters(BaseStorage.set_trial_state_values) == ["self", "trial_id", "state", "values"]
    assert parameters(optuna.Study._pop_waiting_trial_id) == ["self"]


def test_trials_begin_wait_and_fail() -> None:
    study = optuna.create_study()
    first = create_running_trial(study, {"x": 0.5}, {"job": "a"}, {"x": FloatDistribution(0, 1)})
    [trial] = study.get_trials()
    assert (trial.state, trial.params, trial.user_attrs) == (TrialState.RUNNING, {"x": 0.5}, {"job": "a"})
    assert trial_id(trial) == trial_id(optuna.Trial(study, first)) == first
    assert start_waiting_trial(study, {}) is None
    study.enqueue_trial({"x": 0.25})
    assert start_waiting_trial(study, {"job": "b"}) == trial_id(study.get_trials()[1])
    assert study.get_trials()[1].user_attrs["job"] == "b"
    for _ in range(2):
        fail_trial(study, trial, "why", "gone")
    assert (study.get_trials()[0].state, study.get_trials()[0].user_attrs["why"]) == (TrialState.FAIL, "gone")
