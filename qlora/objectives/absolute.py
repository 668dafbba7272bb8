"""Regression by absolute errors, which a few wrong ratings move less than squared ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.objectives.regress import Regression

if TYPE_CHECKING:
    from torch import Tensor


class AbsoluteErrors(Regression):
    """The objective `absolute`: the absolute error of each text, a mean over its numbers, float32 [rows, numbers]."""

    def losses(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Returns the absolute error of each text."""
        return (outputs - truth).abs().mean(1)

    def constant(self, truth: Tensor, classes: int) -> Tensor:
        """Returns the median for all texts."""
        return truth.quantile(0.5, 0, keepdim=True).expand(len(truth), -1)
