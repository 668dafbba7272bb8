"""What a task is: a module of this package that declares what it needs, and a function that returns one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from qlora.config.saved_config import dump_config
from qlora.config.schema import Config
from qlora.runtime.atomic_files import write_text
from qlora.runtime.needs import Needs
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.runtime.task_result import TaskResult

if TYPE_CHECKING:
    from qlora.session import Session


class Task(Protocol):
    """A module such as `qlora.tasks.train`; importing it imports no torch."""

    def needs(self, config: Config) -> Needs:
        """Returns what the task needs under a config."""

    def run(self, job: TaskJob) -> TaskResult:
        """Does the task, and returns its result as it was written to the folder."""


@dataclass
class TaskJob:
    """One task with one config in one folder."""

    config: Config
    folder: RunFolder
    overrides: list[str]
    """The overrides that describe the run, for the model card."""
    sweep: SweepJob | None
    """The sweep that the run is a job of, for the tracker."""
    needs: Needs
    command: list[str] = field(default_factory=list)
    """The overrides of the command that resumes it, where they are not `overrides`."""
    typed: list[str] = field(default_factory=list)
    """The words of the command line that started this task alone; none: a sweep or a program did."""
    options: list[str] = field(default_factory=list)
    """The flags and overrides by which the command line finds options of the user's own."""
    whole_sweep: WholeSweep | None = None
    """The command as it was typed, for a task that reads a sweep itself."""

    def create_folder(self) -> None:
        """Creates the folder and writes the config there, unless it holds that of a training run."""
        self.folder.create()
        if not (self.folder.config.is_file() and self.folder.holds_training):
            write_text(self.folder.config, dump_config(self.config))

    @cached_property
    def session(self) -> Session:
        """Device, tokenizer, data and model, each built when first needed."""
        from qlora.session import Session

        return Session(self.config, self.folder.path, self.overrides, self.sweep, needs=self.needs)


@dataclass(frozen=True)
class WholeSweep:
    """A sweep as its command describes it."""

    overrides: Sequence[str]
    """All overrides, those of a `sweep=` file included."""
    config_dir: str | None
    has_conditions: bool
    """Whether some keys are tried under a condition only."""
