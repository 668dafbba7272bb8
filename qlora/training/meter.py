"""How fast a training run is: tokens a second, the share of the device's speed, the time spent waiting for batches."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

WARM_UP = 2
"""The first steps of a process compile, warm up and fill caches: they say nothing of those to come."""


class TrainingClock:
    """Measures training time: evaluations and checkpoints stop it.

    The trainer announces no beginning of an evaluation, so the clock counts a pause from the last step's end to the
    next step's begin whenever something was evaluated or saved in between.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.is_paused = False
        self._steps: deque[tuple[float, int]] = deque(maxlen=50)  # seconds and tokens of each
        self._count = 0
        self.trained = 0.0  # seconds
        self.pauses: list[float] = []  # seconds of each

    def begin_step(self) -> None:
        """Ends a pause, if there was one."""
        if self.is_paused:
            now = time.monotonic()
            self.pauses.append(now - self._last)
            self._last, self.is_paused = now, False

    def end_step(self, tokens: int = 0) -> None:
        """Counts the time since the last step's end, or since the pause, and the step's tokens."""
        now = time.monotonic()
        self._steps.append((now - self._last, tokens))
        self._count += 1
        self.trained += now - self._last
        self._last = now

    def pause(self) -> None:
        """Takes the time since the last step's end out of the training time."""
        self.is_paused = True

    @property
    def _typical(self) -> list[tuple[float, int]]:
        """The latest steps but those of the warm-up, at least one; empty after the first step, which is one."""
        kept = len(self._steps) - max(WARM_UP - (self._count - len(self._steps)), 0)
        return [*self._steps][-max(kept, 1) :] if self._count > 1 else []

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the latest steps without those of the warm-up; None: there are none, or no tokens."""
        seconds, tokens = map(sum, zip(*self._typical, strict=True)) if self._typical else (0.0, 0)
        return tokens / seconds if tokens and seconds > 0 else None

    def seconds_left(self, steps: int, pauses: int = 0) -> float | None:
        """Estimates the time for `steps` more steps and `pauses` more evaluations from the latest ones.

        None: no step but the first has been taken, which says nothing of the others.
        """
        if not self._typical:
            return None
        step = sum(seconds for seconds, _ in self._typical) / len(self._typical)
        pause = sum(self.pauses) / max(len(self.pauses), 1)
        return steps * step + pauses * pause


class ClockedCallback(TrainerCallback):
    """A callback with a clock of the training time."""

    def __init__(self) -> None:
        self.clock = TrainingClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.clock = TrainingClock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a pause."""
        self.clock.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step's time."""
        self.clock.end_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time since the last step out."""
        self.clock.pause()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time since the last step out."""
        self.clock.pause()


@dataclass(frozen=True)
class Mark:
    """What a training run has done until a moment."""

    tokens: int
    operations: float
    seconds: float
    """Training time."""
    waited: float
    """Seconds of it in which the next batch had not come yet."""


class Meter(ClockedCallback):
    """Measures a training's speed, without evaluations and checkpoints.

    `operations` says what a number of tokens takes, and numbers of pairs in attention, by how far layers look back;
    `rate` is how many operations a second the device reaches in a matmul. Without them there is no model FLOP
    utilisation. `output` are the operations of the output layer, which tokens without a label do not need.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        peak_memory_gb: Callable[[], float],
        operations: Callable[..., float] | None = None,
        output: float = 0.0,
        rate: float | None = None,
    ) -> None:
        super().__init__()
        self.output = output
        self.device, self.peak_memory_gb, self.operations = device, peak_memory_gb, operations
        self.rate = rate if operations is not None else None
        self._waited = 0.0
        self.tokens = 0
        """Those of the batches that this process has been given, with the step that is not over."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        super().on_train_begin(args, state, control)
        self._processes, self._waited = args.world_size, 0.0
        self._first = self._last = self._mark(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step's time; before a log or a pause the device ends what it has been given."""
        stops = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if stops and self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)
        super().on_step_end(args, state, control)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for a batch; in a pause nothing waits."""
        started = time.monotonic()
        yield
        if not self.clock.is_paused:
            self._waited += time.monotonic() - started

    def since_last_log(self, state: Any) -> dict[str, float]:
        """Returns the speed since the last call, and the peak memory so far."""
        previous, self._last = self._last, self._mark(state)
        return self._speed(previous, self._last) | {"peak_memory_gb": self.peak_memory_gb()}

    def overall(self, state: Any) -> dict[str, float]:
        """Returns the speed of the training run since it was started or resumed."""
        return self._speed(self._first, self._mark(state))

    def _mark(self, state: Any) -> Mark:
        return Mark(state.num_input_tokens_seen, state.total_flos, self.clock.trained, self._waited)

    def _speed(self, first: Mark, last: Mark) -> dict[str, float]:
        seconds = max(last.seconds - first.seconds, 1e-9)
        speed = {"train_tokens_per_second": (last.tokens - first.tokens) / seconds}
        if self.rate is not None:
            speed["train_mfu"] = (last.operations - first.operations) / seconds / (self.rate * self._processes)
        return speed | {"train_data_wait": (last.waited - first.waited) / seconds}
