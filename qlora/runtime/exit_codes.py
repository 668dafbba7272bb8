"""How a command ends: its exit code, and what it prints about the error that ended it."""

from __future__ import annotations

import contextlib
import errno
import logging.config
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from qlora.config.compose import explain
from qlora.config.mistakes import MISTAKES
from qlora.errors import ConfigError, Stopped, UserError
from qlora.runtime import distributed
from qlora.runtime.console import close_bars, complain

FULL_ERROR = "HYDRA_FULL_ERROR"
"""The variable that asks for tracebacks of mistakes too."""
SHOWING = {"-h", "--help", "--hydra-help", "--cfg", "-c", "--info", "-i"}
"""Flags that print something and do nothing else."""
PATIENCE = 3
"""Seconds in which the main process may report an error that all of them meet; the launcher then ends the others."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def exiting(argv: Sequence[str]) -> Iterator[None]:
    """Exits when the block ends with an error: 1 after a failure, 130 after Ctrl-C, 75 once a stopped run is saved."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if SHOWING & {*argv}:
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
            complain("\ninterrupted; run the same command in the same folder to resume")
        sys.exit(130)
    except Exception as error:
        close_bars()
        # Python's logging wraps what a handler raises.
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        assert isinstance(cause, Exception)
        report(cause, in_full=os.environ.get(FULL_ERROR) == "1")
        sys.exit(1)


def report(error: Exception, *, in_full: bool) -> None:
    """Prints what ended the run: a sentence for a mistake, the traceback of a bug; each of several by its name."""
    if not isinstance(error, UserError) and _is_of_log(error):
        error = ConfigError(
            f"hydra.job_logging or hydra.hydra_logging cannot be set up ({error.__cause__ or error}); correct it, or "
            "leave both as they are"
        )
    is_mistake = isinstance(error, MISTAKES)
    if distributed.is_loss_of_peer(error):
        text = "error: another process of this run has ended; its own message says why"
        time.sleep(PATIENCE)
    else:
        distributed.tell_launcher(error, in_full=in_full or not is_mistake)
        if not distributed.is_main_process():
            time.sleep(PATIENCE)
        text = f"error: {error if isinstance(error, UserError) else explain(error)}" if is_mistake else ""
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            path = error.filename or "the run folder"
            text = (
                f"error: {path} cannot be written ({error.strerror}); choose another folder with hydra.run.dir=FOLDER"
            )
    if in_full or not text:
        text = "".join(traceback.format_exception(error)).rstrip()
    name = f"process {distributed.rank()} of {distributed.world_size()}: " if distributed.world_size() > 1 else ""
    complain(f"{name}{text}")


def _is_of_log(error: Exception) -> bool:
    """Returns whether Python could not set up its log as the config says."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == logging.config.__file__ and frame.name == "configure" for frame in frames)
