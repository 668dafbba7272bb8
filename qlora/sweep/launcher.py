"""The default engine of sweeps: a process a job; finished ones are skipped, a failed one does not stop the others."""

from __future__ import annotations

import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text

from qlora.config.compose import config_to_dict, explain, to_config
from qlora.config.schema import Config
from qlora.errors import ConfigError, UserError
from qlora.runtime.console import guard_logs, printable, say
from qlora.runtime.folder_lock import in_turn, locked
from qlora.runtime.run_folder import is_below
from qlora.sweep.job_processes import RunTasks, Task
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, identity, name_damage, read_job, slug, write_status
from qlora.sweep.leaderboard import describe
from qlora.sweep.live_table import Screen
from qlora.sweep.overview import Sweep, check_same_sweep, common_facts, read_sweep
from qlora.sweep.summary_run import track_sweep
from qlora.text import quoted

NOT_PASSED_ON = (
    "hydra.mode",
    "hydra.run.",
    "hydra.sweep.",
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
)
"""What the sweep reads itself; a job is a single run."""


class JobsFailed(ConfigError):
    """Says how many jobs of a sweep failed and where to read why."""


def launch(
    config: DictConfig, loader: ConfigLoader, overrides: list[list[str]], *, build: Callable[[Config], RunTasks]
) -> list[JobReturn]:
    """Runs the jobs that another project's sweeper gives by the engine that `build` returns; returns what each gave.

    A job that failed returns a `JobsFailed`. Raises `ConfigError` where another sweep runs in the folder, or where the
    folder holds a sweep of another config.
    """
    prepare(config)
    configs = [to_config(loader.load_sweep_config(config, list(words))) for words in overrides]
    run = build(configs[0])
    shared = common_facts([config_to_dict(each) for each in configs])
    with open_sweep(Path(str(config.hydra.sweep.dir)), shared, configs[0].objective) as sweep:
        combinations = [(words, own, partial(_given, each))
                        for words, own, each in zip(overrides, varied(overrides), configs, strict=True)]  # fmt: skip
        queue = Queue(sweep, combinations, len(combinations))
        run_queue(config, queue, run)
        track_sweep(sweep, configs[0].tracking)
        return [to_return(sweep, sweep.find(own, config_to_dict(each)), words)
                for (words, own, _), each in zip(combinations, configs, strict=True)]  # fmt: skip


def prepare(config: DictConfig) -> None:
    """Sets up what Hydra expects of whoever runs jobs: its resolvers and the log."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    guard_logs()


@contextmanager
def open_sweep(
    folder: Path, shared: Mapping[str, Any], objective: str | None, *, is_alone: bool = True
) -> Iterator[Sweep]:
    """Yields the sweep of a folder under its lock, which others may hold too unless it `is_alone`.

    `shared` are the full keys that have one value in all jobs. Raises `ConfigError` for a folder of another config.
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
"""All overrides of a job, those that it does not share with all others, and what composes its config."""

AHEAD = 200
"""So many of the next jobs are composed, and told as queued; the others when their turn comes."""


class Queue:
    """The jobs of a sweep that are to run, in their order."""

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
        """How many are to run, with those that are not composed yet."""
        return len(self._ahead) + self._left

    @property
    def is_known(self) -> bool:
        """Whether all have been composed, so that it is known which of them are finished."""
        return self._left == 0

    def next(self) -> tuple[Job, list[str]] | None:
        """Returns the next job with its overrides; None: there is none left."""
        self._fill()
        return self._ahead.popleft() if self._ahead else None

    @property
    def failed(self) -> list[Job]:
        """The jobs that have failed or were interrupted, of those that were to run."""
        ended = (Status.failed, Status.interrupted)
        return [job for name in self.names if (job := self.sweep.jobs[name]).status in ended]

    def _fill(self) -> None:
        while len(self._ahead) < AHEAD and self._left:
            words, own, compose = next(self._combinations)
            self._left -= 1
            try:
                job = find_job(self.sweep, compose(), own)
            except (UserError, HydraException, OmegaConfBaseException) as error:
                self.names[refuse(self.sweep, own, error).name] = None
                continue
            if job.name in self.names:
                continue
            self.names[job.name] = None
            self.sweep.jobs.setdefault(job.name, job)
            if job.status is not Status.finished:
                job.queue(own)
                self._ahead.append((job, words))
        self.sweep.to_come = self._left


def find_job(sweep: Sweep, config: Config, own: list[str]) -> Job:
    """Returns the job of a config, as its folder tells where there is one; `own` overrides name a new one."""
    return sweep.find(own, config_to_dict(config))


def refuse(sweep: Sweep, own: list[str], error: Exception) -> Job:
    """Records, and tells, a job whose values exclude each other: it has failed."""
    folder = sweep.folder / f"{slug(own)}-{identity({'overrides': own})}"
    write_status(folder, Status.failed, overrides=own, reason=str(explain(error)))
    is_new = folder.name not in sweep.jobs or sweep.jobs[folder.name].status is not Status.failed
    job = sweep.jobs[folder.name] = read_job(folder)
    if is_new:
        say(Text(printable(describe(job)), style="red"))
    return job


def run_queue(config: DictConfig, queue: Queue, run: RunTasks) -> None:
    """Runs the jobs of a queue by an engine of our own."""
    handed = 0
    with Screen(queue.sweep, len(queue), is_known=queue.is_known) as screen:

        def next_task() -> Task | None:
            nonlocal handed
            taken = queue.next()
            handed += taken is not None
            screen.expect(len(queue) + handed - screen.done)
            if taken is None:
                return None
            job, words = taken
            return Task(job, command(config, job.folder, words), {})

        run(next_task, on_start=screen.started, on_end=screen.ended, on_wait=screen.waiting)
    screen.summary()


def varied(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns of each job those overrides that not all jobs have."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [[text for text in words if text not in shared and not text.startswith(("sweep=", "sweep."))]
            for words in overrides]  # fmt: skip


def command(config: DictConfig, folder: Path, overrides: Sequence[str]) -> list[str]:
    """Returns the words that run one job as a plain run in its folder."""
    own = [text for text in config.hydra.overrides.hydra if not text.lstrip("+~").startswith(NOT_PASSED_ON)]
    # The sweep's folder is the new one, and the sweep alone is detached.
    words = [text for text in overrides if text != "resume=never" and not text.startswith("sweep.")]
    return [
        *(sys.executable, "-m", "qlora", *config_flags(), *words, *own),
        *("hydra.mode=RUN", f"hydra.run.dir={quoted(str(folder.absolute()))}"),
    ]


def config_flags() -> list[str]:
    """Returns the words that name the user's own configs, as this command has them."""
    return ["--config-dir", folder] if (folder := config_dir()) else []


def config_dir() -> str | None:
    """Returns the folder of the user's own configs, as this command names it."""
    args, _ = get_args_parser().parse_known_args(sys.argv[1:])
    return args.config_dir


def _given(config: Config) -> Config:
    return config


class _Failed(JobReturn):
    @property  # type: ignore[misc]  # nobody sets it
    def return_value(self) -> Any:
        """Raises what the sweep's end has to say; Hydra would print the overrides of one job before it."""
        raise self._return_value


def to_return(sweep: Sweep, job: Job, overrides: Sequence[str]) -> JobReturn:
    """Returns a job's end as Hydra's sweepers want it; one that an engine keeps for later has none yet."""
    if job.status in (Status.finished, Status.queued, Status.running):
        return JobReturn(list(overrides), status=JobStatus.COMPLETED, _return_value=job.objective)
    return _Failed(list(overrides), status=JobStatus.FAILED, _return_value=jobs_failed(sweep))


def jobs_failed(sweep: Sweep) -> JobsFailed:
    """Returns what a sweep with failed jobs ends with."""
    failed = len(sweep.with_status(Status.failed, Status.interrupted))
    return JobsFailed(
        f"{failed} of {len(sweep.jobs) + sweep.to_come} jobs failed: "
        f"{shlex.quote(str(sweep.folder / 'leaderboard.md'))} says why; "
        "the same command runs them again and leaves the finished ones alone"
    )
