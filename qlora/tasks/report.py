"""`task=report`: compares the runs that `runs=` names, as a table and as a page."""

from __future__ import annotations

from qlora.config.schema import Config
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.sweep.report_runs import report
from qlora.tasks.protocol import TaskJob


def needs(config: Config) -> Needs:
    """Returns what a report needs: it reads files of runs only."""
    return Needs()


def run(job: TaskJob) -> TaskResult:
    """Writes leaderboard, page and `report.json` to the folder."""
    result = report(job.config, job.folder.path)
    job.create_folder()
    return result
