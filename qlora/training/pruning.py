"""Ends the training of a trial that falls behind the others of its search."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qlora import world
from qlora.errors import Pruned
from qlora.study import TrialLink
from qlora.wording import format_metric


class PruningCallback(TrainerCallback):
    """Reports the objective of each evaluation to the study, and raises `Pruned` when its pruner says so."""

    def __init__(self, link: TrialLink) -> None:
        self.metric, self.trial = link.metric, link.open()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports what a resumed training had measured before."""
        for entry in state.log_history:
            if self.metric in entry:
                self._report(entry[self.metric], entry["step"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Reports, and asks; a training at its end is not pruned any more."""
        value = metrics[self.metric]
        self._report(value, state.global_step)
        if state.global_step < state.max_steps and self.trial.should_prune():
            shown = format_metric(self.metric, value)
            raise Pruned(f"{self.metric} {shown} at step {state.global_step} of {state.max_steps}")

    def _report(self, value: float, step: int) -> None:
        if world.is_first():
            self.trial.report(value, step)
