"""How long a training run is: its steps and epochs, and the steps between two evaluations or checkpoints.

All of it follows from the group `trainer` and the number of rows, so that the plan, the screen and the trainer agree.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.errors import ConfigError
from qlora.text import brief

if TYPE_CHECKING:
    from qlora.config.schema import TrainerConfig

EPOCH_SHARE = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*ep")
"""A share of an epoch as `trainer.eval_steps` and `trainer.save_steps` take it: `0.5ep`."""

MANY_EPOCHS = 20
"""With more passes over the same rows a person is warned."""


@dataclass(frozen=True)
class TrainingLength:
    """The length of a training run on a number of rows, or of packs."""

    units: int
    """Rows, or packs, that a pass shows."""
    unit: str
    """`rows` or `packs`."""
    epoch_steps: int
    """Optimizer steps of a pass."""
    steps: int
    eval_steps: int | None
    """Steps between two measurements of the held-out rows; None: at the end only."""
    save_steps: int | None
    """Steps between two checkpoints; None: none before the end."""
    is_stream: bool = False
    """Whether the rows are streamed: no pass has a known length, and `units` are those of the whole run."""

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.steps / self.epoch_steps

    def __str__(self) -> str:
        if self.is_stream:
            return f"{self.units:,} {self.unit} of a stream = {self.steps:,} step{'' if self.steps == 1 else 's'}"
        epochs = f"{_amount(self.epochs)} epoch{'' if self.steps == self.epoch_steps else 's'}"
        once, all_steps = (f"{count:,} step{'' if count == 1 else 's'}" for count in (self.epoch_steps, self.steps))
        return f"{self.units:,} {self.unit}, {once} an epoch, {epochs} = {all_steps}"

    def describe_tokens(self, tokens: float, estimate: str = "") -> str:
        """Says what the `tokens` of a pass are for a step and the whole run; `estimate`: how they were estimated."""
        per_unit, step, total = (
            f"{round(count):,}" for count in (tokens / self.units, tokens / self.epoch_steps, tokens * self.epochs)
        )
        text = f"{per_unit} a {self.unit.removesuffix('s')}, {step} a step, {total} in all"
        return f"about {text} ({estimate})" if estimate else text

    @property
    def warning(self) -> str | None:
        """What a person must hear of it; None: nothing."""
        if self.epochs <= MANY_EPOCHS:
            return None
        return (
            f"{self.steps:,} steps are {self.epochs:,.0f} passes over the same {self.units:,} {self.unit}, which are "
            "learnt by heart; trainer.num_train_epochs=3 is usual"
        )


@dataclass(frozen=True)
class TokenCount:
    """What was counted of the rows to train on, before the run."""

    units: int
    """Rows, or packs, that a pass shows."""
    unit: str
    """`rows` or `packs`."""
    tokens: int
    """Of a pass; a prompt counts with both answers of a pair."""
    padded: float
    """The mean tokens of a row or a pack, with its padding; a prompt that answers share counts once."""
    estimate: str = ""
    """How they were estimated; "" where every row was counted."""
    targets: int | None = None
    """The tokens of a pass that the loss counts; None: they were not counted."""
    most_targets: int | None = None
    """The most of them in a row or a pack."""
    attended: float = 1.0
    """How many of `tokens` there are for each that is computed: more than 1 where answers of pairs share prompts."""


def training_length(
    trainer: TrainerConfig, units: int, *, unit: str = "rows", processes: int = 1, is_stream: bool = False
) -> TrainingLength:
    """Returns the length of a training run on `units` rows or packs, counted as transformers' trainer does.

    Of a stream `units` does not count.
    """
    if is_stream:
        units = stream_units(trainer, processes)
    batches = -(-units // (trainer.per_device_train_batch_size * processes))
    epoch_steps = max(-(-batches // trainer.gradient_accumulation_steps), 1)
    steps = trainer.max_steps
    if steps is None:
        assert trainer.num_train_epochs is not None, "TrainerConfig checks it"
        steps = math.ceil(trainer.num_train_epochs * epoch_steps)
    every = (_steps(trainer.eval_steps, epoch_steps), _steps(trainer.save_steps, epoch_steps))
    return TrainingLength(units, unit, epoch_steps, steps, *every, is_stream)


def stream_units(trainer: TrainerConfig, processes: int = 1) -> int:
    """Returns the rows or packs that a training run takes of a stream."""
    assert trainer.max_steps is not None, "Config checks it"
    return trainer.max_steps * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * processes


def _steps(interval: int | str | None, epoch_steps: int) -> int | None:
    """Returns an interval in steps; a share of an epoch is rounded up."""
    if not isinstance(interval, str):
        return interval
    return max(math.ceil(round(epoch_share(interval) * epoch_steps, 6)), 1)


def _amount(epochs: float) -> str:
    """Returns a number of epochs: `3`, `0.52`, `0.0004`."""
    return f"{round(epochs, 2):,g}" if epochs >= 0.005 else f"{epochs:.1g}"


def epoch_share(interval: str) -> float:
    """Returns the number in `0.5ep`."""
    match = EPOCH_SHARE.fullmatch(interval)
    assert match is not None, "TrainerConfig checks it"
    return float(match[1])


def read_interval(key: str, value: object) -> int | str | None:
    """Returns a number of steps, `0.5ep`, or None for null; raises `ConfigError` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    match = EPOCH_SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if value is None or is_steps:
        return value  # type: ignore[return-value]
    if match is not None and 0 < float(match[1]) < math.inf:
        return f"{match[1]}ep"
    example = f"; a share of an epoch is written {value:g}ep" if isinstance(value, float) and value > 0 else ""
    raise ConfigError(
        f"{key} must be a positive whole number of steps, a share of an epoch such as 0.5ep, or null, got "
        f"{brief(value)}{example}"
    )
