"""The command line: Hydra composes, `compose` checks, `Run` works; every user mistake ends in one message."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import logging
import logging.config
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config import trust
from qlora.config.command import check_command, show_config
from qlora.config.compose import START_VARIABLE, VERSION_BASE, now, register
from qlora.config.conversion import to_config, without_hydra
from qlora.config.file_spelling import reading_spellings
from qlora.config.messages import explain
from qlora.config.options import CONF_DIR
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import open_entries, override_value, refuse_unreadable, with_environment
from qlora.config.paths import anchor_paths, give_home
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config, Resume, TaskName
from qlora.config.search_path import option_folder
from qlora.config.suggestions import unknown_flag
from qlora.config.sweep_values import expand_sweep
from qlora.config.trackers import NO_TRACKER
from qlora.errors import ConfigError, Pruned, Stopped, UserError
from qlora.runtime import distributed
from qlora.runtime.command_folder import Start, check_links, start_anew, start_in
from qlora.runtime.console import close_bars, complain, quiet_libraries, take_over_handlers
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import VARIABLE, SweepJob
from qlora.sweep import names
from qlora.sweep.engines import check_engine
from qlora.sweep.jobs import recorded
from qlora.upstream.hydra import flag_parser

log = logging.getLogger(__name__)

# Engines that send `job` to other machines import this module there.
register()
names.register()


FULL_ERROR, WANTS_FULL_ERROR = "HYDRA_FULL_ERROR", "QLORA_FULL_ERROR"
"""Hydra's variable, which is always set inside, for Hydra then leaves its errors to `main`; and what the user had set
it to, for the jobs of a sweep, which inherit the first."""


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 1 after a failure, 130 after Ctrl-C, 75 once saved."""
    before = {name: os.environ.get(name) for name in (FULL_ERROR, WANTS_FULL_ERROR, START_VARIABLE, "HOME")}
    in_full = (before[WANTS_FULL_ERROR] or before[FULL_ERROR]) == "1"
    os.environ |= {FULL_ERROR: "1", WANTS_FULL_ERROR: "1" if in_full else "0"}
    try:
        _check_surroundings()
        with trust.fixed_resolvers():
            _main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if SHOWING & {*sys.argv}:
            sys.exit(0)
        print("error: the standard output was closed before the command had ended", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        close_bars()
        if distributed.is_main_process():
            complain(f"\n{stopped}")
        sys.exit(Stopped.exit_code)
    except KeyboardInterrupt:
        if distributed.is_main_process():
            complain("\ninterrupted; run the same command in the same folder to go on")
        sys.exit(130)
    except (Mistake, Exception) as error:
        close_bars()
        # Python's logging wraps what a handler raises.
        is_wrapped = isinstance(error, Mistake) or isinstance(error.__cause__, UserError)
        cause = error.__cause__ if is_wrapped else error
        assert isinstance(cause, Exception)
        _tell(cause, in_full=in_full)
        sys.exit(1)
    finally:  # who calls this inside a process of its own may start others
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


SHOWING = {"-h", "--help", "--hydra-help", "--cfg", "-c", "--info", "-i"}
"""Flags that print something and do nothing else."""


def _check_surroundings() -> None:
    """Raises `ConfigError` where Python was started so that nothing could run."""
    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python was started with -OO or PYTHONOPTIMIZE=2, which takes out descriptions that this program and its "
            "libraries read; start it without"
        )
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(f"the working directory is gone ({error.strerror}); change to one that exists") from error


PATIENCE = 3
"""Seconds in which the first process may tell an error that all of them meet; the launcher then ends the others."""


def _tell(error: Exception, *, in_full: bool) -> None:
    """Prints what ended the run: a sentence for a mistake, the traceback of a bug; each of several by its name."""
    if not isinstance(error, UserError) and _is_of_log(error):
        error = ConfigError(
            f"hydra.job_logging or hydra.hydra_logging cannot be set up ({error.__cause__ or error}); correct it, or "
            "leave both as they are"
        )
    is_mistake = isinstance(error, UserError | HydraException | OmegaConfBaseException)
    if distributed.is_loss_of_peer(error):
        text = "error: another process of this run has ended; its own message tells why"
        time.sleep(PATIENCE)
    else:
        distributed.tell_launcher(error, in_full=in_full or not is_mistake)
        if not distributed.is_main_process():
            time.sleep(PATIENCE)
        text = f"error: {error if isinstance(error, UserError) else explain(error)}" if is_mistake else ""
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            place = error.filename or "the run folder"
            text = (
                f"error: {place} cannot be written ({error.strerror}); choose another folder with hydra.run.dir=FOLDER"
            )
    if in_full or not text:
        text = "".join(traceback.format_exception(error)).rstrip()
    name = f"process {distributed.rank()} of {distributed.world_size()}: " if distributed.world_size() > 1 else ""
    complain(f"{name}{text}")


def _is_of_log(error: Exception) -> bool:
    """Returns whether Python could not set up its log as the config says."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == logging.config.__file__ and frame.name == "configure" for frame in frames)


class Mistake(BaseException):
    """Carries a `ConfigError` out of a single run past Hydra, which would print lines of its own."""


ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""The variables that settle how torch allocates a GPU's memory."""
WITHOUT_CACHES = (TaskName.report, TaskName.plan, TaskName.migrate, TaskName.doctor)
"""The tasks that read no rows, and load no model."""
WRITE_NOTHING = (TaskName.doctor, TaskName.chat)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def _main(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        from qlora.config.help import print_help

        print_help(argv)
        return
    trust.check_version()
    args, rest = _parser().parse_known_intermixed_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise unknown_flag(unknown[0])
    if args.config_path is not None:
        raise ConfigError(
            "--config-path replaces the whole configuration; use --config-dir FOLDER to add your own options"
        )
    if args.config_name is not None:
        raise ConfigError(
            f"--config-name replaces the whole configuration; use --config-dir FOLDER experiment={args.config_name}"
        )
    if args.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun unpickles a file, which may run code that it holds; use task=replay run=FOLDER"
        )
    if args.shell_completion or args.hydra_help:
        _call_hydra()
        return
    flags = [word for word in argv if word not in args.overrides]
    if args.config_dir is not None and "://" in args.config_dir:  # Hydra's flag knows folders only
        options = str(option_folder(args.config_dir, "--config-dir"))
        flags = [f"{word.removesuffix(args.config_dir)}{options}" if word.endswith(args.config_dir) else word
                 for word in flags]  # fmt: skip
        args.config_dir = options
    refuse_unreadable(args.overrides)
    check_engine(args.overrides)
    args.overrides = with_environment(keep_spelling(args.overrides))
    os.environ.setdefault(START_VARIABLE, now())
    composed = check_command(
        args.overrides,
        args.config_dir,
        multirun=args.multirun,
        leave_grid=not (args.cfg or args.info),
        printed=args.resolve,
    )
    if args.cfg == "job":
        sys.stdout.write(show_config(without_hydra(composed), args.package, resolve=args.resolve))
    elif args.cfg or args.info:
        if args.info and _sweeps(args):
            raise ConfigError("--info tells of one run, and -m or sweep= asks for a sweep; leave one of them out")
        _hand_over(args, flags)
        _call_hydra()
    elif composed.task.name is TaskName.wandb_sweep:
        from qlora.tasks.wandb_sweep import write_wandb_sweep

        write_wandb_sweep(args.overrides, args.config_dir)
    else:
        if composed.task.name not in WITHOUT_CACHES or composed.data.cache_dir:
            give_home(composed.data.cache_dir)
        if composed.task.name in WRITE_NOTHING and not _sweeps(args):
            _join(composed, sweeps=False)
            _run_without_folder(composed)
        else:
            _run(args, flags, composed)


def _parser() -> argparse.ArgumentParser:
    """Returns Hydra's parser of flags, whose complaints are sentences of ours."""

    def complain(message: str) -> NoReturn:
        raise ConfigError(f"{message}; a flag that takes a value stands behind the overrides, see `qlora --help`")

    parser: argparse.ArgumentParser = flag_parser()
    parser.error = complain  # type: ignore[method-assign]
    return parser


def _sweeps(args: Any) -> bool:
    return args.multirun or any(word.startswith("sweep=") for word in args.overrides)


def _hand_over(args: Any, flags: list[str], *more: str) -> None:
    """Hands Hydra the overrides, spelt for it, before the flags: it reads none between them."""
    sys.argv[1:] = [*open_entries([*args.overrides, *more]), *flags]


def _call_hydra() -> None:
    with reading_spellings(CONF_DIR):
        hydra.main(version_base=VERSION_BASE, config_path=str(CONF_DIR), config_name="config")(job)()


def _run(args: Any, flags: list[str], composed: DictConfig) -> None:
    """Runs what Hydra starts; a refused command leaves its folder as it was, or none."""
    sweeps, afterwards = _sweeps(args), list[Callable[[], None]]()
    folder = names.folder_words(args.overrides) if sweeps else []
    composed_at = os.environ[START_VARIABLE]
    joined = _join(composed, sweeps)
    if composed.resume is Resume.never:
        words = names.new_folder_words([*next(expand_sweep(args.overrides)), *folder], args.config_dir, sweeps)
        # Processes that torchrun starts again go on in the folder that they began in.
        folder += [
            distributed.agree_on_start("folder", words[0]),
            *(["resume=auto"] if distributed.is_restart() else []),
        ]
    start = _start(composed, composed_at, folder, sweeps)
    if distributed.world_size() > 1:  # the folder of the first process is that of all, also when they are started again
        os.environ[START_VARIABLE] = distributed.agree_on_start(
            "place", distributed.broadcast(os.environ[START_VARIABLE])
        )
    _hand_over(args, flags, *folder, *joined)
    if sweeps and composed.tracking.backend != NO_TRACKER:
        from qlora.sweep.summary_run import track_other_engine

        afterwards += [partial(track_other_engine, [*next(expand_sweep(args.overrides)), *folder], args.config_dir)]
    try:
        _call_hydra()
    except (Mistake, Exception) as error:
        if start is not None and isinstance(error, Mistake | UserError | HydraException | OmegaConfBaseException):
            start.put_back()
        for call in afterwards if isinstance(error, Exception) else ():
            call()
        raise
    for call in afterwards:
        call()
    distributed.destroy_process_group()


def _start(composed: DictConfig, composed_at: str, folder: list[str], sweeps: bool) -> Start | None:
    """Makes the folder of the command and returns its start; None: another process keeps it.

    A run without a name is called by the time that was told at `composed_at`; processes that were launched together
    have agreed on one since.
    """
    sweeps = sweeps or composed.hydra.mode is RunMode.MULTIRUN
    given = [word for word in folder if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    place = Path(str(override_value(given[-1]) if given else composed.hydra[("run", "sweep")[sweeps]].dir))
    check_links(place)
    if (
        not distributed.is_main_process() or distributed.is_restart() or VARIABLE in os.environ
    ):  # a job's folder is its sweep's
        return None
    if not sweeps and not given and composed.name is None and place.name == composed_at:
        return start_anew(place.with_name(os.environ[START_VARIABLE]))
    return start_in(place, is_sweep=sweeps)


def _run_without_folder(composed: DictConfig) -> None:
    """Runs a task that writes nothing: no folder, no log."""
    logging_config = composed.hydra.job_logging.copy()
    OmegaConf.set_struct(logging_config, False)
    OmegaConf.set_readonly(logging_config, False)
    logging_config.merge_with({"root": {"handlers": ["console"]}})
    logging_config.handlers.pop("file", None)
    configure_log(logging_config, composed.hydra.verbose)
    quiet_libraries(verbose=bool(composed.hydra.verbose))
    try:
        config = to_config(composed)
        execute(config, Path(str(composed.hydra.run.dir)), verbose=bool(composed.hydra.verbose))
    except UserError as error:
        raise Mistake from error
    finally:
        free_memory()


def _join(config: DictConfig, sweeps: bool) -> list[str]:
    """Joins the processes that were launched together; returns what Hydra is to do otherwise in this one."""
    is_replay = config.task.name is TaskName.replay
    if config.trainer.deterministic or is_replay:  # before anything is on a GPU
        from qlora.runtime.determinism import fix_workspace

        fix_workspace()
    if config.trainer.memory_budget is not None and not ALLOCATOR & os.environ.keys():
        # What torch holds is what is counted: so pages that are free must serve again wherever they lie.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if distributed.world_size() == 1:
        distributed.init_process_group()
        return []
    if sweeps or not (is_replay or (config.task.name is TaskName.train and config.task.train)):
        what = (
            "a sweep starts a process for each of its jobs" if sweeps else "only a training runs in several processes"
        )
        raise ConfigError(
            f"{distributed.world_size()} processes were launched (WORLD_SIZE), and {what}; start it without a launcher"
        )
    distributed.init_process_group()
    os.environ[START_VARIABLE] = distributed.agree_on_start("time", os.environ[START_VARIABLE])
    if distributed.is_main_process():
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
            membership, verbose = names.membership(hydra_config), bool(hydra_config.verbose)
            return execute(config, output_dir, overrides, membership, verbose=verbose)["objective"]
    except Pruned:
        close_bars()
        return None
    except Exception as error:
        if not in_sweep and (isinstance(error, UserError) or distributed.is_loss_of_peer(error)):
            raise Mistake from error
        # The traceback's frames hold the model; a sweep keeps the exception until its end.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        free_memory()
        if in_sweep:  # of an engine that runs jobs by this function; ours keeps the files of a sweep itself
            from qlora.sweep.sweep_page import write_overview

            write_overview(sweep_dir, config.objective)


def execute(
    config: Config,
    folder: Path,
    overrides: Sequence[str] = (),
    membership: SweepJob | None = None,
    *,
    verbose: bool,
) -> dict[str, Any]:
    """Does what `task=` says in a folder, and returns the result."""
    if config.task.name is TaskName.report:  # reads files only, so torch need not be imported
        from qlora.sweep.report_task import report

        return report(config, folder)
    if config.task.name is TaskName.plan:  # needs the model's shape only
        from qlora.tasks.plan import plan

        return plan(config, folder)
    if config.task.name is TaskName.migrate:  # reads and writes texts only
        from qlora.migrate import migrate

        return migrate(config, folder)
    if config.task.name is TaskName.doctor:  # torch may be what is broken
        from qlora.doctor import doctor

        return doctor(config, folder)
    distributed.check_shared(folder)
    _import_run()
    from qlora.run import Run

    if not verbose:
        take_over_handlers()
    if config.task.name is TaskName.replay:
        from qlora.tasks.replay import replay

        return replay(config, folder, overrides)
    return Run(config, folder, overrides, membership).execute()


def _import_run() -> None:
    """Imports what a run needs, half a million objects that stay: no collection looks through them, now or later."""
    if "qlora.run" in sys.modules:
        return
    from qlora.upstream.lazy_compile import compile_at_first_call

    gc.disable()
    try:
        with compile_at_first_call():
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
    if not distributed.is_main_process():
        return nullcontext()
    result = RunFolder(folder).result(config.task.name.value).name
    return recorded(folder, names.own_overrides(hydra_config), result, config_to_dict(config))


def free_memory() -> None:
    """Gives a finished job's memory back, on the host and on the GPU."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
