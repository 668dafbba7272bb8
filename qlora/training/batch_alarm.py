"""Notices batches that do not come: a stuck disk, or a worker process that has ended."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

from qlora.errors import RunError
from qlora.upstream.torch import raise_if_worker_died

LOST_SECONDS = 5.0
"""How long the system may take to report the end of a process whose connection is gone."""


class Halted(RunError):
    """Ends a training run as `watchdog` demands: the message names what was seen, the likely cause and the way out."""


@contextlib.contextmanager
def alarm(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    """Calls `ring` if the block takes longer than `seconds`; in the main thread only, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda *_: ring())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def await_lost_worker() -> None:
    """Raises torch's `RuntimeError` that names a worker process which has ended, if there is one soon."""
    until = time.monotonic() + LOST_SECONDS
    while time.monotonic() < until:
        raise_if_worker_died()
        time.sleep(0.05)


def explain_lost_worker(error: RuntimeError) -> Halted | None:
    """Returns what to say of torch's error about a worker process that has ended; None: it is another error."""
    if re.search(r"DataLoader worker \(pid", str(error)) is None:
        return None
    return Halted(
        f"a process that prepares batches has ended ({str(error).splitlines()[0]}): killed from outside, or out of "
        "memory; lower trainer.dataloader_num_workers, and run the same command again to resume"
    )


def stalled_message(seconds: float) -> str:
    """Returns what to say of a batch that has not come in time."""
    return (
        f"watchdog.stalled: no batch came within {seconds:g} s; the disk or a file system is stuck, or a function of "
        "your own in data.format is"
    )
