"""What is done about things that go wrong in training: the group `watchdog`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum, auto

from omegaconf import MISSING

from qlora.errors import require

# What the watchdog counts.
WATCHDOG_COUNTS = ("nonfinite", "zero", "divergence", "slow", "stalled", "skipped", "rollbacks")


class WatchdogAction(StrEnum):
    """What is done about something that goes wrong in a training run."""

    ignore = auto()
    warn = auto()
    skip = auto()
    rollback = auto()
    stop = auto()

    @property
    def keeps_out(self) -> bool:
        """Whether an update by gradients that are NaN or infinite is undone."""
        return self not in (WatchdogAction.ignore, WatchdogAction.warn)


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """What is done about things that go wrong in a training run: each is named with its likely cause and counted.

    `ignore` does nothing, `warn` prints a warning, `stop` ends the run with the last checkpoint kept, `rollback`
    returns to an earlier checkpoint with a lower learning rate, `skip` leaves the step out.
    """

    nonfinite: WatchdogAction = MISSING
    """A loss or gradients that are not a number. With `skip`, `rollback` and `stop` such a step changes no weight."""
    zero: WatchdogAction = MISSING
    """A loss of exactly zero, or a step without a token that has a loss: `ignore`, `warn` or `stop`."""
    divergence: WatchdogAction = MISSING
    """A smoothed loss (0.9 of the step before) of more than `divergence_factor` times its lowest value, and of more
    than 1 above it: `ignore`, `warn`, `rollback` or `stop`."""
    slow: WatchdogAction = MISSING
    """A step that takes more than `slow_factor` times the median of the latest 50, and a second: `ignore`, `warn` or
    `stop`."""
    stalled: WatchdogAction = MISSING
    """No batch within `stalled_seconds`: `ignore`, `warn` or `stop`. A process of `trainer.dataloader_num_workers` that
    has died always ends the training."""
    divergence_factor: float = 3.0
    """When a loss counts as diverged."""
    slow_factor: float = 10.0
    """When a step counts as slow."""
    stalled_seconds: float = 600.0
    """How long a batch may take."""
    rollback_factor: float = 0.5
    """What a rollback multiplies the learning rate with."""
    max_rollbacks: int = 3
    """The number of rollbacks after which the run stops instead."""
    max_skips: int = 10
    """The number of skipped steps in a row after which the run stops."""

    def __post_init__(self) -> None:
        able = {
            "nonfinite": ("ignore", "warn", "skip", "rollback", "stop"),
            "divergence": ("ignore", "warn", "rollback", "stop"),
            **dict.fromkeys(("zero", "slow", "stalled"), ("ignore", "warn", "stop")),
        }
        for name, actions in able.items():
            action = getattr(self, name).value
            require(action in actions, f"watchdog.{name}", f"be one of {', '.join(actions)}", action)
        for name in ("divergence_factor", "slow_factor"):
            value = getattr(self, name)
            require(1 < value < math.inf, f"watchdog.{name}", "be above 1 and finite", value)
        require(0 < self.rollback_factor <= 1, "watchdog.rollback_factor", "be in (0, 1]", self.rollback_factor)
        require(0 < self.stalled_seconds < math.inf, "watchdog.stalled_seconds", "be positive and finite",
                self.stalled_seconds)  # fmt: skip
        for name in ("max_rollbacks", "max_skips"):
            require(getattr(self, name) > 0, f"watchdog.{name}", "be positive", getattr(self, name))
