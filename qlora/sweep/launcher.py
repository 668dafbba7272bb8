"""Runs the jobs of a sweep in order; finished jobs are skipped, and a failed job does not stop the others."""

from __future__ import annotations

import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text

from qlora.config.conversion import to_config
from qlora.config.messages import explain
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config
from qlora.errors import RunError, UserError
from qlora.runtime.console import guard_logs, printable, say
from qlora.runtime.folder_lock import in_turn, locked
from qlora.runtime.run_folder import is_below
from qlora.sweep.job_processes import RunTasks, Task
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, identity, name_damage, read_job, slug, write_status
from qlora.sweep.leaderboard import describe
from qlora.sweep.live_table import Screen
from qlora.sweep.summary_run import track_sweep
from qlora.sweep.sweep_folder import Sweep, check_same_sweep, common_keys, read_sweep
from qlora.text import quoted
from qlora.upstream.hydra import flag_parser

NOT_PASSED_ON = (
    "hydra.mode",
    "hydra.run.",
    "hydra.sweep.",
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
)
"""Overrides that the sweep reads itself; a job is a single run."""


class JobsFailed(RunError):
    """Says how many jobs of a sweep failed and where to read why."""


def launch(
    config: DictConfig, loader: ConfigLoader, overrides: list[list[str]], *, build: Callable[[Config], RunTasks]
) -> list[JobReturn]:
    """Runs the jobs of another project's sweeper by the engine that `build` returns; returns the result of each.

    A job that failed returns a `JobsFailed`. Raises `RunError` if another sweep runs in the folder, or if the folder
    holds a sweep of another config.
    """
    prepare(config)
    configs = [to_config(loader.load_sweep_config(config, list(job))) for job in overrides]
    run = build(configs[0])
    shared = common_keys([config_to_dict(job) for job in configs])
    with open_sweep(Path(str(config.hydra.sweep.dir)), shared, configs[0].objective) as sweep:
        combinations = [
            (all_of_job, distinct, partial(_given, job))
            for all_of_job, distinct, job in zip(overrides, varied(overrides), configs, strict=True)
        ]
        queue = Queue(sweep, combinations, len(combinations))
        run_queue(config, queue, run)
        track_sweep(sweep, configs[0].tracking)
        return [to_return(sweep, sweep.find(distinct, config_to_dict(job)), all_of_job)
                for (all_of_job, distinct, _), job in zip(combinations, configs, strict=True)]  # fmt: skip


def prepare(config: DictConfig) -> None:
    """Sets up what Hydra expects of a launcher: its resolvers and the log."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    guard_logs()


@contextmanager
def open_sweep(
    folder: Path, shared: Mapping[str, Any], objective: str | None, *, is_alone: bool = True
) -> Iterator[Sweep]:
    """Yields the sweep of a folder under its lock, which other commands may share unless `is_alone`.

    `shared` holds the full keys that have one value in all jobs. Raises `RunError` for a folder of another config.
    """
    with locked(folder, f"another sweep runs in {folder}", shared=not is_alone):
        with in_turn(folder):
            sweep = read_sweep(folder, objective)
            for job in sweep.jobs.values():
                name_damage(job)
            common = {key: value for key, value in shared.items() if not is_below(key, UNNAMED_KEYS)}
            if sweep.common:
                check_same_sweep(folder, sweep.common, common)
                common = {key: value for key, value in common.items() if key in sweep.common}
            sweep.has_changed |= sweep.common != common
            sweep.common = common
            if sweep.has_changed:
                sweep.write()
        yield sweep


Combination = tuple[list[str], list[str], Callable[[], Config]]
"""All overrides of a job, those that distinguish it from the others, and the function that composes its config."""

AHEAD = 200
"""How many of the next jobs are composed and shown as queued; the others follow when their turn comes."""


class JobSource(Protocol):
    """What gives an engine the jobs of a sweep."""

    sweep: Sweep

    def __len__(self) -> int:
        """How many jobs are to run, as far as it is known."""

    @property
    def is_known(self) -> bool:
        """Whether it is known which jobs are finished."""

    def next(self) -> tuple[Job, list[str]] | None:
        """Returns the next job with its overrides; None: there is none now."""

    @property
    def failed(self) -> list[Job]:
        """The jobs that failed or were interrupted."""


class Queue:
    """The jobs of a sweep that are to run, in order."""

    def __init__(self, sweep: Sweep, combinations: Iterable[Combination], count: int) -> None:
        self.sweep, self._combinations, self._left = sweep, iter(combinations), count
        self._ahead: deque[tuple[Job, list[str]]] = deque()
        self.names: dict[str, None] = {}
        """The jobs that have been composed so far, finished ones included."""
        known = set(sweep.jobs)
        self._fill()
        if self.names.keys() - known or sweep.has_changed or self._ahead:
            sweep.write()

    def __len__(self) -> int:
        """How many jobs are to run, including those that are not composed yet."""
        return len(self._ahead) + self._left

    @property
    def is_known(self) -> bool:
        """Whether all jobs are composed, so that it is known which of them are finished."""
        return self._left == 0

    def next(self) -> tuple[Job, list[str]] | None:
        """Returns the next job with its overrides; None: there is none left."""
        self._fill()
        return self._ahead.popleft() if self._ahead else None

    @property
    def failed(self) -> list[Job]:
        """The jobs of the queue that failed or were interrupted."""
        ended = (Status.failed, Status.interrupted)
        return [job for name in self.names if (job := self.sweep.jobs[name]).status in ended]

    def _fill(self) -> None:
        while len(self._ahead) < AHEAD and self._left:
            overrides, distinct, compose = next(self._combinations)
            self._left -= 1
            try:
                job = find_job(self.sweep, compose(), distinct)
            except (UserError, HydraException, OmegaConfBaseException) as error:
                self.names[refuse(self.sweep, distinct, error).name] = None
                continue
            if job.name in self.names:
                continue
            self.names[job.name] = None
            self.sweep.jobs.setdefault(job.name, job)
            if job.status is not Status.finished:
                job.queue(distinct)
                self._ahead.append((job, overrides))
        self.sweep.to_come = self._left


def find_job(sweep: Sweep, config: Config, overrides: list[str]) -> Job:
    """Returns the job of a config, as its folder says if it exists; the distinguishing `overrides` name a new job."""
    return sweep.find(overrides, config_to_dict(config))


def refuse(sweep: Sweep, overrides: list[str], error: Exception) -> Job:
    """Records and prints a failed job: its values exclude each other."""
    folder = sweep.folder / f"{slug(overrides)}-{identity({'overrides': overrides})}"
    write_status(folder, Status.failed, overrides=overrides, reason=str(explain(error)))
    is_new = folder.name not in sweep.jobs or sweep.jobs[folder.name].status is not Status.failed
    job = sweep.jobs[folder.name] = read_job(folder)
    if is_new:
        say(Text(printable(describe(job)), style="red"))
    return job


def run_queue(config: DictConfig, queue: JobSource, run: RunTasks) -> None:
    """Runs the jobs of a queue by one of our engines."""
    started = 0
    with Screen(queue.sweep, len(queue), is_known=queue.is_known) as screen:

        def next_task() -> Task | None:
            nonlocal started
            taken = queue.next()
            started += taken is not None
            screen.expect(len(queue) + started - screen.done)
            if taken is None:
                return None
            job, overrides = taken
            return Task(job, command(config, job.folder, overrides), {})

        run(next_task, on_start=screen.started, on_end=screen.ended, on_wait=screen.waiting)
    screen.summary()


def varied(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns for each job the overrides that not all jobs have."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [[text for text in job if text not in shared and not text.startswith(("sweep=", "sweep."))]
            for job in overrides]  # fmt: skip


def command(config: DictConfig, folder: Path, overrides: Sequence[str]) -> list[str]:
    """Returns the command that runs one job as a plain run in its folder."""
    of_hydra = [text for text in config.hydra.overrides.hydra if not text.lstrip("+~").startswith(NOT_PASSED_ON)]
    # `resume=never` chose the folder of the sweep, and `sweep.` settings are those of the sweep alone.
    of_job = [text for text in overrides if text != "resume=never" and not text.startswith("sweep.")]
    return [
        *(sys.executable, "-m", "qlora", *config_flags(), *of_job, *of_hydra),
        *("hydra.mode=RUN", f"hydra.run.dir={quoted(str(folder.absolute()))}"),
    ]


def config_flags() -> list[str]:
    """Returns the arguments of this command that name the folder of the user's own configs."""
    return ["--config-dir", folder] if (folder := config_dir()) else []


def config_dir() -> str | None:
    """Returns the folder of the user's own configs that this command names; None: it names none."""
    args, _ = flag_parser().parse_known_args(sys.argv[1:])
    return args.config_dir


def _given(config: Config) -> Config:
    return config


class _Failed(JobReturn):
    @property  # type: ignore[misc]  # nobody sets it
    def return_value(self) -> Any:
        """Raises the error of the whole sweep; Hydra would print the overrides of one job before it."""
        raise self._return_value


def to_return(sweep: Sweep, job: Job, overrides: Sequence[str]) -> JobReturn:
    """Returns the result of a job as Hydra's sweepers expect it; a job that is still queued has none yet."""
    if job.status in (Status.finished, Status.queued, Status.running):
        return JobReturn(list(overrides), status=JobStatus.COMPLETED, _return_value=job.objective)
    return _Failed(list(overrides), status=JobStatus.FAILED, _return_value=jobs_failed(sweep))


def jobs_failed(sweep: Sweep) -> JobsFailed:
    """Returns the error of a sweep with failed jobs."""
    failed = len(sweep.with_status(Status.failed, Status.interrupted))
    return JobsFailed(
        f"{failed} of {len(sweep.jobs) + sweep.to_come} jobs failed: "
        f"{shlex.quote(str(sweep.folder / 'leaderboard.md'))} says why; "
        "the same command runs them again and leaves the finished ones alone"
    )
