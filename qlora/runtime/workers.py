"""Runs the parts of a task in several processes, yields their results in order, and notices a lost process.

This process is one of them. The others are spawned, because a process with threads must not be forked. Each has its
own pipe, which its death closes, and shares no lock with the others.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pyarrow as pa

from qlora.errors import ResourceError
from qlora.runtime.environment import prepare_environment

log = logging.getLogger(__name__)

Part = tuple[int, int]
"""The first row, and the one after the last."""
Result = tuple[pa.RecordBatch, Counter[str]]
Task = Callable[[Part], Result]
"""A function or callable object that can be pickled."""

AHEAD: Final = 2
"""Parts that a worker holds at a time, so that it begins the next one while this process is busy."""
OPEN: Final = 4
"""Parts for each process that may be started before the first of them is yielded."""
SAMPLE: Final = 20
"""Rows that each worker processes first, to prove that its results equal those of this process."""


def run_parts(task: Task, parts: Sequence[Part], *, processes: int, folder: Path, label: str) -> Iterator[Result]:
    """Yields the result of every part, in order.

    `folder` holds temporary files. This process runs a part again, in order, at which a worker fails, so that errors of
    the task are raised here. If only workers fail, this process logs a warning and runs the rest alone. Raises
    `ResourceError`, which begins with `label`, if a worker is lost.
    """
    position = 0
    try:
        with _one_thread_each(), _started(task, processes - 1, folder, label) as workers:
            for result in _yield_in_order(task, parts, workers):
                yield result
                position += 1
        return
    except _Failed as failure:
        failed = failure
    for index, part in enumerate(parts[position:], position):
        yield task(part)
        if index == max(failed.index, position):
            log.warning("%s: this process tokenizes the rest, because another one failed where this one succeeds (%s); "
                        "data.num_proc=1 starts no others", label, failed)  # fmt: skip


class _Failed(Exception):
    """Raised when a worker fails at part `index`, or its result differs from that of this process."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(reason)
        self.index = index


class _Worker:
    """A worker process, as this process sees it."""

    def __init__(self, task_file: Path, folder: Path, index: int, label: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.folder, self.index, self.label = folder, index, label
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, task_file), daemon=True)
        self.process.start()
        theirs.close()
        self.waiting: deque[int] = deque()
        """The indices of its parts, in the order in which it will answer."""
        self.is_proven = False

    def give(self, index: int, part: Part) -> None:
        """Sends a part to the worker."""
        self.waiting.append(index)
        with suppress(ConnectionError):  # `take` will notice
            self.connection.send((part, self._file(index)))

    def take(self) -> tuple[int, Result]:
        """Returns the index and the result of the part that was sent first."""
        index = self.waiting.popleft()
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost() from None
        if isinstance(answer, str):
            raise _Failed(answer, index)
        file = self._file(index)
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as batches:
            batch = batches.read_next_batch()
        file.unlink()
        return index, (batch, answer)

    def end(self) -> None:
        self.process.join()
        self.process.close()
        self.connection.close()

    def _file(self, index: int) -> Path:
        # A file, because a pipe holds little: a worker must not wait until its result is read.
        return self.folder / f"part-{self.index}-{index}.arrow"

    def _lost(self) -> ResourceError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"ended with exit code {code}" if code >= 0 else f"was killed ({signal.Signals(-code).name})"
        why = ", probably because memory ran out" if code == -9 else ""
        return ResourceError(
            f"{self.label}: a process that tokenizes {how}{why}; run again with data.num_proc=1, which needs the least "
            "memory"
        )


def _yield_in_order(task: Task, parts: Sequence[Part], workers: Sequence[_Worker]) -> Iterator[Result]:
    """Yields the results in order; while the next one is missing, this process runs a part itself."""
    sample = parts[0][0], min(parts[0][0] + SAMPLE, parts[0][1])
    for worker in workers:
        worker.give(-1, sample)
    done: dict[int, Result] = {}
    most = OPEN * (len(workers) + 1)
    first = following = 0  # the next part to yield, and the next part to start
    while first < len(parts):
        may_begin = following < min(first + most, len(parts))
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.waiting}
        for ready in connection.wait(list(by_connection), timeout=0 if first in done or may_begin else None):
            worker = by_connection[ready]
            index, result = worker.take()
            if index >= 0:
                done[index] = result
            elif not _equal(result, task(sample)):
                raise _Failed("it made different tokens from the same rows", first)
            worker.is_proven = True
        for worker in workers:
            while worker.is_proven and len(worker.waiting) < AHEAD and following < min(first + most, len(parts)):
                worker.give(following, parts[following])
                following += 1
        if first in done:
            yield done.pop(first)
            first += 1
        elif following < min(first + most, len(parts)):
            done[following] = task(parts[following])
            following += 1


def _equal(a: Result, b: Result) -> bool:
    return a[0].equals(b[0]) and a[1] == b[1]


@contextmanager
def _started(task: Task, count: int, folder: Path, label: str) -> Iterator[list[_Worker]]:
    """Starts workers, and ends them when the block ends in any way."""
    task_file = folder / "task.pickle"  # not a pipe, on which this process would wait until each worker has imported
    try:
        task_file.write_bytes(pickle.dumps(task))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise _Failed(f"it cannot be sent to other processes: {error}") from None
    if multiprocessing.current_process().daemon:
        raise _Failed("a daemonic process may not start others")
    workers: list[_Worker] = []
    try:
        try:
            with _isolated():
                for index in range(count):
                    workers.append(_Worker(task_file, folder, index, label))
        except OSError as error:
            raise _Failed(f"it cannot be started: {error.strerror}") from None
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.end()
        for file in (task_file, *folder.glob("part-*.arrow")):
            file.unlink(missing_ok=True)


@contextmanager
def _isolated() -> Iterator[None]:
    """Keeps processes that start in the block from running the user's script again and from receiving Ctrl-C.

    A signal that ends this process waits for the end of the block, so that it leaves no process half started.
    """
    resource_tracker.ensure_running()  # starting it unblocks the signal
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    blocks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}) if blocks else set()
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limits tokenizers to one thread, here and in processes that start in the block, which use all cores already."""
    name = "TOKENIZERS_PARALLELISM"
    previous = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _work(pipe: Connection, task_file: Path) -> None:
    """Runs in a worker: processes parts until the other end of the pipe closes."""
    prepare_environment()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads the results handles it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked while this process was started
    pa.set_cpu_count(1)
    with suppress(EOFError, ConnectionError):
        try:
            task: Task = pickle.loads(task_file.read_bytes())
        except Exception as error:
            pipe.send(_describe(error))
            return
        gc.freeze()  # the garbage collector skips the objects of the libraries
        while True:
            part, file = pipe.recv()
            pipe.send(_attempt(task, part, file))


def _attempt(task: Task, part: Part, file: Path) -> Counter[str] | str:
    """Writes a part's rows to a file and returns its counts, or why that failed."""
    try:
        batch, counts = task(part)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    except Exception as error:
        return _describe(error)
    return counts


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
