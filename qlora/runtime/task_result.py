"""The result of a task, as its JSON file in the run's folder holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class TaskResult:
    """What a task returns, and what its JSON file in the run's folder holds."""

    task: str
    metrics: Mapping[str, Any]
    paths: dict[str, str]
    objective: float | None = None
    """The metric that `objective` names, which a sweep compares jobs by."""
    certainty: Mapping[str, Any] = field(default_factory=dict)
    """`intervals` and `gains` of a task that measures."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Entries of this task alone."""
    status: str = "finished"

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as `result.json` holds it."""
        return {
            "status": self.status,
            "task": self.task,
            "objective": self.objective,
            "metrics": dict(self.metrics),
            **self.certainty,
            "paths": self.paths,
            **self.more,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Returns the result that a finished task has written."""
        named = ("status", "task", "objective", "metrics", "paths")
        more = {key: value for key, value in saved.items() if key not in named}
        return cls(saved["task"], saved["metrics"], saved["paths"], saved["objective"], {}, more, saved["status"])
