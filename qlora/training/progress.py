"""Shows the progress of a run: a live bar on a terminal, plain lines elsewhere, and a line for each evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora.config.registries.objectives import SHIPPED
from qlora.runtime import distributed
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import is_live, progress, record, say, screen
from qlora.text import format_bytes, format_duration, format_metric, format_percent, format_speed, is_detail
from qlora.training.meter import ClockedCallback

# What the trainer measures of itself while it evaluates; of no interest to a reader.
BOOKKEEPING = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
)
LINE = 80
"""Columns of a line about a step."""
BAR = 36
"""Columns that the live bar takes beside its notes."""


class ProgressCallback(ClockedCallback):
    """Reports steps and evaluations; call `close()` after `train()`, also when it failed, to end the live bar.

    `file` gets the latest step as JSON, at most once a second, for whoever watches from outside. `tokens` counts those
    of this process' batches so far. Speed and time left are those of the latest steps, but the first warm up.
    """

    def __init__(self, file: Path | None = None, *, tokens: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self._file, self._written = file, -math.inf
        self._tokens, self._counted = tokens, 0
        self._bar = contextlib.ExitStack()
        self._update: Any = None
        self._live = False
        self._latest: dict[str, float | None] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock and the bar."""
        super().on_train_begin(args, state, control)
        self._counted = self._tokens()
        self.close()
        self._live = is_live()
        self._update = self._bar.enter_context(progress("training", state.max_steps))
        self._redraw(args, state, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        previous, self._counted = self._counted, self._tokens()
        self.clock.end_step((self._counted - previous) * args.world_size)
        self._redraw(args, state, "evaluating" if control.should_evaluate else "training")
        self._write(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows training again."""
        super().on_evaluate(args, state, control)
        self._redraw(args, state, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints a line for an evaluation, and for training steps where no bar shows them."""
        logs = logs or {}
        if "loss" in logs:
            self._latest = logs
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
        if self._file is None or not distributed.is_main_process() or now - self._written < 1:
            return
        self._written = now
        latest = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "loss": self._latest.get("loss"),
            "tokens_per_second": self.clock.tokens_per_second,
            "seconds_left": self._seconds_left(args, state),
        }
        write_text(self._file, json.dumps(latest), flush=False)

    def _seconds_left(self, args: Any, state: Any) -> float | None:
        left = state.max_steps - state.global_step
        if left <= 0:
            return None
        pauses = _evaluations(args, state.max_steps) - _evaluations(args, state.global_step)
        return self.clock.seconds_left(left, pauses)

    def _redraw(self, args: Any, state: Any, description: str) -> None:
        if self._update is not None:
            notes = fit(self._notes(args, state), screen().width - BAR)
            self._update(state.global_step, note="  ".join(notes), description=description)

    def _step_line(self, args: Any, state: Any) -> str:
        width = len(str(state.max_steps))
        notes = self._notes(args, state)
        rate = self._latest.get("learning_rate")
        if rate is not None:
            notes.insert(1, (4, f"lr {format_rate(rate)}"))
        return "  ".join(fit([(0, f"step {state.global_step:>{width}}/{state.max_steps}"), *notes], LINE))

    def _notes(self, args: Any, state: Any) -> list[tuple[int, str]]:
        """Returns what is known of the latest step, each with its rank: 0 is the most important."""
        latest = self._latest | {"tokens_per_second": self.clock.tokens_per_second}
        formats: dict[str, tuple[int, Callable[[float], str]]] = {
            "loss": (0, lambda loss: f"loss {format_metric('loss', loss)}"),
            "tokens_per_second": (1, lambda speed: f"{format_speed(speed)} tokens/s"),
            "train_mfu": (2, lambda value: f"MFU {format_percent(value, 0)}"),
            "train_data_wait": (3, lambda value: f"wait {format_percent(value, 0)}"),
            "peak_memory_gb": (5, lambda size: f"{size:.1f} GB" if size >= 0.05 else format_bytes(1e9 * size)),
        }
        notes = [(rank, describe(value)) for name, (rank, describe) in formats.items()
                 if (value := latest.get(name)) is not None]  # fmt: skip
        if (seconds := self._seconds_left(args, state)) is not None:
            notes.append((0, f"{format_duration(seconds)} left"))
        return notes


def format_rate(rate: float) -> str:
    """Returns a learning rate as people write it: `2e-4`, `1.5e-05` as `1.5e-5`; 0 is the first step of a warm-up."""
    if rate == 0:
        return "0 (warm-up)"
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def fit(notes: list[tuple[int, str]], width: int) -> list[str]:
    """Returns the texts of `notes`, without those of the highest ranks if all are wider than `width` columns."""
    while notes and len("  ".join(text for _, text in notes)) > width and max(notes)[0] > 0:
        notes = [note for note in notes if note != max(notes)]
    return [text for _, text in notes]


def _evaluations(args: Any, steps: int) -> int:
    """Counts the evaluations within the first `steps` steps."""
    every = args.eval_steps if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps" else None
    return int(steps // every) if every else 0


HEADS = frozenset(f"eval_{name}" for loss in SHIPPED.values() for name in loss.measured)
"""What is measured of a head, whose loss is no likelihood of tokens."""


def evaluation_line(logs: dict[str, Any], step: int) -> str | None:
    """Returns `eval at step 50: loss 1.23, perplexity 3.42, exact match 56.0 %`; None if nothing was evaluated."""
    metrics = {name: value for name, value in evaluation_metrics(logs).items() if not is_detail(name)}
    if not metrics:
        return None
    is_base = any(name.startswith("base_eval_") for name in logs)
    parts = [f"{name.replace('_', ' ')} {format_metric(name, value)}" for name, value in metrics.items()]
    return f"{'untuned base' if is_base else f'eval at step {step}'}: {', '.join(parts)}"


def evaluation_metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the `eval_` and `base_eval_` metrics without their prefix; perplexity is computed if it is missing."""
    metrics: dict[str, float] = {}
    for key, value in logs.items():
        name = key.removeprefix("base_").removeprefix("eval_")
        if key.startswith(("eval_", "base_eval_")) and name not in BOOKKEEPING and isinstance(value, int | float):
            metrics[name] = value
            if name == "loss" and not HEADS.intersection(logs):
                metrics["perplexity"] = math.exp(value) if value < 700 else math.inf
    return metrics
