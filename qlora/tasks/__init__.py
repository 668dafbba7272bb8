"""What `task=` can be: one module per task, found by its name; importing this package imports no torch.

To add a task, write `qlora/tasks/NAME.py` as `protocol.Task` says, name it in `TaskName`, and add
`conf/task/NAME.yaml`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qlora.config.schema import Config, TaskName
from qlora.runtime import distributed
from qlora.runtime.console import say_rows, take_over_handlers
from qlora.runtime.needs import Needs
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.runtime.task_result import TaskResult
from qlora.tasks.lora_start import with_start
from qlora.tasks.protocol import Task, TaskJob, WholeSweep

TASKS: dict[str, str] = {name.value: f"{__name__}.{name.value}" for name in TaskName}
"""The module of each task."""


def find_task(name: TaskName) -> Task:
    """Returns the module of a task."""
    return cast(Task, importlib.import_module(TASKS[name.value]))


def needs_of(config: Config) -> Needs:
    """Returns what the task of a config needs."""
    return find_task(config.task.name).needs(config)


def build_job(
    config: Config,
    folder: Path | str,
    overrides: Sequence[str] = (),
    sweep: SweepJob | None = None,
    *,
    whole_sweep: WholeSweep | None = None,
) -> TaskJob:
    """Returns the task of a config, ready to run in a folder."""
    if config.task.name.trains and config.task.train:
        config = with_start(config, overrides)
    needs = needs_of(config)
    return TaskJob(config, RunFolder(Path(folder)), list(overrides), sweep, needs, whole_sweep=whole_sweep)


def run_job(job: TaskJob, *, verbose: bool = False) -> TaskResult:
    """Does what `task=` says in a folder, and returns the result; `verbose` leaves libraries' log handlers alone."""
    if job.needs.torch:
        distributed.check_shared(job.folder.path)
        _import_session()
        if not verbose:
            take_over_handlers()
    try:
        return find_task(job.config.task.name).run(job)
    finally:
        if "session" in vars(job):
            say_rows(job.session.closing_lines)


def _import_session() -> None:
    """Imports what a run needs: half a million objects that stay, which no garbage collection searches from then on."""
    if "qlora.session" in sys.modules:
        return
    gc.disable()
    try:
        from qlora.upstream.lazy_compile import compile_at_first_call
        from qlora.upstream.torchao import import_quietly

        import_quietly()
        with compile_at_first_call():
            for name in ("qlora.session", f"{__name__}.build_trainer"):
                importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_unfreeze)


def _unfreeze() -> None:
    """Undoes the freezing when the interpreter ends and frees everything; some libraries report the rest as a leak."""
    gc.unfreeze()
    gc.disable()
