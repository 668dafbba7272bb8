"""`task=migrate`: turns a config of another project into a command of this one, and says what of it was lost."""

from __future__ import annotations

from qlora.config.schema import Config
from qlora.migrate import migrate
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.tasks.protocol import TaskJob


def needs(config: Config) -> Needs:
    """Returns what a migration needs: it reads and writes texts only."""
    return Needs()


def run(job: TaskJob) -> TaskResult:
    """Writes an experiment and `migrate.json` to the folder, and prints the command and what was lost."""
    result = migrate(job.config, job.folder.path)
    job.create_folder()
    return result
