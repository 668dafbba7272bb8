"""Classification: the cross entropy of the classes of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import RowKind
from qlora.objectives.head_loss import HeadLoss

if TYPE_CHECKING:
    from torch import Tensor


class Classification(HeadLoss):
    """The objective `classify`: the negative log-likelihood of the class of each text, int64 [rows]."""

    rows = RowKind.classes
    columns = ("input_ids", "labels", "label")

    def losses(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Returns the cross entropy of each text."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, truth, reduction="none")

    def measures(self, outputs: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Returns which texts have their class."""
        return {"accuracy": (outputs.argmax(1) == truth).float()}

    def statistics(self, outputs: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the classes that F1 compares."""
        return {"macro_f1": (outputs.argmax(1), truth)}

    def constant(self, truth: Tensor, classes: int) -> Tensor:
        """Returns the logarithms of the shares of the classes: the most frequent one is said of all texts."""
        import torch

        shares = torch.bincount(truth, minlength=classes) / len(truth)
        return shares.clamp(min=1e-12).log().expand(len(truth), -1)

    def describe(self, outputs: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the likeliest class of each text, and the probabilities of all."""
        return [
            {"prediction": labels[max(range(len(row)), key=row.__getitem__)],
             "scores": dict(zip(labels, row, strict=True))}
            for row in outputs.softmax(1).tolist()
        ]  # fmt: skip

    def describe_truth(self, truth: Tensor, labels: Sequence[str]) -> list[str | None]:
        """Returns the class of each text."""
        return [labels[index] for index in truth.tolist()]
