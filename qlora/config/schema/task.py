"""What a run does: the group `task`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from omegaconf import MISSING

from qlora.errors import require


class TaskName(StrEnum):
    """What a run does."""

    train = auto()
    evaluate = auto()
    predict = auto()
    preview = auto()
    chat = auto()
    merge = auto()
    push = auto()
    report = auto()
    plan = auto()
    doctor = auto()
    migrate = auto()
    replay = auto()
    wandb_sweep = auto()
    board = auto()
    export = auto()
    verify = auto()
    serve = auto()

    @property
    def trains(self) -> bool:
        """Whether the task trains by the config of its command."""
        return self is TaskName.train

    @property
    def measures_rows(self) -> bool:
        """Whether the task measures the held-out rows."""
        return self in (TaskName.train, TaskName.evaluate, TaskName.predict)

    @property
    def measures_base(self) -> bool:
        """Whether the task measures the untuned base too."""
        return self in (TaskName.train, TaskName.evaluate)

    @property
    def only_looks(self) -> bool:
        """Whether the result is to be looked at: the task's folders are not among those of runs."""
        return self in (TaskName.preview, TaskName.plan)

    @property
    def describes_sweep(self) -> bool:
        """Whether the task describes a sweep, whose jobs another program starts."""
        return self is TaskName.wandb_sweep


SweepMethod = StrEnum("SweepMethod", "grid random bayes")
"""How wandb chooses the points of a sweep of its own."""

TASK_KEYS: dict[str, tuple[TaskName, ...]] = {
    "adapter": (
        TaskName.chat,
        TaskName.evaluate,
        TaskName.predict,
        TaskName.merge,
        TaskName.export,
        TaskName.verify,
        TaskName.push,
        TaskName.serve,
    ),
    "repo": (TaskName.push,),
    "runs": (TaskName.report,),
    "run": (TaskName.replay,),
    "source": (TaskName.migrate,),
    "task.rows": (TaskName.preview,),
    "task.ids": (TaskName.preview,),
    "task.private": (TaskName.push,),
    "task.online": (TaskName.doctor,),
    "task.port": (TaskName.board,),
    "task.method": (TaskName.wandb_sweep,),
}
"""The keys that describe no training: what one task reads or writes, and how. No other task takes them."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What to do with the model: train it, measure it, or let it answer."""

    name: TaskName = MISSING
    """`train`, `evaluate`, `predict`, `preview`, `chat`, `merge`, `push`, `report`, `plan`, `doctor`, `migrate`,
    `replay`, `wandb_sweep`, `board`, `export`, `verify` or `serve`; chosen with `task=`."""
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
    port: int = 8642
    """The port of this machine on which `task=board` answers; 0 takes any free one."""
    method: SweepMethod | None = None
    """How a sweep that `task=wandb-sweep` describes chooses its points: `grid`, `random` or `bayes`; unset:
    `grid` where all values are listed, else `bayes`."""

    def __post_init__(self) -> None:
        require(self.rows >= 0, "task.rows", "be 0 or more", self.rows)
        require(0 <= self.port <= 65535, "task.port", "lie between 0 and 65535", self.port)
