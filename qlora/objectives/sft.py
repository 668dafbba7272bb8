"""Supervised finetuning: the mean cross entropy of the tokens that have a label.

Every such token of an optimizer step weighs the same, whichever row, micro-batch or process it is in.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.config.schema import LossConfig
from qlora.objectives.protocol import IGNORED, RowKind, TokenWork, entropy_bytes

if TYPE_CHECKING:
    from torch import Tensor


class SupervisedFinetuning:
    """The objective `sft`."""

    rows = RowKind.tokens
    columns = ("input_ids", "labels")
    is_model_loss = True
    is_tokenwise = True
    takes_transform = True

    def __init__(self, config: LossConfig, label_smoothing: float = 0.0) -> None:
        """Takes the config, and the share of each label's probability that is spread over all tokens."""
        self.config, self.label_smoothing = config, label_smoothing
        self.is_model_loss = not label_smoothing

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the labels that the data pipeline has set."""
        return batch["labels"]

    def prepare(self, *, compiled: bool, scale: float = 1.0, cap: float | None = None) -> None:
        """Compiles the loss of a chunk with the decoder layers."""
        import torch

        from qlora.objectives.linear_cross_entropy import entropy_and_gradient, linear_cross_entropy

        self._linear_cross_entropy = linear_cross_entropy
        chunk_loss = partial(entropy_and_gradient, smoothing=self.label_smoothing, scale=scale, cap=cap)
        self._chunk_loss = torch.compile(chunk_loss) if compiled else chunk_loss

    def loss_on_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Returns the loss, chunk by chunk."""
        targets = next_tokens(labels).reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        total = self._linear_cross_entropy(hidden, weight, targets, self._chunk_loss)
        return total / (count if count is not None else (targets != IGNORED).sum())

    def loss_on_logits(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Returns the loss as transformers' models compute it, with smoothed labels where they are asked for."""
        if self.label_smoothing:
            return self._smoothed(logits, labels, count)
        from transformers.loss.loss_utils import ForCausalLMLoss

        loss: Tensor = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=count)
        return loss

    def _smoothed(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        from torch.nn.functional import cross_entropy

        targets = next_tokens(labels).reshape(-1).to(logits.device)
        flat = logits.reshape(-1, logits.shape[-1]).float()
        total = cross_entropy(flat, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return total / (count if count is not None else (targets != IGNORED).sum())

    def metrics(self) -> dict[str, float]:
        """Returns nothing: the loss says it all."""
        return {}

    def activation_bytes(self, work: TokenWork) -> tuple[float, float]:
        """Returns the bytes of logits, their gradients and what the softmax keeps."""
        return entropy_bytes(work)


def next_tokens(labels: Tensor) -> Tensor:
    """Returns what each token is to predict: the label of the token after it, and -100 at the end of a row."""
    import torch

    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
