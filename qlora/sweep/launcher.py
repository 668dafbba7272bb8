"""The default engine of sweeps: a process a job; finished ones are skipped, a failed one does not stop the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from omegaconf import DictConfig

from qlora.compose import config_to_dict, to_config
from qlora.errors import ConfigError
from qlora.schema import Config
from qlora.sweep.jobs import Job, Status, job_folder, locked
from qlora.sweep.overview import Sweep, check_same_sweep, common_facts, read_sweep
from qlora.sweep.processes import RunTasks, Task
from qlora.sweep.screen import Screen
from qlora.sweep.trackers import track_sweep
from qlora.wording import quoted

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
    """Runs the jobs that are not finished yet by the engine that `build` returns; returns what each gave, in order.

    A job that failed returns a `JobsFailed`. Raises `ConfigError` where another sweep runs in the folder, or where the
    folder holds a sweep of another config.
    """
    prepare(config)
    folder = Path(str(config.hydra.sweep.dir))
    composed = [loader.load_sweep_config(config, list(words)) for words in overrides]
    configs = [to_config(each) for each in composed]
    run = build(configs[0])
    with open_sweep(folder, configs) as sweep:
        jobs = plan(sweep, configs, overrides)
        waiting = [job for job in dict.fromkeys(job.name for job in jobs)
                   if sweep.jobs[job].status is not Status.finished]  # fmt: skip
        commands = {job.name: command(config, job.folder, words) for job, words in zip(jobs, overrides, strict=True)}
        tasks = (Task(sweep.jobs[name], commands[name], {}) for name in waiting)
        with Screen(sweep, len(waiting)) as screen:
            run(
                lambda: next(tasks, None),
                on_start=screen.started,
                on_end=screen.ended,
                on_wait=screen.waiting,
            )
        screen.summary()
        track_sweep(sweep, configs[0].tracking)
        return [to_return(sweep, job, words) for job, words in zip(jobs, overrides, strict=True)]


def prepare(config: DictConfig) -> None:
    """Sets up what Hydra expects of whoever runs jobs: its resolvers and the log."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)


@contextmanager
def open_sweep(folder: Path, configs: Sequence[Config]) -> Iterator[Sweep]:
    """Yields the sweep of a folder under its lock; raises `ConfigError` for one of another config."""
    with locked(folder, f"another sweep runs in {folder}"):
        sweep = read_sweep(folder, configs[0].objective)
        common = common_facts([config_to_dict(config) for config in configs])
        if sweep.common:
            check_same_sweep(folder, sweep.common, common)
            common = {key: value for key, value in common.items() if key in sweep.common}
        sweep.common = common
        yield sweep


def plan(sweep: Sweep, configs: Sequence[Config], overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Returns a job for each config, known ones as their folders tell; jobs of one config are one job."""
    jobs = []
    for config, own in zip(configs, varied(overrides), strict=True):
        job = find_job(sweep, config, own)
        if job.status is not Status.finished:
            job.queue(own)
        jobs.append(sweep.jobs.setdefault(job.name, job))
    sweep.write()
    return jobs


def find_job(sweep: Sweep, config: Config, own: list[str]) -> Job:
    """Returns the job of a config, as its folder tells where there is one; `own` overrides name a new one."""
    folder = job_folder(sweep.folder, own, config_to_dict(config))
    return sweep.jobs.get(folder.name) or Job(folder, overrides=own)


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
    args, _ = get_args_parser().parse_known_args(sys.argv[1:])
    return ["--config-dir", args.config_dir] if args.config_dir else []


class _Failed(JobReturn):
    @property  # type: ignore[misc]  # nobody sets it
    def return_value(self) -> Any:
        """Raises what the sweep's end has to say; Hydra would print the overrides of one job before it."""
        raise self._return_value


def to_return(sweep: Sweep, job: Job, overrides: Sequence[str]) -> JobReturn:
    """Returns a job's end as Hydra's sweepers want it; one that an engine keeps for later has none yet."""
    ended = sweep.jobs[job.name]
    if ended.status in (Status.finished, Status.queued, Status.running):
        return JobReturn(list(overrides), status=JobStatus.COMPLETED, _return_value=ended.objective)
    failed = len(sweep.with_status(Status.failed, Status.interrupted))
    reason = JobsFailed(
        f"{failed} of {len(sweep.jobs)} jobs failed: {shlex.quote(str(sweep.folder / 'leaderboard.md'))} says why; "
        "the same command runs them again and leaves the finished ones alone"
    )
    return _Failed(list(overrides), status=JobStatus.FAILED, _return_value=reason)
