"""Runs a search by Optuna: its study proposes a job whenever there is room for one, and can be resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from qlora.config.compose import to_config
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config
from qlora.config.secret_values import storage_variable
from qlora.errors import ConfigError
from qlora.runtime.folder_lock import in_turn
from qlora.runtime.search_trial import TrialLink
from qlora.runtime.sweep_job import TRIAL_VARIABLE
from qlora.sweep.engine_config import SearchSettings
from qlora.sweep.goals import check_pruning, find_goals
from qlora.sweep.job_processes import ASK_SECONDS, RunTasks, Task
from qlora.sweep.jobs import Job, Status, read_job, write_status
from qlora.sweep.launcher import command, open_sweep, prepare
from qlora.sweep.leaderboard import write_leaderboard
from qlora.sweep.live_table import Screen
from qlora.sweep.search_results import print_summary, raise_for_failures, write_results
from qlora.sweep.space import build_space
from qlora.sweep.study import Study
from qlora.sweep.summary_run import track_sweep
from qlora.sweep.sweep_folder import common_keys
from qlora.sweep.trials import Planned, Search
from qlora.upstream.omegaconf import raw_node, raw_value


def search(
    config: DictConfig,
    loader: ConfigLoader,
    overrides: list[str],
    *,
    launch: Callable[..., Any],
    build: Callable[[Config], RunTasks] | None,
) -> None:
    """Runs the trials that the study lacks: by one of our engines, or in batches by the `launch` of another launcher.

    Raises `ConfigError` for every mistake before a job starts, and `JobsFailed` at the end if a trial failed.
    """
    prepare(config)
    settings = OmegaConf.to_object(config.hydra.sweeper)
    assert isinstance(settings, SearchSettings)
    settings.check()
    space = build_space(overrides, settings.params, settings.conditions, loader)

    def compose(overrides: list[str]) -> Config:
        return to_config(loader.load_sweep_config(config, overrides))

    if settings.objectives:  # a job returns the first
        space.fixed.append(f"objective={settings.objectives[0]}")
    examples = dict.fromkeys(tuple(space.overrides(point)) for point in space.examples())
    configs = [compose([*space.fixed, *example]) for example in examples]
    goals = find_goals(settings, configs)
    check_pruning(settings, configs, goals)
    if (by := configs[0].sweep.compare.by) is not None:
        raise ConfigError(
            f"sweep.compare.by={by}: hydra/sweeper=optuna searches for the best values, and sweep.compare compares "
            "given ones by the same seeds; leave one of them out"
        )
    if configs[0].sweep.detach:
        raise ConfigError("sweep.detach=true: a search needs the result of each job to plan the next one; leave it out")
    run = build(configs[0]) if build is not None else None
    shared = common_keys([config_to_dict(example) for example in configs])
    is_alone = settings.storage is None
    with (
        open_sweep(Path(str(config.hydra.sweep.dir)), shared, configs[0].objective, is_alone=is_alone) as sweep,
        contextlib.ExitStack() as stack,
    ):
        sweep.goals, sweep.is_shared = {goal.metric: goal.direction for goal in goals}, not is_alone
        variable = storage_variable(raw_value(raw_node(config.hydra.sweeper, "storage")))
        trials = Search(Study(settings, space, goals, sweep, configs[0], variable), compose)
        stack.enter_context(trials.study.presence.announce())
        trials.recover()
        OmegaConf.save(config, sweep.folder / "multirun.yaml")  # as Hydra's own sweeper does
        try:
            if run is None:
                _run_in_batches(trials, launch)
            else:
                _run_one_by_one(trials, config, run)
        finally:
            write_results(trials.study)
            with in_turn(sweep.folder):
                sweep.write()
                write_leaderboard(sweep)
        print_summary(trials.study)
        track_sweep(sweep, configs[0].tracking)
        raise_for_failures(trials)


def _run_one_by_one(trials: Search, config: DictConfig, run: RunTasks) -> None:
    """Runs jobs by an engine that asks for the next trial whenever it has room for one."""
    with Screen(trials.sweep, trials.left) as screen:

        def next_task() -> Task | None:
            planned = trials.next()
            screen.expect(trials.left + len(trials.open))
            if planned is None:
                return None
            environment = {} if planned.link is None else {TRIAL_VARIABLE: planned.link.to_text()}
            return Task(planned.job, command(config, planned.job.folder, planned.overrides), environment)

        def ended(job: Job) -> None:
            screen.ended(job)
            trials.ended(job)

        run(
            next_task,
            on_start=screen.started,
            on_end=ended,
            on_wait=screen.waiting,
            may_come=trials.may_come,
        )


def _run_in_batches(trials: Search, launch: Callable[..., Any]) -> None:
    """Runs jobs by the launcher of another project, which waits for a whole batch."""
    started = 0
    while True:
        batch: list[Planned] = []
        while len(batch) < trials.settings.batch_size and (planned := trials.next()) is not None:
            write_status(planned.job.folder, Status.queued, overrides=planned.job.overrides, reason=None)
            batch.append(planned)
        if not batch and trials.may_come():
            time.sleep(ASK_SECONDS)
            continue
        if not batch:
            return
        launch([[*planned.overrides, *_link_override(planned.link)] for planned in batch], initial_job_idx=started)
        started += len(batch)
        for planned in batch:
            job = read_job(planned.job.folder)
            if job.status not in (Status.finished, Status.pruned, Status.failed):
                write_status(job.folder, Status.failed, reason="ended without a result")
                job = read_job(job.folder)
            trials.sweep.update(job)
            trials.ended(job)


def _link_override(link: TrialLink | None) -> list[str]:
    """Returns the override by which any launcher passes the trial to a job, as an environment variable."""
    if link is None:
        return []
    return [f"++hydra.job.env_set.{TRIAL_VARIABLE}={QuotedString(link.to_text(), Quote.single).with_quotes()}"]
