"""Trainer callbacks that a config can name."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from qlora.config.registries.installed import installed_names
from qlora.config.schema.code_names import CALLBACK_GROUP, is_installed_callback
from qlora.config.user_code import import_class
from qlora.errors import ConfigError, UserError
from qlora.text import higher_is_better

log = logging.getLogger(__name__)


def build_callbacks(nodes: dict[str, dict[str, Any]]) -> list[TrainerCallback]:
    """Builds the callbacks of the group `callbacks`: of each node the class that its `_target_` names, with its
    arguments.

    Raises `ConfigError` for what is no callback, and for arguments that it does not take."""
    callbacks = []
    for name, node in nodes.items():
        arguments = dict(node)
        target = arguments.pop("_target_")
        path = installed_names(CALLBACK_GROUP)[target].replace(":", ".") if is_installed_callback(target) else target
        kind = import_class(path, f"callbacks.{name}._target_", TrainerCallback)
        try:
            callbacks.append(kind(**arguments))
        except (UserError, TypeError, ValueError, ImportError, RuntimeError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ConfigError(f"callbacks.{name}: {target} does not start with these arguments: {said}") from error
    return callbacks


class EarlyStopping(TrainerCallback):
    """Stops when `metric` has not become better by more than `min_delta` for `patience` evaluations in a row."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0, metric: str = "eval_loss") -> None:
        self.patience, self.min_delta, self.metric = patience, min_delta, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares the latest evaluations; reads the trainer's own history, so that a resumed run continues."""
        sign = -1 if higher_is_better(self.metric) else 1
        values = [sign * entry[self.metric] for entry in state.log_history if self.metric in entry]
        if len(values) <= self.patience:
            return
        best_before = min(values[: -self.patience])
        if min(values[-self.patience :]) > best_before - self.min_delta:
            log.info(
                "early stopping at step %d: %s has not %s %.4f for %d evaluations",
                *(state.global_step, self.metric, "risen above" if sign < 0 else "fallen below"),
                *(sign * best_before, self.patience),
            )
            control.should_training_stop = True
