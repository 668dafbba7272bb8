"""Commands of this project that tests start are forked from a process that has imported what a run needs.

A start of Python that imports torch, transformers and peft costs five seconds of a core, and the tests start hundreds.
`warm_starts` makes `subprocess.Popen` hand `python -m qlora ...` (and torchrun, with what it starts) to a template
process, which forks it: its arguments, environment, working folder, standard streams, session and signals are those of
a new process, and its parent is the one that asked, so that waiting and killing work as ever. Commands that set what is
read while Python or a library is imported start anew, and so does everything in tests marked `cold`.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.runtime.environment import QUIET_LIBRARIES, SILENT_SERVICES, prepare_environment

ROOT = Path(__file__).parents[1]
IMPORTED = (
    *("qlora.cli", "qlora.upstream.lazy_compile", "qlora.tasks.train", "qlora.session", "qlora.training.trainer"),
    *("qlora.adapters.create", "qlora.adapters.save", "qlora.models.loading", "qlora.step.fast_step"),
    *("qlora.step.parts.attention", "qlora.step.parts.fused_linear", "qlora.step.parts.loss"),
    *("qlora.quantization.bnb4.layers", "qlora.evaluation.measure", "qlora.evaluation.suites", "qlora.data.pipeline"),
    *("qlora.reporting.run_page", "qlora.reporting.loss_curve", "qlora.reporting.model_card", "qlora.training.resume"),
    *("transformers.models.llama.modeling_llama", "torch.distributed.run"),
)
"""What the template process imports before the first command."""
OF_SEARCHES = ("sqlalchemy.dialects.sqlite", "alembic.command", "optuna.storages", "optuna.samplers", "optuna.pruners")
"""What it imports where Optuna is installed."""
MODULES = ("qlora", "torch.distributed.run")
"""The modules that are forked as a command; scripts are, too."""
READ_AT_IMPORT = (
    *("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "CUDA", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_"),
    *("HF_", "HUGGINGFACE", "TRANSFORMERS_", "USE_", "BNB_", "BITSANDBYTES_", "XDG_", "MPL"),
)
"""Starts of the names of variables that Python and the libraries read while they are imported."""
READ_LATER = ("TORCH_NCCL_",)
PATHS = "PYTHONPATH"
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Start:
    """One command to be forked."""

    args: list[str]
    environment: dict[str, str]
    cwd: str
    preexec: Any
    new_session: bool
    process_group: int
    ignored: list[int]


class Template:
    """The process whose forks are the commands of this process; it ends with this process."""

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection, self._environment, self._lock = connection, dict(environment), threading.Lock()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()

    def fork(self, start: Start, streams: Sequence[int]) -> int:
        """Returns the id of the forked process, a child of this one."""
        with self._lock:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._connection, [pickle.dumps(start)], list(streams))
                return int(self._connection.recv(64))
            finally:
                _libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a process of this environment has imported the same."""
        names = {name for name in {*environment, *self._environment} - {PATHS} if name.startswith(READ_AT_IMPORT)}
        names = {name for name in names if not name.startswith(READ_LATER)}
        prepared = SILENT_SERVICES | QUIET_LIBRARIES | self._environment
        known, paths = _folders(self._environment), _folders(environment)
        new = [Path(path) for path in paths if path not in known and Path(path) != ROOT]
        return (
            all(environment.get(name) in (self._environment.get(name), prepared.get(name)) for name in names)
            and not any((path / name).exists() for path in new for name in ("sitecustomize.py", "qlora"))
            and all(path in paths for path in known)
        )


def _folders(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get(PATHS, "").split(os.pathsep) if path]


_template: Template | None = None
_is_allowed = False


def warm_starts(allowed: bool = True) -> None:
    """Lets commands of this process be forked, or started anew."""
    global _is_allowed
    _is_allowed = allowed
    if not hasattr(subprocess.Popen._execute_child, "__wrapped__"):
        subprocess.Popen._execute_child = _forked(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


def end_template() -> None:
    """Ends the template process of this process, if there is one."""
    global _template
    if _template is not None:
        _template.close()
        _template = None


def _forked(execute: Any) -> Any:
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def fork_or_execute(*args: Any, **kwargs: Any) -> None:
        if not _fork(**signature.bind(*args, **kwargs).arguments):
            execute(*args, **kwargs)

    return fork_or_execute


def _fork(self: Any, args: Any, env: Any, cwd: Any, preexec_fn: Any, **more: Any) -> bool:
    """Forks a command that the template process serves; False: it is none."""
    if not _is_allowed or isinstance(args, str | bytes) or not _is_served([os.fspath(arg) for arg in args]):
        return False
    environment = {os.fsdecode(name): os.fsdecode(text) for name, text in (os.environ if env is None else env).items()}
    try:
        pickle.dumps(preexec_fn)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    template = _started()
    if more["pass_fds"] or more["shell"] or more["executable"] or not template.serves(environment):
        return False
    folder = Path(os.fsdecode(cwd or ".")).absolute()
    start = Start(
        [os.fspath(arg) for arg in args], environment, str(folder), preexec_fn, more["start_new_session"],
        more.get("process_group", -1), [number for number in signal.valid_signals() if _is_ignored(number)],
    )  # fmt: skip
    if not folder.is_dir():
        return False
    streams = [
        fd if fd != -1 else inherited
        for inherited, fd in enumerate((more["p2cread"], more["c2pwrite"], more["errwrite"]))
    ]
    self.pid = template.fork(start, streams)
    self._child_created = True
    self._close_pipe_fds(
        *(more[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
    )
    return True


def _is_ignored(number: int) -> bool:
    return number not in (signal.SIGPIPE, signal.SIGXFSZ) and signal.getsignal(number) is signal.SIG_IGN


def _is_served(args: Sequence[str]) -> bool:
    if not args or args[0] != sys.executable:
        return False
    first, second = [*_of_program(args), "", ""][:2]
    return first.endswith(".py") or (first == "-m" and second in MODULES)


def _of_program(args: Sequence[str]) -> list[str]:
    """Returns what follows the interpreter, without the switch that torchrun sets."""
    return list(args[2:] if args[1:2] == ["-u"] else args[1:])


def _started() -> Template:
    global _template
    if _template is None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.warm import main; main({its.fileno()})"
            subprocess.Popen([sys.executable, "-c", code], pass_fds=[its.fileno()], cwd="/")
        _template = Template(ours, os.environ)
    return _template


# The template process, and what it forks


def serve(connection: socket.socket) -> Start:
    """Forks the commands that arrive, each of which returns from here what it is to run."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            os._exit(0)
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child:
                os.write(writer, str(child).encode())
                os._exit(0)  # its parent is now the process that asked
            middle = os.getppid()
            for fd in (connection.fileno(), reader, writer):
                os.close(fd)
            connection.detach()
            while os.getppid() == middle:
                time.sleep(0.0005)
            return _become(pickle.loads(message), fds)
        os.waitpid(middle, 0)
        os.close(writer)
        connection.send(os.read(reader, 64))
        for fd in (reader, *fds):
            os.close(fd)


def _become(start: Start, fds: Sequence[int]) -> Start:
    """Makes this process what a new one of that command would be before its first import."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(start.cwd)
    if start.new_session:
        os.setsid()
    if start.process_group != -1:
        os.setpgid(0, start.process_group)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for number in start.ignored:
        signal.signal(number, signal.SIG_IGN)
    if start.preexec is not None:
        start.preexec()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    added = [path for path in _folders(start.environment) if path not in _folders(os.environ)]
    sys.path[:1] = [start.cwd, *added]
    os.environ.clear()
    os.environ.update(start.environment)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else None
        stream = open(number, mode, closefd=False, encoding="utf-8", errors=errors)  # noqa: SIM115
        if name == "stderr" or "PYTHONUNBUFFERED" in os.environ:
            stream.reconfigure(line_buffering=True, write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return start


_status: int | None = None
"""The exit code of this process; None: Python ends it, as after Ctrl-C."""


unfreeze = gc.unfreeze


def keep_frozen() -> None:
    """Freezes what was imported until `unfreeze`; a training run would let it go with what it has frozen itself."""
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]


def _end() -> None:
    """Ends a forked process after everything else that it does at its end, except to free its modules one by one."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
    unfreeze()


def _import_all() -> None:
    atexit.register(_end)
    environment = dict(os.environ)
    prepare_environment()
    gc.disable()
    logging.disable()  # what libraries say while they are imported, as bitsandbytes does, a run does not show either
    for name in (*IMPORTED, *(OF_SEARCHES if importlib.util.find_spec("optuna") else ())):
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    keep_frozen()
    gc.enable()
    os.environ.clear()
    os.environ.update(environment)
    assert threading.active_count() == 1, "a fork would lose a thread"


def _starts_others(args: Sequence[str]) -> bool:
    """Whether a command starts others: a sweep its jobs, torchrun its processes, a script whatever it does."""
    return args[:2] != ["-m", "qlora"] or not {"-m", "--multirun"}.isdisjoint(args[2:])


def main(connection: int) -> None:
    """Is the template process, and then each command that it forks."""
    global _template, _status
    _import_all()
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the process that asks it
        signal.signal(number, signal.SIG_IGN)
    start = serve(socket.socket(fileno=connection))
    while _starts_others(_of_program(start.args)):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            start = serve(its)
            continue
        its.close()
        _template = Template(ours, os.environ)
        warm_starts()
        break
    sys.orig_argv, args = list(start.args), _of_program(start.args)
    try:
        if args[0] == "-m":
            sys.argv = ["", *args[2:]]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = args, str(Path(args[0]).absolute().parent)
            runpy.run_path(args[0], run_name="__main__")
        _status = 0
    except SystemExit as end:
        _status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        _status = 1
        raise
