"""Shows the training as it goes: a live bar on a terminal, plain lines elsewhere, a line for each evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora.console import is_live, is_main_process, progress, record, say
from qlora.folder import write_text
from qlora.wording import format_duration, format_metric, is_detail

# What the trainer measures of itself while it evaluates; of no interest to a reader.
BOOKKEEPING = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
)


class TrainingClock:
    """Measures training time: evaluations and checkpoints stop it.

    The trainer announces no beginning of an evaluation, so the clock counts a pause from the last step's end to the
    next step's begin whenever something was evaluated or saved in between.
    """

    def __init__(self, tokens_seen: int = 0) -> None:
        self._last = self._started = time.monotonic()
        self._paused = False
        self._tokens, self._trained_at_log = tokens_seen, 0.0
        self._steps: deque[float] = deque(maxlen=50)
        self.trained = 0.0  # seconds
        self.pauses: list[float] = []  # seconds of each

    def begin_step(self) -> None:
        """Ends a pause, if there was one."""
        if self._paused:
            now = time.monotonic()
            self.pauses.append(now - self._last)
            self._last, self._paused = now, False

    def end_step(self) -> None:
        """Counts the time since the last step's end, or since the pause."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self.trained += now - self._last
        self._last = now

    def pause(self) -> None:
        """Takes the time since the last step's end out of the training time."""
        self._paused = True

    def tokens_per_second(self, tokens_seen: int | None) -> float | None:
        """Returns the rate since the last call, from the count of all tokens so far; None when it is unknown."""
        if tokens_seen is None:
            return None
        tokens, seconds = tokens_seen - self._tokens, self.trained - self._trained_at_log
        self._tokens, self._trained_at_log = tokens_seen, self.trained
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def seconds_left(self, steps: int, pauses: int = 0) -> float:
        """Estimates the time for `steps` more steps and `pauses` more evaluations from the latest ones."""
        step = sum(self._steps) / max(len(self._steps), 1)
        pause = sum(self.pauses) / max(len(self.pauses), 1)
        return steps * step + pauses * pause


class ClockedCallback(TrainerCallback):
    """A callback with a clock of the training time."""

    def __init__(self) -> None:
        self.clock = TrainingClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.clock = TrainingClock(state.num_input_tokens_seen)

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


class ProgressCallback(ClockedCallback):
    """Reports steps and evaluations; call `close()` after `train()`, also when it failed, to end the live bar.

    `file` gets the latest step as JSON, at most once a second, for whoever watches from outside.
    """

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        self._file, self._written = file, -math.inf
        self._bar = contextlib.ExitStack()
        self._update: Any = None
        self._live = False
        self._latest: dict[str, float] = {}
        self._rate: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock and the bar."""
        super().on_train_begin(args, state, control)
        self.close()
        self._live = is_live()
        self._update = self._bar.enter_context(progress("training", state.max_steps))
        self._redraw(args, state, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        super().on_step_end(args, state, control)
        self._redraw(args, state, "evaluating" if control.should_evaluate else "training")
        self._write(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes back to the training."""
        super().on_evaluate(args, state, control)
        self._redraw(args, state, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints a line for an evaluation, and for training steps where no bar shows them."""
        logs = logs or {}
        if "loss" in logs:
            self._latest = logs
            self._rate = self.clock.tokens_per_second(logs.get("num_input_tokens_seen"))
            (record if self._live else say)(self._step_line(args, state))
        elif line := evaluation_line(logs, state.global_step):
            say(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the live bar; harmless when there is none."""
        self._bar.close()
        self._update = None

    def _write(self, args: Any, state: Any) -> None:
        now = time.monotonic()
        if self._file is None or not is_main_process() or now - self._written < 1:
            return
        self._written = now
        facts = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "loss": self._latest.get("loss"),
            "tokens_per_second": self._rate,
            "seconds_left": self._seconds_left(args, state),
        }
        write_text(self._file, json.dumps(facts))

    def _seconds_left(self, args: Any, state: Any) -> float | None:
        left = state.max_steps - state.global_step
        if left <= 0 or self.clock.trained <= 0:
            return None
        pauses = _evaluations(args, state.max_steps) - _evaluations(args, state.global_step)
        return self.clock.seconds_left(left, pauses)

    def _redraw(self, args: Any, state: Any, description: str) -> None:
        if self._update is not None:
            self._update(state.global_step, note="  ".join(self._notes(args, state)), description=description)

    def _step_line(self, args: Any, state: Any) -> str:
        width = len(str(state.max_steps))
        notes = self._notes(args, state)
        rate = self._latest.get("learning_rate")
        if rate is not None:
            notes.insert(1, f"lr {rate:.1e}")
        return "  ".join([f"step {state.global_step:>{width}}/{state.max_steps}", *notes])

    def _notes(self, args: Any, state: Any) -> list[str]:
        notes = []
        if "loss" in self._latest:
            notes.append(f"loss {self._latest['loss']:.3f}")
        if self._rate is not None:
            notes.append(f"{self._rate:,.0f} tokens/s")
        if (seconds := self._seconds_left(args, state)) is not None:
            notes.append(f"{format_duration(seconds)} left")
        return notes


def _evaluations(args: Any, steps: int) -> int:
    """Counts the evaluations within the first `steps` steps."""
    every = args.eval_steps if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps" else None
    return int(steps // every) if every else 0


def evaluation_line(logs: dict[str, Any], step: int) -> str | None:
    """Returns `eval at step 50: loss 1.23, perplexity 3.42, exact match 56.0 %`; None if nothing was evaluated."""
    metrics = {name: value for name, value in evaluation_metrics(logs).items() if not is_detail(name)}
    if not metrics:
        return None
    before = any(name.startswith("base_eval_") for name in logs)
    parts = [f"{name.replace('_', ' ')} {format_metric(name, value)}" for name, value in metrics.items()]
    return f"{'untuned base' if before else f'eval at step {step}'}: {', '.join(parts)}"


def evaluation_metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the `eval_` and `base_eval_` metrics without their prefix; perplexity is computed if it is missing."""
    found: dict[str, float] = {}
    for key, value in logs.items():
        name = key.removeprefix("base_").removeprefix("eval_")
        if key.startswith(("eval_", "base_eval_")) and name not in BOOKKEEPING and isinstance(value, int | float):
            found[name] = value
            if name == "loss":
                found["perplexity"] = math.exp(value) if value < 700 else math.inf
    return found
