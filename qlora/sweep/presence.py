"""Which commands of a study are alive: several may search together, and any of them may be killed."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from qlora.runtime.folder_lock import is_locked, locked

OWNER = "owner"
"""The attribute of a trial that holds the token and the machine of its command."""
BEAT, ENDED = "beat", "ended"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 90.0
"""A command in another folder or on another machine is gone if its count stands still for this long."""


class Presence:
    """Announces to the other commands of a study that this one is alive, and says which of them are gone.

    A command holds a lock in its folder, which commands of the same folder and machine can see at once. For the others
    it increments a count in the study. Only how long a count stands still is measured, so clocks may differ.
    """

    def __init__(self, study: optuna.Study, folder: Path, *, is_alone: bool) -> None:
        self._study, self._folder, self._is_alone = study, folder, is_alone
        self.token = uuid.uuid4().hex[:12]
        self._seen: dict[str, tuple[Any, float]] = {}
        """The latest count of each command, and when it was first seen."""

    @property
    def attribute(self) -> dict[str, str]:
        """The attribute that marks a trial of this command."""
        return {OWNER: json.dumps({"token": self.token, "machine": platform.node()})}

    @contextlib.contextmanager
    def announce(self) -> Iterator[None]:
        """Announces that this command is alive while the block runs."""
        if self._is_alone:
            yield
            return
        name, stop = _lock_name(self.token), threading.Event()
        with locked(self._folder, f"{self._folder / name} is in use", name=name):
            self._study.set_user_attr(f"{BEAT} {self.token}", 0)
            thread = threading.Thread(target=self._beat, args=(stop,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                self._study.set_user_attr(f"{BEAT} {self.token}", ENDED)
                (self._folder / name).unlink(missing_ok=True)

    def _beat(self, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(BEAT_SECONDS):
            count += 1
            # If the database stays away, the command itself fails.
            with contextlib.suppress(SQLAlchemyError, StorageInternalError, OSError):
                self._study.set_user_attr(f"{BEAT} {self.token}", count)

    def is_own(self, trial: FrozenTrial) -> bool:
        """Returns whether this command runs a trial."""
        return _owner(trial).get("token") == self.token

    def shares_folder(self, trial: FrozenTrial) -> bool:
        """Returns whether the command of a trial runs in this command's folder."""
        return (self._folder / _lock_name(_owner(trial).get("token", ""))).exists()

    def is_gone(self, trial: FrozenTrial, beats: Mapping[str, Any]) -> bool:
        """Returns whether the command of a trial is gone; `beats` are the study's attributes."""
        if self._is_alone:
            return not self.is_own(trial)
        owner = _owner(trial)
        token = owner.get("token", "")
        if token == self.token:
            return False
        lock = _lock_name(token)
        if owner.get("machine") == platform.node() and (self._folder / lock).exists():
            return not is_locked(self._folder, lock)
        beat = beats.get(f"{BEAT} {token}")
        if beat == ENDED:
            return True
        key, now = token or f"trial {trial.number}", time.monotonic()
        if key not in self._seen or self._seen[key][0] != beat:
            self._seen[key] = beat, now
        return now - self._seen[key][1] > SILENT_SECONDS


def _lock_name(token: str) -> str:
    return f".search-{token}.lock"


def _owner(trial: FrozenTrial) -> dict[str, str]:
    owner: dict[str, str] = json.loads(trial.user_attrs.get(OWNER, "{}"))
    return owner
