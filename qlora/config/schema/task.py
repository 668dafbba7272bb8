"""What a run does: the group `task`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from qlora.errors import require

TaskName = StrEnum(
    "TaskName", "train evaluate predict preview chat merge push report plan doctor migrate replay wandb_sweep"
)
"""What a run does."""

SweepMethod = StrEnum("SweepMethod", "grid random bayes")
"""How wandb chooses the points of a sweep of its own."""

TASK_KEYS: dict[str, tuple[TaskName, ...]] = {
    "adapter": (TaskName.chat, TaskName.evaluate, TaskName.merge, TaskName.predict, TaskName.push),
    "repo": (TaskName.push,),
    "runs": (TaskName.report,),
    "run": (TaskName.replay,),
    "source": (TaskName.migrate,),
    "task.rows": (TaskName.preview,),
    "task.ids": (TaskName.preview,),
    "task.private": (TaskName.push,),
    "task.online": (TaskName.doctor,),
    "task.method": (TaskName.wandb_sweep,),
}
"""The keys that describe no training: what one task reads or writes, and how. No other task takes them."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What to do with the model: train it, measure it, or let it answer."""

    name: TaskName = MISSING
    """`train`, `evaluate`, `predict`, `preview`, `chat`, `merge`, `push`, `report`, `plan`, `doctor`, `migrate`,
    `replay` or `wandb_sweep`; chosen with `task=`."""
    train: bool = True
    """Train the model (`task=train` only; the original's `--do_train`)."""
    evaluate: bool = True
    """Measure the held-out rows after training (`task=train` only; the original's `--do_eval`)."""
    predict: bool = True
    """Write predictions for a few held-out rows after training (`task=train` only; `--do_predict`)."""
    rows: int = 3
    """How many rows `task=preview` shows."""
    ids: bool = False
    """Whether `task=preview` shows token ids beside the text."""
    private: bool = True
    """Whether a repository that `task=push` creates is private."""
    online: bool = False
    """Whether `task=doctor` asks the hub and wandb if they accept the logins; else nothing goes over the network."""
    method: SweepMethod | None = None
    """How a sweep that `task=wandb-sweep` describes chooses its points: `grid`, `random` or `bayes`; unset:
    `grid` where all values are listed, else `bayes`."""

    def __post_init__(self) -> None:
        require(self.rows >= 0, "task.rows", "be 0 or more", self.rows)
