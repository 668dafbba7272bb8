"""An objective that another package adds: cross entropy with label smoothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy


class SmoothedLoss:
    """Cross entropy against targets that give a little probability to all tokens."""

    columns = ("input_ids", "labels")
    is_model_loss = False

    def __init__(self, config: Any) -> None:
        self.smoothing = config.options.get("smoothing", 0.1)
        self.batches = 0

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    def prepare(self, *, compiled: bool) -> None: ...

    def loss_on_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any) -> Tensor:
        return self.loss_on_logits(hidden @ weight.t(), labels, count)

    def loss_on_logits(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        self.batches += 1
        flat, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        total = cross_entropy(flat, targets, reduction="sum", label_smoothing=self.smoothing)
        return total / (count if count is not None else (targets != -100).sum())

    def metrics(self) -> dict[str, float]:
        batches, self.batches = self.batches, 0
        return {"smoothed_batches": float(batches)}

    def activation_bytes(self, work: Any) -> tuple[float, float]:
        logits = work.tokens * work.vocabulary
        return logits * (work.width + 8), logits * 12
