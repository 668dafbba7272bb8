"""What the trainer logs, on its way to a tracker."""

from __future__ import annotations

from typing import Any

import torch

from qlora.training.progress import ClockedCallback, evaluation_metrics
from qlora.training.tracking.base import Tracker


class TrackerCallback(ClockedCallback):
    """Forwards what the trainer logs, under names such as `train/loss` and `eval/exact_match`."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock, and sends what a resumed training had logged and the tracker has not."""
        super().on_train_begin(args, state, control)
        if state.is_world_process_zero:
            for logs in state.log_history:
                if metrics := _metrics(logs):
                    self._tracker.log(metrics, logs["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Sends the numbers of a training log or of an evaluation."""
        if not state.is_world_process_zero or not logs:
            return
        metrics = _metrics(logs)
        if "loss" in logs:
            metrics |= self._speed(logs)
        if metrics:
            self._tracker.log(metrics, state.global_step)

    def _speed(self, logs: dict[str, Any]) -> dict[str, float]:
        metrics = {}
        rate = self.clock.tokens_per_second(logs.get("num_input_tokens_seen"))
        if rate is not None:
            metrics["train/tokens_per_second"] = rate
        if torch.cuda.is_available():
            metrics["train/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics


def _metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a training log or of an evaluation."""
    if "loss" not in logs:
        return tracked_evaluation(logs)
    names = {"num_input_tokens_seen": "tokens_seen"}
    kept = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen")
    return {f"train/{names.get(key, key)}": float(logs[key]) for key in kept if logs.get(key) is not None}


def tracked_evaluation(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation as `eval/NAME`, those of the untuned base as `base/NAME`."""
    prefix = "base" if any(key.startswith("base_eval_") for key in logs) else "eval"
    return {f"{prefix}/{name}": float(value) for name, value in evaluation_metrics(logs).items()}
