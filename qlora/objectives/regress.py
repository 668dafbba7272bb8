"""Regression: the squared error of the numbers of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import RowKind
from qlora.objectives.head_loss import HeadLoss

if TYPE_CHECKING:
    from torch import Tensor


class Regression(HeadLoss):
    """The objective `regress`: the squared error of each text, a mean over its numbers, float32 [rows, numbers]."""

    rows = RowKind.values
    columns = ("input_ids", "labels", "values")

    def losses(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Returns the squared error of each text."""
        return (outputs - truth).square().mean(1)

    def measures(self, outputs: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Returns nothing: the loss says it."""
        return {}

    def statistics(self, outputs: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the numbers that correlations compare."""
        return {"pearson": (outputs, truth), "spearman": (outputs, truth)}

    def constant(self, truth: Tensor, classes: int) -> Tensor:
        """Returns the mean for all texts."""
        return truth.mean(0, keepdim=True).expand(len(truth), -1)

    def describe(self, outputs: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the numbers of each text, as they are in `scores`."""
        return [{"prediction": _written(row), "scores": row, "match": None} for row in outputs.tolist()]

    def describe_truth(self, truth: Tensor, labels: Sequence[str]) -> list[str | None]:
        """Returns the numbers of each text."""
        return [_written(row) for row in truth.tolist()]


def _written(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers)
