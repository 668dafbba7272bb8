"""`Run`: one task with one config in one folder, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config.schema import Config
from qlora.errors import ConfigError
from qlora.runtime.console import quiet_notebook
from qlora.runtime.environment import prepare_environment
from qlora.runtime.sweep_job import SweepJob
from qlora.tasks import build_job, run_job

if TYPE_CHECKING:  # which imports torch
    from qlora.session import Session


class Run:
    """A config and a folder, as quiet as on the command line.

    `overrides` are the command line's, for the model card; `sweep` is the sweep that the run is a job of, for the
    tracker. The same folder may be given again: a finished task returns its saved result, an interrupted training run
    resumes.
    """

    def __init__(
        self, config: Config, output_dir: Path | str, overrides: Sequence[str] = (), sweep: SweepJob | None = None
    ) -> None:
        prepare_environment()
        self.config = config
        self._job = build_job(config, output_dir, overrides, sweep)

    @cached_property
    def session(self) -> Session:
        """Device, tokenizer, data and model of the run, each built when first needed."""
        with quiet_notebook():
            return self._job.session

    def train(self) -> dict[str, Any]:
        """Trains, measures and predicts as `task` says; returns what `result.json` holds."""
        if not self.config.task.name.trains:
            raise ConfigError(f"task={self.config.task.name.value} does not train; call execute(), or leave it out")
        return self.execute()

    def execute(self) -> dict[str, Any]:
        """Runs the task of `task=` and returns its result, as saved in the run's folder."""
        if not self._job.needs.torch:
            name = self.config.task.name.value.replace("_", "-")
            raise ConfigError(f"task={name} is no run; start it on the command line: qlora task={name}")
        with quiet_notebook():
            return run_job(self._job).to_dict()
