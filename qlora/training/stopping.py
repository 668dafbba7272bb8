"""When a training run ends before its last step: a signal asks for it, and all processes end together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from qlora.errors import Stopped
from qlora.runtime import distributed
from qlora.text import terminal_width, wrap

DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
"""The signals, and what handles them where nobody else has chosen to."""


class Stop:
    """Whether a signal asked the run to end: Ctrl-C, SIGTERM, or SIGUSR1 as SLURM can send it before the time is up.

    A training run ends after its step, with a checkpoint; what is not in `after_step` ends at once. A second Ctrl-C
    ends everything at once.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._in_steps = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals in the block, as far as nobody else does."""
        handled = [number for number, default in DEFAULTS.items() if signal.getsignal(number) == default]
        if threading.current_thread() is not threading.main_thread():
            handled = []
        owner = os.getpid()

        def handle(number: int, frame: object) -> None:
            if os.getpid() == owner:
                self._handle(signal.Signals(number))
            elif number == signal.SIGTERM:  # a worker that was forked; its parent decides about the others
                os._exit(128 + number)

        for number in handled:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in handled:
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
        again = "again " if number is signal.SIGINT else ""
        text = f"{number.name}: " if number is not signal.SIGINT else ""
        text += f"stopping after this step and saving; press Ctrl-C {again}to stop at once without saving"
        # No stream of Python's may be in the middle of a line here.
        os.write(2, "\n".join(["", *wrap(text, terminal_width()), ""]).encode())


WISHES = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Agreement(TrainerCallback):
    """Lets all processes log, measure, save and stop at the same step, whichever of them wants to.

    A signal that one of them got during the step, or during an evaluation, ends the training with a checkpoint.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.ended_by_signal = False
        """Whether it was a signal that ended the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks all after the step."""
        self._all_reduce(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks all after the evaluation."""
        self._all_reduce(control)

    def _all_reduce(self, control: Any) -> None:
        local = [getattr(control, wish) for wish in WISHES]
        *agreed, number = distributed.all_reduce_max([*local, self.stop.requested or 0])
        for wish, is_wanted in zip(WISHES, agreed, strict=True):
            setattr(control, wish, bool(is_wanted))
        if number:
            self.stop.requested = signal.Signals(number)
            self.ended_by_signal = self.ended_by_signal or not control.should_training_stop
            control.should_save = control.should_training_stop = True
