"""Signals that ask a training to end: it saves a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from qlora.errors import Stopped

DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
"""The signals, and what handles them where nobody else has chosen to."""


class Stop:
    """Whether a signal asked the run to end: Ctrl-C, SIGTERM, or SIGUSR1 as SLURM can send it before the time is up.

    A training ends after its step, with a checkpoint; what is not in `after_step` ends at once. A second Ctrl-C ends
    everything at once.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._in_steps = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals in the block, as far as nobody else does."""
        own = [number for number, default in DEFAULTS.items() if signal.getsignal(number) == default]
        if threading.current_thread() is not threading.main_thread():
            own = []
        owner = os.getpid()

        def handle(number: int, frame: object) -> None:
            if os.getpid() == owner:
                self._handle(signal.Signals(number))
            elif number == signal.SIGTERM:  # a worker that was forked; its parent decides about the others
                os._exit(128 + number)

        for number in own:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in own:
                signal.signal(number, DEFAULTS[number])

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        """Lets what runs in the block end in order."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def check(self) -> None:
        """Raises `Stopped` if the run was asked to end."""
        if self.requested is not None:
            raise Stopped(f"stopped by {self.requested.name}")

    def _handle(self, number: signal.Signals) -> None:
        if self.requested is not None:
            if number is signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = number
        if not self._in_steps:
            self.check()
        # No stream of Python's may be in the middle of a line here.
        os.write(2, f"\n{number.name}: saving a checkpoint after this step; Ctrl-C ends at once\n".encode())


class StopCallback(TrainerCallback):
    """Ends the training with a checkpoint after the step, or the evaluation, in which a signal came.

    Several processes agree at steps that are logged, where they wait for each other anyway.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.ended_training = False
        """Whether it was this that ended the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks whether a signal came during the step."""
        if args.world_size == 1 or control.should_log:
            self._act(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks whether a signal came during the evaluation."""
        if args.world_size == 1:
            self._act(args, control)

    def _act(self, args: Any, control: Any) -> None:
        requested = self.stop.requested
        if args.world_size > 1:
            number = torch.tensor(int(requested or 0), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            requested = signal.Signals(int(number)) if number else None
            self.stop.requested = requested
        if requested is not None:
            self.ended_training = self.ended_training or not control.should_training_stop
            control.should_save = control.should_training_stop = True
