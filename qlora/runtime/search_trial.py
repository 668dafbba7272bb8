"""What a search and its trials share: Optuna's study, which trials reach from processes of their own."""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from qlora.errors import ConfigError
from qlora.secrets import HIDDEN, hide
from qlora.text import brief_text

PRUNERS: dict[str, type[BasePruner]] = {"none": NopPruner, "median": MedianPruner, "hyperband": HyperbandPruner}
LOCK_SECONDS = 60.0
"""SQLite writes one after another; a trial waits so long for its turn."""

optuna.logging.set_verbosity(logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


@dataclass(frozen=True)
class TrialLink:
    """Where a job finds its trial."""

    storage: str | None
    """The URL of the study's database, if it holds no secret."""
    variable: str | None
    """Else the variable of the environment that holds it: the URL itself is written nowhere."""
    study: str
    trial_id: int
    metric: str
    """The metric that is reported at each evaluation."""
    pruner: str
    pruner_kwargs: Mapping[str, Any]

    def to_text(self) -> str:
        """Returns the value of the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads what `to_text` wrote."""
        return cls(**json.loads(text))

    def open(self) -> optuna.Trial:
        """Returns the trial, to report to."""
        study = optuna.load_study(
            study_name=self.study,
            storage=open_storage(self._url()),
            sampler=RandomSampler(),  # draws nothing: the parameters are drawn
            pruner=build_pruner(self.pruner, self.pruner_kwargs),
        )
        return optuna.Trial(study, self.trial_id)

    def _url(self) -> str:
        if self.variable is None:
            assert self.storage is not None
            return self.storage
        if not (url := os.environ.get(self.variable)):
            raise ConfigError(
                f"hydra.sweeper.storage=${{oc.env:{self.variable}}}: the job does not have the variable "
                f"{self.variable}; export it where jobs run"
            )
        return url


JOURNAL = "journal:///"
"""What the name of Optuna's journal file begins with: a file that many machines write to on a shared disk."""
ATTEMPTS = 5
"""Several commands that start together all make the tables of a new database, and all but one fail at first."""


def open_storage(url: str) -> BaseStorage:
    """Connects to a study's database or opens its journal; raises `ConfigError` where it cannot be reached."""
    for attempt in range(ATTEMPTS):
        try:
            return _connect(url)
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            is_race = not isinstance(error, OperationalError) or "already exists" in str(error)
            if not is_race or attempt == ATTEMPTS - 1:
                raise _unusable(url, error) from error
            time.sleep(0.2 * 2**attempt)
        except (SQLAlchemyError, ImportError, OSError, ValueError, RuntimeError) as error:
            raise _unusable(url, error) from error
    raise AssertionError("the last attempt returns or raises")


def _connect(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        # The lock beside the file is a link to it, which must not depend on where a process runs.
        return JournalStorage(JournalFileBackend(str(Path("/", url.removeprefix(JOURNAL)))))
    if make_url(url).get_backend_name() == "sqlite":
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
    # A connection for each transaction: none is left open at the end, and the server may be started anew between two.
    return RDBStorage(url, engine_kwargs={"poolclass": NullPool})


def _unusable(url: str, error: Exception) -> ConfigError:
    reason = brief_text(hide(str(getattr(error, "orig", None) or error).replace(url, hide_password(url))))
    return ConfigError(
        f"hydra.sweeper.storage={hide_password(url)} cannot be used ({reason}); give the URL of a database that "
        "can be reached, e.g. sqlite:////data/study.db or postgresql+psycopg://HOST/NAME, journal:////data/study.log "
        "for Optuna's journal, or leave it out for a file in the sweep's folder"
    )


def hide_password(url: str) -> str:
    """Returns a database's URL as it may be shown."""
    if url.startswith(JOURNAL):
        return url
    try:
        return hide(make_url(url).render_as_string(hide_password=True))
    except (SQLAlchemyError, ValueError):  # no URL: whatever it is, it is not shown
        return HIDDEN


def build_pruner(name: str, kwargs: Mapping[str, Any]) -> BasePruner:
    """Returns Optuna's pruner; raises `ConfigError` for an argument that it does not take."""
    return build("pruner", name, PRUNERS[name], kwargs)


def build(kind: str, name: str, maker: Any, kwargs: Mapping[str, Any], **own: Any) -> Any:
    """Calls Optuna's class `maker` with the user's arguments over `own`; raises `ConfigError` for impossible ones."""
    known = [key for key in inspect.signature(maker).parameters if key != "self"]
    key = f"hydra.sweeper.{kind}_kwargs"
    if unknown := [word for word in kwargs if word not in known]:
        raise ConfigError(f"{key}.{unknown[0]}: {name} takes no such argument; choose from {', '.join(known)}")
    try:
        return maker(**{**own, **kwargs})
    except ImportError as error:
        raise ConfigError(
            f"hydra.sweeper.{kind}={name} needs the package {error.name}, which is not installed: pip install "
            "'qlora[optuna]'"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} does not suit {name}: {str(error).rstrip('.')}") from error
