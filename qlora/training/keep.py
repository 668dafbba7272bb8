"""What of a training run is kept: its last step, the best one that was measured, or the average of checkpoints.

The best step is read from the history of evaluations, which every checkpoint holds: a run that is resumed knows what it
knew. Each step that is the best so far is saved, and `save_total_limit` removes no checkpoint that may be kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora.config.schema import Keep
from qlora.errors import RunError
from qlora.runtime.atomic_files import read_json
from qlora.text import higher_is_better
from qlora.training.checkpoints import damage_reason, find_checkpoints, step_of
from qlora.training.trainer import QLoraTrainer

log = logging.getLogger(__name__)

AVERAGED = 3
"""The checkpoints that `trainer.keep=average` averages: the last ones."""
Weights = dict[str, torch.Tensor]
Average = Callable[[torch.nn.Module, Iterator[Weights], int], None]
"""Gives a model the mean of N states of its trained parameters, which are read one after the other."""
STATE_FILE = "trainer_state.json"
"""The file of a checkpoint in which the library saves the history."""


@dataclass(frozen=True)
class Measured:
    """The metric of a step."""

    step: int
    value: float


@dataclass(frozen=True)
class Kept:
    """What was kept of a training run."""

    keep: str
    steps: list[int]
    """The steps whose weights are kept, or averaged."""
    metric: str
    value: float | None
    """The metric of what is kept; None: it is not known yet, or was not measured."""
    last_step: int
    last_value: float | None
    """The metric of the last step."""

    def to_dict(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Returns the entry of `result.json`; what was not known is among the metrics measured after training."""
        value = metrics.get(self.metric) if self.value is None else self.value
        return {**asdict(self), "value": value}


@dataclass(frozen=True)
class KeepRule:
    """What `trainer.keep` asks for."""

    keep: Keep
    metric: str

    def best(self, history: Iterable[Mapping[str, Any]], until: float = math.inf) -> Measured | None:
        """Returns the best step up to `until`, the first of equal ones; None: none has a finite value."""
        sign = -1 if higher_is_better(self.metric) else 1
        return min(
            self._measured(history, until), key=lambda measured: (sign * measured.value, measured.step), default=None
        )

    def last(self, history: Iterable[Mapping[str, Any]]) -> Measured | None:
        """Returns the last step that was measured."""
        return max(self._measured(history), key=lambda measured: measured.step, default=None)

    def _measured(self, history: Iterable[Mapping[str, Any]], until: float = math.inf) -> list[Measured]:
        values = [(entry["step"], float(entry[self.metric])) for entry in history if self.metric in entry]
        return [Measured(step, value) for step, value in values if step <= until and math.isfinite(value)]

    def describe(self, *, measures: bool) -> str:
        """Says before a training run what it keeps; `measures`: rows are held out."""
        if self.keep is Keep.best:
            return f"the best step by {self.metric}"
        if self.keep is Keep.average:
            return f"the average of the last {AVERAGED} checkpoints"
        return "the last step" if measures else "the last step (no rows are held out to compare steps by)"

    def needed(self, retained: Sequence[Path]) -> set[Path]:
        """Returns the checkpoints that may be kept by a run that ends, or resumes, at one of `retained`."""
        if self.keep is Keep.last or not retained:
            return set()
        folder = retained[-1].parent
        if self.keep is Keep.average:
            return {*find_checkpoints(folder)[-AVERAGED:]}
        history = (read_json(retained[-1] / STATE_FILE) or {}).get("log_history", [])
        best = (self.best(history, step_of(checkpoint)) for checkpoint in retained)
        return {folder / f"checkpoint-{measured.step}" for measured in best if measured is not None}


class KeepCallback(TrainerCallback):
    """Saves each step that is the best so far."""

    def __init__(self, rule: KeepRule) -> None:
        self.rule = rule

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares the evaluation with those before; reads the history, so that a resumed run continues."""
        if self.rule.keep is Keep.best:
            best = self.rule.best(state.log_history)
            control.should_save = control.should_save or (best is not None and best.step == state.global_step)


def keep_weights(trainer: QLoraTrainer, rule: KeepRule, average: Average) -> Kept | None:
    """Makes the model of a trainer that has ended what `rule` keeps, in all processes; None: it is the last step.

    `average` gives a model the mean of the trained parameters that it gets. Raises `RunError` where a checkpoint that
    is needed is gone or damaged.
    """
    state, folder = trainer.state, trainer.checkpoints.folder
    if rule.keep is Keep.last:
        return None
    last = rule.last(state.log_history)
    last_value = last.value if last is not None and last.step == state.global_step else None
    if rule.keep is Keep.best:
        best = rule.best(state.log_history)
        if best is None:
            log.warning("trainer.keep=best: no evaluation gave a finite %s, so the last step is kept", rule.metric)
            return None
        if best.step != state.global_step:
            trainer.load_weights(_intact(folder / f"checkpoint-{best.step}"))
        return Kept(rule.keep.value, [best.step], rule.metric, best.value, state.global_step, last_value)
    chosen = [path for path in find_checkpoints(folder) if step_of(path) <= state.global_step][-AVERAGED:]
    average(trainer.model, (_weights(trainer, _intact(path)) for path in chosen), len(chosen))
    return Kept(rule.keep.value, [step_of(path) for path in chosen], rule.metric, None, state.global_step, last_value)


def _intact(checkpoint: Path) -> Path:
    if (reason := damage_reason(checkpoint)) is not None:
        raise RunError(
            f"{checkpoint}, whose weights trainer.keep keeps, cannot be used: {reason}; the same command with "
            "trainer.keep=last resume=force keeps the last step"
        )
    return checkpoint


def _weights(trainer: QLoraTrainer, checkpoint: Path) -> Weights:
    """Returns the trained parameters of a checkpoint by name, on the host."""
    trainer.load_weights(checkpoint)
    named = trainer.model.named_parameters()
    return {name: weight.detach().to("cpu", copy=True) for name, weight in named if weight.requires_grad}
