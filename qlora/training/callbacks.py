"""Trainer callbacks that a config can name."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

log = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback):
    """Stops when `metric` has not fallen by more than `min_delta` for `patience` evaluations in a row."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0, metric: str = "eval_loss") -> None:
        self.patience, self.min_delta, self.metric = patience, min_delta, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Compares the latest evaluations; reads the trainer's own history, so that a resumed run goes on."""
        values = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        if len(values) <= self.patience:
            return
        best_before = min(values[: -self.patience])
        if min(values[-self.patience :]) > best_before - self.min_delta:
            log.info(
                "early stopping at step %d: %s has not fallen below %.4f for %d evaluations",
                *(state.global_step, self.metric, best_before, self.patience),
            )
            control.should_training_stop = True
