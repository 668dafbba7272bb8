"""Does the parts of a task in several processes, in order, and notices when one of them is lost.

This process is one of them. The others start afresh (a process with threads must not be forked), each with a pipe of
its own: its death closes the pipe, and nothing that it may have held is shared with the others.
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

from qlora.errors import ConfigError
from qlora.runtime.environment import prepare_environment

log = logging.getLogger(__name__)

Part = tuple[int, int]
"""The first row and the one behind the last."""
Result = tuple[pa.RecordBatch, Counter[str]]
Task = Callable[[Part], Result]
"""A function, or an object that can be pickled."""

AHEAD: Final = 2
"""Parts that a worker has at a time: it begins the next one while this process is busy."""
OPEN: Final = 4
"""Parts for each process that may be begun before the first of them is yielded; their results wait."""
SAMPLE: Final = 20
"""Rows that every worker does first: it must get from them what this process gets."""


def do_parts(task: Task, parts: Sequence[Part], *, processes: int, folder: Path, shown: str) -> Iterator[Result]:
    """Yields the result of every part, in order.

    `folder` is for files that are in use meanwhile. Errors of the task are those of this process: it does itself, in
    order, what a worker failed at. Where only workers fail, it says so and does the rest alone. Raises `ConfigError`,
    which begins with `shown`, where a worker is lost.
    """
    position = 0
    try:
        with _one_thread_each(), _started(task, processes - 1, folder, shown) as workers:
            for result in _share_out(task, parts, workers):
                yield result
                position += 1
        return
    except _Failed as failure:
        failed = failure
    for index, part in enumerate(parts[position:], position):
        yield task(part)
        if index == max(failed.index, position):
            log.warning("%s: one process tokenizes the rest, for another one failed at what this one can do (%s); "
                        "data.num_proc=1 starts no other", shown, failed)  # fmt: skip


class _Failed(Exception):
    """A worker could not do part `index`, or got another result than this process."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(reason)
        self.index = index


class _Worker:
    """A process that does parts, as this process sees it."""

    def __init__(self, task_file: Path, folder: Path, number: int, shown: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.folder, self.number, self.shown = folder, number, shown
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, task_file), daemon=True)
        self.process.start()
        theirs.close()
        self.waiting: deque[int] = deque()
        """The indices of the parts it was given, in the order in which it will answer."""
        self.is_proven = False

    def give(self, index: int, part: Part) -> None:
        """Hands a part over."""
        self.waiting.append(index)
        with suppress(ConnectionError):  # `take` will notice
            self.connection.send((part, self._file(index)))

    def take(self) -> tuple[int, Result]:
        """Returns the index and the result of the part that it was given first."""
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
        # By a file and not by the pipe, which holds little: a worker must not wait until its result is taken.
        return self.folder / f"part-{self.number}-{index}.arrow"

    def _lost(self) -> ConfigError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"ended with exit code {code}" if code >= 0 else f"was killed ({signal.Signals(-code).name})"
        why = ", probably because memory ran out" if code == -9 else ""
        return ConfigError(
            f"{self.shown}: a process that tokenizes {how}{why}; run again with data.num_proc=1, which takes the least "
            "memory"
        )


def _share_out(task: Task, parts: Sequence[Part], workers: Sequence[_Worker]) -> Iterator[Result]:
    """Yields the results in order; whenever the next one is not there yet, this process does a part too."""
    sample = parts[0][0], min(parts[0][0] + SAMPLE, parts[0][1])
    for worker in workers:
        worker.give(-1, sample)
    done: dict[int, Result] = {}
    most = OPEN * (len(workers) + 1)
    first = following = 0  # not yielded yet, and not begun yet
    while first < len(parts):
        may_begin = following < min(first + most, len(parts))
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.waiting}
        for ready in connection.wait(list(by_connection), timeout=0 if first in done or may_begin else None):
            worker = by_connection[ready]
            index, result = worker.take()
            if index >= 0:
                done[index] = result
            elif not _equal(result, task(sample)):
                raise _Failed("it made other tokens of the same rows", first)
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
def _started(task: Task, count: int, folder: Path, shown: str) -> Iterator[list[_Worker]]:
    """Starts workers, and ends them however the block ends."""
    task_file = folder / "task.pickle"  # not by the pipe: this process would wait until each worker has imported
    try:
        task_file.write_bytes(pickle.dumps(task))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise _Failed(f"it cannot be sent to others: {error}") from None
    if multiprocessing.current_process().daemon:
        raise _Failed("a daemonic process may start no others")
    workers: list[_Worker] = []
    try:
        try:
            with _apart():
                for number in range(count):
                    workers.append(_Worker(task_file, folder, number, shown))
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
def _apart() -> Iterator[None]:
    """Keeps processes that start in the block from running the user's script anew, and from hearing Ctrl-C."""
    resource_tracker.ensure_running()  # starting it unblocks the signal
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    blocks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocks else set()
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Lets tokenizers keep to one thread, here and in processes that start in the block: they fill the cores."""
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
    """Does in a worker what it is given, until the other end of the pipe is gone."""
    prepare_environment()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it belongs to the process that reads the results
    pa.set_cpu_count(1)
    with suppress(EOFError, ConnectionError):
        try:
            task: Task = pickle.loads(task_file.read_bytes())
        except Exception as error:
            pipe.send(_describe(error))
            return
        gc.freeze()  # the objects of the libraries are not looked through
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
