"""An adapter whose ranks change while it trains: what the trainer asks of its schedule, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback


class Ranks(Protocol):
    """The schedule of an adapter (`qlora.adapters.rank_schedule`)."""

    def begin(self, steps: int) -> None:
        """Takes the number of all steps."""

    def penalise(self, scale: float) -> None:
        """Adds the gradient of a penalty, once a step, to gradients that are `scale` times too large."""

    def choose(self, step: int) -> None:
        """Follows the optimizer's step of this number, from 1."""

    def save(self, folder: Path) -> None:
        """Writes the state into a checkpoint."""

    def load(self, folder: Path) -> None:
        """Reads the state of a checkpoint."""


class RankCallback(TrainerCallback):
    """Tells a schedule of the steps, while their gradients are there."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands over the number of steps."""
        self.ranks.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follows a step."""
        self.ranks.choose(state.global_step + 1)
