"""Trainings in processes that can be killed; a server that has imported everything forks them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from qlora.sweep.jobs import recorded
from tests.faults.runs import Writes, check_whole, run
from tests.warm import IMPORTED

BEGUN = "begun.txt"
"""Is there when a process has begun with its training."""


def start(folder: Path, overrides: list[str], number: int = -1) -> BaseProcess:
    """Starts a training run, which kills itself when its write of this number begins."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])  # this module may not be on its path
    process = context.Process(target=train, args=(folder, overrides, number))
    process.start()
    return process


def train(folder: Path, overrides: list[str], number: int) -> None:
    """Runs a training as the command line does."""
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a run of its own
    folder.mkdir(exist_ok=True)
    (folder / BEGUN).touch()
    writes = Writes()
    with (folder / "output.txt").open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        writes.watch(folder, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            with recorded(folder, [], "result.json"):
                run(folder, *overrides)
        except BaseException:
            traceback.print_exc()
            raise


@dataclass
class Killer:
    """Kills training runs at random, by the clock and at their writes in turn, until it has killed `total`."""

    total: int
    seconds: float
    """How long an undisturbed one takes."""
    writes: int
    """How often an undisturbed one writes."""
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    kills: int = 0
    in_writes: int = 0
    """Kills that left something half-written."""
    resumed: int = 0

    def torment(self, folder: Path, overrides: list[str], most: int) -> None:
        """Has a training killed up to `most` times, and then lets it end."""
        for _ in range(most):
            by_clock = self.kills % 2 == 0
            process = start(folder, overrides, -1 if by_clock else self.draw.randint(1, self.writes))
            while not (folder / BEGUN).exists() and process.is_alive():
                time.sleep(0.02)
            process.join(self.draw.uniform(0, self.seconds) if by_clock else None)
            process.kill()
            process.join()
            (folder / BEGUN).unlink()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, (folder / "output.txt").read_text()
            self.kills += 1
            self.in_writes += (
                any(folder.rglob(".*.tmp"))
                or any(folder.rglob("*.partial/*"))
                or (folder / "checkpoints" / "unfinished").exists()
            )
            check_whole(folder)
            if self.kills == self.total:
                break
        process = start(folder, overrides)
        process.join()
        output = (folder / "output.txt").read_text()
        assert process.exitcode == 0, output
        self.resumed += output.count("resuming from checkpoint-")
