"""How a sweep is run: the group `sweep`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from qlora.config.schema.values import written
from qlora.errors import ConfigError, require

Direction = StrEnum("Direction", "auto minimize maximize")
"""Which values of a metric are the better ones."""


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """A question that a sweep answers; see docs/sweeps.md."""

    by: str | None = None
    """The swept key whose values are compared, e.g. `lora.r` or `quantization`; null: the sweep answers no question."""
    baseline: Any = None
    """The value of that key with which the others, the candidates, are compared."""
    metric: str | None = None
    """What is compared, e.g. `eval_loss`; unset: `objective`."""
    margin: float | None = None
    """The smallest difference of the metric that matters; candidates that surely differ by less are the same."""
    direction: Direction = Direction.auto
    """`minimize` or `maximize`; `auto`: as the metric's name implies."""
    max_seeds: int = 20
    """The most seeds that each value is run with; those of a sweep are `seed`, `seed`+1, and so on."""

    def __post_init__(self) -> None:
        if self.by is None:
            given = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
            if given:
                value = written(getattr(self, given[0]))
                raise ConfigError(
                    f"sweep.compare.{given[0]}={value} compares nothing without a key; name the swept one, e.g. "
                    "sweep.compare.by=lora.r"
                )
            return
        if self.margin is None:
            raise ConfigError(
                "sweep.compare.margin is not set; name the smallest difference that matters, e.g. "
                "sweep.compare.margin=0.01"
            )
        require(0 < self.margin < math.inf, "sweep.compare.margin", "be positive and finite", self.margin)
        require(2 <= self.max_seeds <= 1000, "sweep.compare.max_seeds", "lie between 2 and 1000", self.max_seeds)


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How a sweep is run; its values are those of the command line, or of a file chosen with `sweep=`."""

    compare: CompareConfig = field(default_factory=CompareConfig)
    """The question that the sweep answers, e.g. `sweep.compare={by: lora.r, baseline: 8, metric: eval_loss, margin:
    0.01}`: seeds are added until each other value of the key is better, worse or the same; see docs/sweeps.md."""
    detach: bool = False
    """Submit the jobs and return; the same command shows their state later (`hydra/launcher=slurm`)."""
