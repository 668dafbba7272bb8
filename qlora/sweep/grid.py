"""The grid of a sweep: every value is checked once, then each combination is composed when its turn comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora.config.compose import Combinations
from qlora.config.schema import Config
from qlora.runtime.console import say
from qlora.sweep.engines import check_not_detached
from qlora.sweep.job_processes import RunTasks
from qlora.sweep.jobs import Status
from qlora.sweep.launcher import (
    AHEAD,
    Combination,
    Queue,
    config_dir,
    jobs_failed,
    open_sweep,
    prepare,
    run_queue,
)
from qlora.sweep.live_table import Screen, found
from qlora.sweep.overview import Sweep
from qlora.sweep.summary_run import track_sweep
from qlora.sweep.sweep_report import refresh


def run_grid(
    config: DictConfig,
    arguments: Sequence[str],
    *,
    launch: Callable[..., Any],
    build: Callable[[Config], RunTasks] | None,
) -> None:
    """Runs the jobs that are not finished yet: by an engine of our own, or by another launcher's `launch`.

    Raises `ConfigError` for a value that is refused, and where the folder holds a sweep of another config or one that
    runs; `JobsFailed` at the end where a job failed.
    """
    prepare(config)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    grid, folder = Combinations([*params, *arguments], config_dir()), Path(str(config.hydra.sweep.dir))
    if len(grid) > AHEAD:
        say(f"sweep {folder}: {_in_words(grid)}; each value is checked, then the first job starts")
    shared, first = grid.check(), grid.config([0] * len(grid.axes))
    if build is None:
        check_not_detached(first)
    run = build(first) if build is not None else None
    with open_sweep(folder, shared, first.objective) as sweep:
        OmegaConf.save(config, folder / "multirun.yaml")  # as Hydra's own sweeper does
        queue = Queue(sweep, _combinations(grid, sweep), len(grid))
        if run is not None:
            run_queue(config, queue, run)
        else:
            _run_by(launch, queue, config.hydra.sweeper.max_batch_size)
        track_sweep(sweep, first.tracking)
        kept = (Status.queued, Status.running) if first.sweep.detach else ()
        if any(job.status not in kept for job in queue.failed):
            raise jobs_failed(sweep)


def _in_words(grid: Combinations) -> str:
    axes = [f"{axis.key} ({len(axis.overrides):,} values)" for axis in grid.axes if len(axis.overrides) > 1]
    return f"{len(grid):,} jobs, {' x '.join(axes)}"


def _combinations(grid: Combinations, sweep: Sweep) -> Iterator[Combination]:
    """Yields the jobs; the overrides of their own are those of keys that vary here, or did under earlier commands."""
    before = set(sweep.varied)
    varied = [len(set(axis.overrides)) > 1 or axis.key.lstrip("+") in before for axis in grid.axes]
    is_alone = not any(varied)

    def compose(positions: tuple[int, ...]) -> Callable[[], Config]:
        return lambda: grid.config(positions)

    for positions in grid:
        words = grid.words(positions)
        own = [word for word, is_own in zip(words, varied, strict=True)
               if (is_own or is_alone) and not word.startswith(("sweep=", "sweep."))]  # fmt: skip
        yield words, own, compose(positions)


def _run_by(launch: Callable[..., Any], queue: Queue, batch_size: int | None) -> None:
    """Hands the jobs to another project's launcher, which waits for all of a batch."""
    sweep, started = queue.sweep, 0
    say(found(sweep, len(queue), is_known=queue.is_known))
    while batch := list(itertools.islice(iter(queue.next, None), batch_size)):
        for job, _ in batch:
            job.folder.mkdir(parents=True, exist_ok=True)  # by which the launcher's job finds its name
        try:
            results = launch([words for _, words in batch], initial_job_idx=started)
        finally:
            refresh(sweep)
        started += len(batch)
        if not queue.failed:
            for result in results:
                _ = result.return_value  # raises what ended a job that could not record it
    Screen(sweep, 0).summary()
