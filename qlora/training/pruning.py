"""Ends the run of a trial that falls behind the others of its search."""

from __future__ import annotations

import math
from typing import Any

from optuna.study import StudyDirection
from transformers import TrainerCallback

from qlora.errors import Pruned
from qlora.runtime import distributed
from qlora.runtime.saved_run import to_number
from qlora.runtime.search_trial import TrialLink
from qlora.text import format_metric


class PruningCallback(TrainerCallback):
    """Reports the objective of each evaluation to the study, and raises `Pruned` when its pruner says so."""

    def __init__(self, link: TrialLink) -> None:
        self.metric, self.trial = link.metric, link.open()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports what a resumed run had measured before."""
        for entry in state.log_history:
            if self.metric in entry:
                self._report(to_number(entry[self.metric]), entry["step"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the metric and asks the pruner, except at the end of the run."""
        value = kwargs["metrics"][self.metric]
        self._report(value, state.global_step)
        if state.global_step < state.max_steps and self.trial.should_prune():
            text = format_metric(self.metric, value)
            raise Pruned(f"{self.metric} {text} at step {state.global_step} of {state.max_steps}")

    def _report(self, value: float, step: int) -> None:
        """Reports a value; one that is NaN or infinite counts as the worst, because pruners ignore NaN."""
        if distributed.is_main_process():
            worst = -math.inf if self.trial.study.direction is StudyDirection.MAXIMIZE else math.inf
            self.trial.report(value if math.isfinite(value) else worst, step)
