"""The grid of a sweep: every value is checked once, and each combination is composed just before its job starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora.config.combinations import Combinations
from qlora.config.schema import Config
from qlora.runtime.console import say
from qlora.sweep.comparison import Rounds, plan_comparison
from qlora.sweep.engines import check_not_detached
from qlora.sweep.job_processes import RunTasks
from qlora.sweep.jobs import Status
from qlora.sweep.launcher import (
    AHEAD,
    Combination,
    JobSource,
    Queue,
    config_dir,
    jobs_failed,
    open_sweep,
    prepare,
    run_queue,
)
from qlora.sweep.live_table import Screen, describe_waiting
from qlora.sweep.summary_run import track_sweep
from qlora.sweep.sweep_folder import Sweep
from qlora.sweep.sweep_page import refresh


def run_grid(
    config: DictConfig,
    arguments: Sequence[str],
    *,
    launch: Callable[..., Any],
    build: Callable[[Config], RunTasks] | None,
) -> None:
    """Runs the jobs that are not finished: by one of our engines, or by the `launch` of another launcher.

    Raises `ConfigError` for a value that is refused, `RunError` for a folder of another or a running sweep, and
    `JobsFailed` at the end if a job failed.
    """
    prepare(config)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides, folder = [*params, *arguments], Path(str(config.hydra.sweep.dir))
    question: Any = OmegaConf.to_object(config.sweep.compare)
    compared = None if question.by is None else plan_comparison(question, overrides, config, config_dir())
    grid = Combinations(overrides, config_dir(), base=config) if compared is None else compared.grid
    if compared is None and len(grid) > AHEAD:
        say(f"sweep {folder}: {_describe(grid)}; each value is checked, then the first job starts")
    shared, first = grid.check(), grid.config([0] * len(grid.axes))
    if build is None:
        check_not_detached(first)
    run = build(first) if build is not None else None
    with open_sweep(folder, shared, first.objective) as sweep:
        OmegaConf.save(config, folder / "multirun.yaml")  # as Hydra's own sweeper does
        queue: JobSource = (
            Queue(sweep, _combinations(grid, sweep), len(grid)) if compared is None else Rounds(sweep, compared)
        )
        if run is not None:
            run_queue(config, queue, run)
        else:
            _run_by(launch, queue, config.hydra.sweeper.max_batch_size)
        track_sweep(sweep, first.tracking)
        kept = (Status.queued, Status.running) if first.sweep.detach else ()
        if any(job.status not in kept for job in queue.failed):
            raise jobs_failed(sweep)


def _describe(grid: Combinations) -> str:
    axes = [f"{axis.key} ({len(axis.overrides):,} values)" for axis in grid.axes if len(axis.overrides) > 1]
    return f"{len(grid):,} jobs, {' x '.join(axes)}"


def _combinations(grid: Combinations, sweep: Sweep) -> Iterator[Combination]:
    """Yields the jobs; their distinguishing overrides set the keys that vary here or varied under earlier commands."""
    earlier = set(sweep.varied)
    varied = [len(set(axis.overrides)) > 1 or axis.key.lstrip("+") in earlier for axis in grid.axes]
    is_alone = not any(varied)

    def compose(positions: tuple[int, ...]) -> Callable[[], Config]:
        return lambda: grid.config(positions)

    for positions in grid:
        overrides = grid.overrides(positions)
        distinct = [override for override, varies in zip(overrides, varied, strict=True)
                    if (varies or is_alone) and not override.startswith(("sweep=", "sweep."))]  # fmt: skip
        yield overrides, distinct, compose(positions)


def _run_by(launch: Callable[..., Any], queue: JobSource, batch_size: int | None) -> None:
    """Runs the jobs by the launcher of another project, which waits for a whole batch."""
    sweep, started = queue.sweep, 0
    say(describe_waiting(sweep, len(queue), is_known=queue.is_known))
    while batch := list(itertools.islice(iter(queue.next, None), batch_size)):
        for job, _ in batch:
            job.folder.mkdir(parents=True, exist_ok=True)  # the launcher's job finds its name by this folder
        try:
            results = launch([overrides for _, overrides in batch], initial_job_idx=started)
        finally:
            refresh(sweep)
        started += len(batch)
        if not queue.failed:
            for result in results:
                _ = result.return_value  # raises the error of a job that could not record it
    Screen(sweep, 0).summary()
