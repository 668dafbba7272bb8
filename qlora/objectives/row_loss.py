"""Losses in which each row weighs the same, whatever it holds: those over answers, and those of whole texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import LossConfig

if TYPE_CHECKING:
    from torch import Tensor


class RowLoss:
    """An objective over rows; a loss of its own writes `rows`, `columns`, `loss_on_batch` and `count`."""

    rows: RowKind
    columns: tuple[str, ...]
    is_model_loss = False
    is_separable = True
    """Whether each row has a loss of its own, so that a micro-batch may be cut where memory runs out."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}

    def loss_on_batch(self, batch: dict[str, Any], passes: Any) -> Tensor:
        """Returns the loss of a micro-batch, which the passes of the model are asked for."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns what the loss of an optimizer step is divided by, of each row of a batch, float [rows, 2].

        The first number says whether the row counts.
        """
        raise NotImplementedError

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the labels that the data pipeline has set."""
        return batch["labels"]

    def note(self, measures: Mapping[str, Tensor], counts: Tensor) -> None:
        """Adds measures of rows, each float [rows], to what is logged; `counts` bool [rows] says which are meant."""
        import torch

        for name, values in measures.items():
            amount = torch.stack([torch.where(counts, values, 0).sum().double(), counts.sum().double()])
            self._sums[name] = self._sums[name] + amount if name in self._sums else amount

    def metrics(self) -> dict[str, float]:
        """Returns the means of what was noted since the last call, over the rows of this process."""
        sums, self._sums = self._sums, {}
        return {name: float(total / rows.clamp(min=1)) for name, (total, rows) in sums.items()}
