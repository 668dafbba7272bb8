"""The command line: Hydra composes, `compose` checks, `Run` works; every user mistake ends in one message."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
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

from qlora.compose import (
    CONF_DIR,
    check_overrides,
    expand_sweep,
    explain,
    open_entries,
    register,
    show_config,
    to_config,
    unknown_flag,
)
from qlora.console import close_bars, quiet_libraries, take_over_handlers
from qlora.errors import ConfigError, Pruned, Stopped
from qlora.folder import RunFolder
from qlora.schema import Resume, TaskName, TrackingBackend
from qlora.secrets import hide
from qlora.sweep import names
from qlora.sweep.engines import check_engine
from qlora.sweep.jobs import recorded

log = logging.getLogger(__name__)

# Engines that send `job` to other machines import this module there.
register()
names.register()


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 1 after a failure, 130 after Ctrl-C, 75 once saved."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves its errors to the handler below
    try:
        _main(sys.argv[1:])
    except (Mistake, ConfigError, HydraException, OmegaConfBaseException) as error:
        close_bars()
        cause = error.__cause__ if isinstance(error, Mistake) else error
        assert isinstance(cause, Exception)
        if full_error:
            raise cause from None
        print(hide(f"error: {cause if isinstance(cause, ConfigError) else explain(cause)}"), file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        close_bars()
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(Stopped.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command in the same folder to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        close_bars()
        if isinstance(error, OSError) and error.errno in UNWRITABLE and not full_error:
            place = error.filename or "the run folder"
            print(
                f"error: {place} cannot be written ({error.strerror}); choose another folder with hydra.run.dir=FOLDER",
                file=sys.stderr,
            )
        else:
            print(hide(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


class Mistake(BaseException):
    """Carries a `ConfigError` out of a single run past Hydra, which would print lines of its own."""


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
        check_engine(args.overrides)
        composed = check_overrides(args.overrides, args.config_dir, multirun=args.multirun)
        if args.cfg == "job":
            sys.stdout.write(show_config(composed, args.package, resolve=args.resolve))
            return
        if composed.task.name is TaskName.wandb_sweep:
            from qlora.sweep.wandb_sweep import write_wandb_sweep

            write_wandb_sweep(args.overrides, args.config_dir)
            return
        flags = [word for word in argv if word not in args.overrides]
        sweeps = args.multirun or any(word.startswith("sweep=") for word in args.overrides)
        folder = names.folder_words(args.overrides) if sweeps else []
        if composed.resume is Resume.never:
            folder += names.new_folder_words([*next(expand_sweep(args.overrides)), *folder], args.config_dir, sweeps)
        # Hydra reads no flag between overrides.
        sys.argv[1:] = [*open_entries(args.overrides), *folder, *flags]
        if sweeps and composed.tracking.backend is TrackingBackend.wandb:
            from qlora.sweep.trackers import track_other_engine

            afterwards = partial(track_other_engine, [*next(expand_sweep(args.overrides)), *folder], args.config_dir)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    except Exception:
        afterwards()
        raise
    afterwards()


def job(composed: DictConfig) -> Any:
    """Runs one composed job in Hydra's output folder and returns its objective."""
    config = to_config(composed)
    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    quiet_libraries(verbose=bool(hydra_config.verbose))
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        with recorded(
            output_dir, names.own_overrides(hydra_config), RunFolder(output_dir).result(config.task.name.value).name
        ):
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
        if not in_sweep and isinstance(error, ConfigError):
            raise Mistake from error
        # The traceback's frames hold the model; a sweep keeps the exception until its end.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        free_memory()
        if in_sweep:  # of an engine that runs jobs by this function; ours keeps the files of a sweep itself
            from qlora.sweep.report import write_overview

            write_overview(Path(hydra_config.sweep.dir), config.objective)


def free_memory() -> None:
    """Gives a finished job's memory back, on the host and on the GPU."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
