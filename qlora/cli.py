"""The command line: Hydra composes, `compose` checks, `Run` works; every user mistake ends in one message."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qlora import world
from qlora.compose import (
    CONF_DIR,
    START_VARIABLE,
    check_overrides,
    expand_sweep,
    explain,
    now,
    open_entries,
    register,
    show_config,
    to_config,
    unknown_flag,
)
from qlora.console import close_bars, quiet_libraries, take_over_handlers
from qlora.errors import ConfigError, Pruned, Stopped
from qlora.folder import RunFolder
from qlora.places import anchor_paths, give_home
from qlora.schema import Config, Resume, TaskName, TrackingBackend
from qlora.searchpath import option_folder
from qlora.secrets import hide
from qlora.spelling import keep_spelling, reading_spellings
from qlora.sweep import names
from qlora.sweep.engines import check_engine
from qlora.sweep.jobs import recorded

log = logging.getLogger(__name__)

# Engines that send `job` to other machines import this module there.
register()
names.register()


FULL_ERROR, WANTS_FULL_ERROR = "HYDRA_FULL_ERROR", "QLORA_FULL_ERROR"
"""Hydra's variable, which is always set inside, for Hydra then leaves its errors to `main`; and what the user had set
it to, for the jobs of a sweep, which inherit the first."""


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 1 after a failure, 130 after Ctrl-C, 75 once saved."""
    before = {name: os.environ.get(name) for name in (FULL_ERROR, WANTS_FULL_ERROR, "HOME")}
    in_full = (before[WANTS_FULL_ERROR] or before[FULL_ERROR]) == "1"
    os.environ |= {FULL_ERROR: "1", WANTS_FULL_ERROR: "1" if in_full else "0"}
    try:
        _main(sys.argv[1:])
    except Stopped as stopped:
        close_bars()
        if world.is_first():
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(Stopped.exit_code)
    except KeyboardInterrupt:
        if world.is_first():
            print("\ninterrupted; run the same command in the same folder to go on", file=sys.stderr)
        sys.exit(130)
    except (Mistake, Exception) as error:
        close_bars()
        cause = error.__cause__ if isinstance(error, Mistake) else error
        assert isinstance(cause, Exception)
        _tell(cause, in_full=in_full)
        sys.exit(1)
    finally:  # who calls this inside a process of its own may start others
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


PATIENCE = 3
"""Seconds in which the first process may tell an error that all of them meet; the launcher then ends the others."""


def _tell(error: Exception, *, in_full: bool) -> None:
    """Prints what ended the run: a sentence for a mistake, the traceback of a bug; each of several by its name."""
    is_mistake = isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
    if world.is_loss_of_peer(error):
        text = "error: another process of this run has ended; its own message tells why"
        time.sleep(PATIENCE)
    else:
        world.tell_launcher(error)
        if not world.is_first():
            time.sleep(PATIENCE)
        text = f"error: {error if isinstance(error, ConfigError) else explain(error)}" if is_mistake else ""
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            place = error.filename or "the run folder"
            text = (
                f"error: {place} cannot be written ({error.strerror}); choose another folder with hydra.run.dir=FOLDER"
            )
    if in_full or not text:
        text = "".join(traceback.format_exception(error)).rstrip()
    name = f"process {world.rank()} of {world.size()}: " if world.size() > 1 else ""
    print(hide(f"{name}{text}"), file=sys.stderr, flush=True)


class Mistake(BaseException):
    """Carries a `ConfigError` out of a single run past Hydra, which would print lines of its own."""


ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""The variables that settle how torch allocates a GPU's memory."""
WITHOUT_CACHES = (TaskName.report, TaskName.plan, TaskName.migrate, TaskName.doctor)
"""The tasks that read no rows, and load no model."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC)


def _main(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        from qlora.help import print_help

        print_help(argv)
        return
    args, rest = get_args_parser().parse_known_intermixed_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise unknown_flag(unknown[0])
    if args.config_path is not None:
        raise ConfigError(
            "--config-path replaces the whole configuration; use --config-dir FOLDER to add your own options"
        )
    afterwards: Callable[[], None] = lambda: None  # noqa: E731
    if not (args.shell_completion or args.hydra_help or args.experimental_rerun):
        flags = [word for word in argv if word not in args.overrides]
        if args.config_dir is not None and "://" in args.config_dir:  # Hydra's flag knows folders only
            options = str(option_folder(args.config_dir, "--config-dir"))
            flags = [f"{word.removesuffix(args.config_dir)}{options}" if word.endswith(args.config_dir) else word
                     for word in flags]  # fmt: skip
            args.config_dir = options
        check_engine(args.overrides)
        args.overrides = keep_spelling(args.overrides)
        composed = check_overrides(args.overrides, args.config_dir, multirun=args.multirun)
        if args.cfg == "job":
            sys.stdout.write(show_config(composed, args.package, resolve=args.resolve))
            return
        if composed.task.name is TaskName.wandb_sweep:
            from qlora.sweep.wandb_sweep import write_wandb_sweep

            write_wandb_sweep(args.overrides, args.config_dir)
            return
        if composed.task.name not in WITHOUT_CACHES or composed.data.cache_dir:
            give_home(composed.data.cache_dir)
        sweeps = args.multirun or any(word.startswith("sweep=") for word in args.overrides)
        folder = names.folder_words(args.overrides) if sweeps else []
        joined = _join(composed, sweeps)
        if composed.resume is Resume.never:
            words = names.new_folder_words([*next(expand_sweep(args.overrides)), *folder], args.config_dir, sweeps)
            # Processes that torchrun starts again go on in the folder that they began in.
            folder += [world.agree_on_start("folder", words[0]), *(["resume=auto"] if world.is_restart() else [])]
        # Hydra reads no flag between overrides.
        sys.argv[1:] = [*open_entries([*args.overrides, *folder]), *joined, *flags]
        if sweeps and composed.tracking.backend is TrackingBackend.wandb:
            from qlora.sweep.trackers import track_other_engine

            afterwards = partial(track_other_engine, [*next(expand_sweep(args.overrides)), *folder], args.config_dir)
    try:
        with reading_spellings(CONF_DIR):
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    except Exception:
        afterwards()
        raise
    afterwards()
    world.leave()


def _join(config: DictConfig, sweeps: bool) -> list[str]:
    """Joins the processes that were launched together; returns what Hydra is to do otherwise in this one."""
    is_replay = config.task.name is TaskName.replay
    if config.trainer.deterministic or is_replay:  # before anything is on a GPU
        from qlora.models.determinism import fix_workspace

        fix_workspace()
    if config.trainer.memory_budget is not None and not ALLOCATOR & os.environ.keys():
        # What torch holds is what is counted: so pages that are free must serve again wherever they lie.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if world.size() == 1:
        world.join()
        return []
    if sweeps or not (is_replay or (config.task.name is TaskName.train and config.task.train)):
        what = (
            "a sweep starts a process for each of its jobs" if sweeps else "only a training runs in several processes"
        )
        raise ConfigError(
            f"{world.size()} processes were launched (WORLD_SIZE), and {what}; start it without a launcher"
        )
    world.join()
    os.environ[START_VARIABLE] = world.agree_on_start("time", now())
    if world.is_first():
        return []
    return ["hydra.output_subdir=null", "hydra.job_logging.root.handlers=[console]", "~hydra.job_logging.handlers.file"]


def job(composed: DictConfig) -> Any:
    """Runs one composed job in Hydra's output folder and returns its objective."""
    config = to_config(composed)
    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    typed_in = Path(hydra_config.runtime.cwd)
    sweep_dir = Path(hydra_config.sweep.dir)
    if hydra_config.job.chdir:
        sweep_dir = typed_in / sweep_dir
        anchor_paths(config, typed_in)
    if config.task.name not in WITHOUT_CACHES:  # an engine may have sent the job to another machine
        give_home(config.data.cache_dir)
    quiet_libraries(verbose=bool(hydra_config.verbose))
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        with _recorded(output_dir, hydra_config, config):
            if config.task.name is TaskName.report:  # reads files only, so torch need not be imported
                from qlora.sweep.report import report

                return report(config, output_dir)["objective"]
            if config.task.name is TaskName.plan:  # needs the model's shape only
                from qlora.plan import plan

                return plan(config, output_dir)["objective"]
            if config.task.name is TaskName.migrate:  # reads and writes texts only
                from qlora.migrate import migrate

                return migrate(config, output_dir)["objective"]
            if config.task.name is TaskName.doctor:  # torch may be what is broken
                from qlora.doctor import doctor

                return doctor(config, output_dir)["objective"]
            _import_run()
            from qlora.run import Run

            if not hydra_config.verbose:
                take_over_handlers()
            if config.task.name is TaskName.replay:
                from qlora.replay import replay

                return replay(config, output_dir)["objective"]
            return Run(config, output_dir, overrides, names.membership(hydra_config)).execute()["objective"]
    except Pruned:
        close_bars()
        return None
    except Exception as error:
        if not in_sweep and (isinstance(error, ConfigError) or world.is_loss_of_peer(error)):
            raise Mistake from error
        # The traceback's frames hold the model; a sweep keeps the exception until its end.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        free_memory()
        if in_sweep:  # of an engine that runs jobs by this function; ours keeps the files of a sweep itself
            from qlora.sweep.report import write_overview

            write_overview(sweep_dir, config.objective)


def _import_run() -> None:
    """Imports what a run needs, half a million objects that stay: no collection looks through them, now or later."""
    if "qlora.run" in sys.modules:
        return
    gc.disable()
    try:
        import qlora.run  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_let_go)


def _let_go() -> None:
    """Undoes the freezing at the interpreter's end, which frees everything; some libraries call the rest a leak."""
    gc.unfreeze()
    gc.disable()


def _recorded(folder: Path, hydra_config: Any, config: Config) -> AbstractContextManager[None]:
    """Holds the run's folder and records what becomes of the run; of several processes the first one does."""
    if not world.is_first():
        return nullcontext()
    return recorded(folder, names.own_overrides(hydra_config), RunFolder(folder).result(config.task.name.value).name)


def free_memory() -> None:
    """Gives a finished job's memory back, on the host and on the GPU."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
