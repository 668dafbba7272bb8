"""How a job reaches its trial in a search, and how both open Optuna's database."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sqlite3
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
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from qlora.errors import ConfigError, ResourceError, UserError
from qlora.secrets import HIDDEN, hide
from qlora.text import brief_text

PRUNERS: dict[str, type[BasePruner]] = {"none": NopPruner, "median": MedianPruner, "hyperband": HyperbandPruner}
LOCK_SECONDS = 60.0
"""How long a trial waits for its turn to write to SQLite, which has one writer at a time."""

optuna.logging.set_verbosity(logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


@dataclass(frozen=True)
class TrialLink:
    """How a job finds its trial."""

    storage: str | None
    """The URL of the study's database, if it holds no secret."""
    variable: str | None
    """Else the environment variable that holds the URL, so that the URL itself is written nowhere."""
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
            sampler=RandomSampler(),  # samples nothing: the parameters have their values
            pruner=build_pruner(self.pruner, self.pruner_kwargs),
        )
        return optuna.Trial(study, self.trial_id)

    def _url(self) -> str:
        if self.variable is None:
            assert self.storage is not None
            return self.storage
        if not (url := os.environ.get(self.variable)):
            raise ResourceError(
                f"hydra.sweeper.storage=${{oc.env:{self.variable}}}: the job does not have the variable "
                f"{self.variable}; export it where jobs run"
            )
        return url


JOURNAL = "journal:///"
"""The scheme of Optuna's journal: a file on a shared disk that many machines append to."""
TABLE_EXISTS = 1050
"""The error code of MySQL."""
ATTEMPTS = 5
"""Commands that start together all create the tables of a new database, and all but one of them fail at first."""


def open_storage(url: str) -> BaseStorage:
    """Connects to a study's database or opens its journal; raises a `UserError` if it cannot be used."""
    for attempt in range(ATTEMPTS):
        try:
            return _connect(url)
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if not _may_be_race(error) or attempt == ATTEMPTS - 1:
                raise _unusable(url, error) from error
            time.sleep(0.2 * 2**attempt)
        except (SQLAlchemyError, ImportError, OSError, ValueError, RuntimeError) as error:
            raise _unusable(url, error) from error
    raise AssertionError("the last attempt returns or raises")


def _connect(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        # The lock beside the file is a link to it, which must not depend on the working folder of a process.
        return JournalStorage(JournalFileBackend(str(Path("/", url.removeprefix(JOURNAL)))))
    if make_url(url).get_backend_name() == "sqlite":
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
    # One connection for each transaction: none stays open at the end, and the server may restart between two.
    return RDBStorage(url, engine_kwargs={"poolclass": NullPool})


def _may_be_race(error: Exception) -> bool:
    """Returns whether another command may have created the tables at the same time."""
    if not isinstance(error, OperationalError):
        return True
    original = error.orig
    code = getattr(original, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_ERROR or original.args[:1] == (TABLE_EXISTS,) if original is not None else False


def _unusable(url: str, error: Exception) -> UserError:
    reason = brief_text(hide(str(getattr(error, "orig", None) or error).replace(url, hide_password(url))))
    kind = ConfigError if isinstance(error, ValueError | ArgumentError) else ResourceError
    return kind(
        f"hydra.sweeper.storage={hide_password(url)} cannot be used ({reason}); give the URL of a database that "
        "can be reached, e.g. sqlite:////data/study.db or postgresql+psycopg://HOST/NAME, journal:////data/study.log "
        "for Optuna's journal, or leave it out for a file in the sweep's folder"
    )


def hide_password(url: str) -> str:
    """Returns a database's URL without what may be secret in it."""
    if url.startswith(JOURNAL):
        return url
    try:
        return hide(make_url(url).render_as_string(hide_password=True))
    except (SQLAlchemyError, ValueError):  # it is not a URL, so it is hidden whole
        return HIDDEN


def build_pruner(name: str, kwargs: Mapping[str, Any]) -> BasePruner:
    """Returns Optuna's pruner; raises `ConfigError` for an argument that it does not accept."""
    return build_optuna("pruner", name, PRUNERS[name], kwargs)


def build_optuna(kind: str, name: str, cls: Any, kwargs: Mapping[str, Any], **defaults: Any) -> Any:
    """Creates a class of Optuna with the user's arguments over `defaults`; raises a `UserError` for impossible ones."""
    known = [key for key in inspect.signature(cls).parameters if key != "self"]
    key = f"hydra.sweeper.{kind}_kwargs"
    if unknown := [argument for argument in kwargs if argument not in known]:
        raise ConfigError(f"{key}.{unknown[0]}: {name} has no such argument; choose from {', '.join(known)}")
    try:
        return cls(**{**defaults, **kwargs})
    except ImportError as error:
        raise ResourceError(
            f"hydra.sweeper.{kind}={name} needs the package {error.name}, which is not installed: pip install "
            "'qlora[optuna]'"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} does not suit {name}: {str(error).rstrip('.')}") from error
