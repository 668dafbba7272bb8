"""The callback that sends what the trainer logs to a tracker."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qlora.training.progress import evaluation_metrics
from qlora.training.trackers.base import Tracker

NAMES = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "epoch", "peak_memory_gb")},
    "num_input_tokens_seen": "tokens_seen",
    "train_tokens_per_second": "tokens_per_second",
    "train_mfu": "mfu",
    "train_data_wait": "data_wait",
    **{name: name for name in ("expert_tokens_mean", "expert_tokens_max", "expert_idle_share", "router_aux_loss")},
}
"""The keys of a training log that are sent, with their names below `train/`."""


class TrackerCallback(TrainerCallback):
    """Forwards what the trainer logs, under names such as `train/loss` and `eval/exact_match`."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sends what a resumed run had logged and the tracker lacks."""
        if state.is_world_process_zero:
            for logs in state.log_history:
                if metrics := _metrics(logs):
                    self._tracker.log(metrics, logs["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Sends the numbers of a training log or of an evaluation."""
        if state.is_world_process_zero and (metrics := _metrics(logs or {})):
            self._tracker.log(metrics, state.global_step)


def _metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a training log or of an evaluation."""
    if "loss" not in logs:
        return tracked_evaluation(logs)
    return {f"train/{name}": float(logs[key]) for key, name in NAMES.items() if logs.get(key) is not None}


def tracked_evaluation(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation as `eval/NAME`, those of the untuned base as `base/NAME`."""
    prefix = "base" if any(key.startswith("base_eval_") for key in logs) else "eval"
    return {f"{prefix}/{name}": float(value) for name, value in evaluation_metrics(logs).items()}
