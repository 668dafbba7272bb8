"""Starts the command of a task: joins the launched processes, makes the folder, and has Hydra run it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qlora.config.arguments import Arguments, folder_override
from qlora.config.command import ComposedCommand
from qlora.config.compose import START_VARIABLE, opened_hydra
from qlora.config.mistakes import MISTAKES
from qlora.config.registries.trackers import NO_TRACKER
from qlora.config.schema import Config, Resume
from qlora.config.sweep_values import sweep_params
from qlora.config.trained_run import uses_adapter
from qlora.errors import RunError, UserError
from qlora.runtime import distributed
from qlora.runtime.command_folder import Start, check_links, start_anew, start_in
from qlora.runtime.console import quiet_libraries
from qlora.runtime.environment import reuse_freed_memory
from qlora.runtime.needs import Needs
from qlora.runtime.sweep_job import VARIABLE
from qlora.runtime.trained import find_trained
from qlora.sweep import names
from qlora.tasks import build_job, run_job
from qlora.tasks.hydra_job import job
from qlora.tasks.protocol import WholeSweep
from qlora.upstream.hydra_run import add_overrides, failure, run_composed, sweep_composed

WITHOUT_FOLDER = ("hydra.output_subdir=null", "hydra.job_logging.root.handlers=[console]",
                  "~hydra.job_logging.handlers.file")  # fmt: skip
"""What every process but the main one adds, so that one process writes the folder."""


@dataclass
class Command:
    """A command line with its composed config, and what its task needs."""

    arguments: Arguments
    checked: ComposedCommand
    needs: Needs

    @property
    def composed(self) -> DictConfig:
        """The composed config, of a sweep that of its first job."""
        return self.checked.node

    @property
    def config(self) -> Config:
        """The same as dataclasses."""
        return self.checked.config

    @property
    def has_sweep_folder(self) -> bool:
        """Whether the folder is that of a sweep."""
        return self.arguments.sweeps or self.runs_sweep

    @property
    def runs_sweep(self) -> bool:
        """Whether many jobs are run; a job of a `sweep=` file names the file too, and runs alone."""
        return self.arguments.multirun or self.composed.hydra.mode is RunMode.MULTIRUN


def start(command: Command) -> None:
    """Runs what a command asks for: one task, or a sweep; what a task lacks is said before torch is imported."""
    if uses_adapter(command.config.task.name) and not command.has_sweep_folder:
        find_trained(command.config, command.arguments.overrides, Path(str(command.composed.hydra.run.dir)))
    if command.needs.whole_sweep:
        _run_whole_sweep(command)
    elif not command.needs.folder and not command.arguments.sweeps:
        join(command)
        _run_without_folder(command)
    else:
        _run_in_folder(command)


def _run_whole_sweep(command: Command) -> None:
    """Runs a task that reads a sweep itself."""
    composed, arguments = command.composed, command.arguments
    folder = folder_override(names.folder_words(arguments.overrides)) or str(composed.hydra.sweep.dir)
    sweep = WholeSweep(
        [*arguments.overrides, *sweep_params(composed, arguments.overrides)],
        arguments.config_dir,
        bool(OmegaConf.select(composed, "hydra.sweeper.conditions")),
    )
    run_job(build_job(command.config, folder, whole_sweep=sweep))


def _run_without_folder(command: Command) -> None:
    """Runs a task that writes nothing: no folder, no log."""
    hydra = command.composed.hydra
    logging_config, verbose = hydra.job_logging.copy(), bool(hydra.verbose)
    OmegaConf.set_struct(logging_config, False)
    OmegaConf.set_readonly(logging_config, False)
    logging_config.merge_with({"root": {"handlers": ["console"]}})
    logging_config.handlers.pop("file", None)
    configure_log(logging_config, hydra.verbose)
    quiet_libraries(verbose=verbose)
    run_job(build_job(command.config, str(hydra.run.dir), list(hydra.overrides.task)), verbose=verbose)


def _run_in_folder(command: Command) -> None:
    """Has Hydra run one job or a sweep; a refused command leaves its folder as it was, or none."""
    composed_at = os.environ[START_VARIABLE]
    added = names.folder_words(command.arguments.overrides) if command.arguments.sweeps else []
    of_process = join(command)
    if command.composed.resume is Resume.never:
        # Processes that torchrun starts again resume in the folder that they began in.
        added += [distributed.agree_on_start("folder", _new_folder(command, added))]
        added += ["resume=auto"] if distributed.is_restart() else []
    folder = make_folder(command, composed_at, added)
    if distributed.world_size() > 1:  # the folder of the main process is that of all, also when they are started again
        os.environ[START_VARIABLE] = distributed.agree_on_start(
            "place", distributed.broadcast(os.environ[START_VARIABLE])
        )
    _resolve_name_again(command)
    try:
        (_run_sweep if command.runs_sweep else _run_once)(command, [*added, *of_process])
    except MISTAKES:
        if folder is not None:
            folder.restore()
        raise
    distributed.destroy_process_group()


def _resolve_name_again(command: Command) -> None:
    """Has the name of a run without one resolved anew, where `START_VARIABLE` has changed."""
    for composed in (command.composed, command.checked.base):
        OmegaConf.get_cache(composed).pop("qlora.folder", None)


def _new_folder(command: Command, added: list[str]) -> str:
    """Returns the override that names a folder where there is none yet."""
    _resolve_name_again(command)
    hydra = command.composed.hydra
    folder = folder_override(added) or str(hydra.sweep.dir if command.arguments.sweeps else hydra.run.dir)
    return names.new_folder_word(Path(folder), command.arguments.sweeps)


def _run_once(command: Command, added: list[str]) -> None:
    """Runs one task with the config that is composed already."""
    add_overrides(command.composed, added)
    with opened_hydra(command.arguments.overrides, command.arguments.config_dir) as hydra:
        result = run_composed(hydra, command.composed, partial(job, typed=_typed(command)))
    error = failure(result)
    if isinstance(error, UserError) or (error is not None and distributed.is_loss_of_peer(error)):
        raise error
    _ = result.return_value  # prints the overrides of a bug, and raises it


def _typed(command: Command) -> Sequence[str]:
    """Returns the words that start this task again; those of a sweep's job start it by the sweep."""
    return () if VARIABLE in os.environ else command.arguments.typed


def _run_sweep(command: Command, added: list[str]) -> None:
    """Runs a sweep."""
    arguments, mode = command.arguments, command.composed.hydra.mode
    afterwards = _track_other_engine(command, added)
    if arguments.multirun and mode is RunMode.RUN:
        warnings.warn("-m runs a sweep in spite of hydra.mode=RUN", UserWarning, stacklevel=2)
    if mode is not RunMode.MULTIRUN:
        added = [*added, f"hydra.mode={RunMode.MULTIRUN.name}"]
    add_overrides(command.checked.base, added)
    try:
        with opened_hydra(arguments.overrides, arguments.config_dir) as hydra:
            sweep_composed(hydra, command.checked.base, job)
    except Exception:
        afterwards()
        raise
    afterwards()


def _track_other_engine(command: Command, added: list[str]) -> Callable[[], None]:
    """Returns what tracks the sweep as a whole where its jobs run by an engine that knows nothing of sweeps."""
    hydra, config = command.composed.hydra, command.config
    if config.tracking.backend == NO_TRACKER:
        return lambda: None
    from qlora.sweep.summary_run import track_other_engine

    folder = Path(folder_override(added) or str(hydra.sweep.dir))
    return lambda: track_other_engine(folder, hydra.runtime.choices, config.tracking)


def make_folder(command: Command, composed_at: str, added: list[str]) -> Start | None:
    """Makes the folder of the command and returns its start; None: another process keeps it.

    A run without a name is called by the time that it was at `composed_at`; processes that were launched together
    have agreed on one since.
    """
    composed = command.composed
    given = folder_override(added)
    path = Path(given or str(composed.hydra[("run", "sweep")[command.has_sweep_folder]].dir))
    check_links(path)
    if (
        not distributed.is_main_process() or distributed.is_restart() or VARIABLE in os.environ
    ):  # a job's folder is its sweep's
        return None
    if not command.has_sweep_folder and given is None and composed.name is None and path.name == composed_at:
        return start_anew(path.with_name(os.environ[START_VARIABLE]))
    return start_in(path, is_sweep=command.has_sweep_folder)


def join(command: Command) -> list[str]:
    """Joins the processes that were launched together; returns the overrides that this one adds."""
    config, needs, sweeps = command.config, command.needs, command.arguments.sweeps
    if config.trainer.deterministic or needs.deterministic:  # before anything is on a GPU
        from qlora.runtime.determinism import fix_workspace

        fix_workspace()
    if config.trainer.memory_budget is not None:
        reuse_freed_memory()
    if distributed.world_size() == 1:
        distributed.init_process_group()
        return []
    if sweeps or not needs.several_processes:
        what = (
            "a sweep starts a process for each of its jobs" if sweeps else "only a training run uses several processes"
        )
        raise RunError(
            f"{distributed.world_size()} processes were launched (WORLD_SIZE), and {what}; start it without a launcher"
        )
    distributed.init_process_group()
    os.environ[START_VARIABLE] = distributed.agree_on_start("time", os.environ[START_VARIABLE])
    return [] if distributed.is_main_process() else [*WITHOUT_FOLDER]
