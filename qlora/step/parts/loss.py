"""The loss without the logits of all tokens: the objective computes it from the hidden states and the output matrix.

Where each token's loss is its own (`is_tokenwise`), the objective gets the hidden states before a label alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.step.hidden_states import hidden_states
from qlora.step.logit_transform import PLAIN, LogitTransform, find_transform
from qlora.step.part import IGNORED, SPREAD, ConfiguredPart, Request, StepContext

BUCKET = 256
"""The number of hidden states that are kept is a multiple of it: compiled code meets few shapes."""


class FusedLoss(ConfiguredPart):
    """The part that hands the objective hidden states instead of logits."""

    label = "fused_loss"

    def __init__(self, context: StepContext) -> None:
        self.context, self.base = context, context.base
        self.transform: LogitTransform = PLAIN

    def request(self) -> Request:
        """Returns what `trainer.fused_loss` asks for."""
        return Request.of_switch(self.context.trainer, "fused_loss")

    def unsupported_reason(self) -> str | None:
        """Returns why the logits of all tokens are needed."""
        if self.context.is_spread:
            return SPREAD
        settings = self.base.config.get_text_config()
        if (output := self.base.get_output_embeddings()) is None or type(output) is not torch.nn.Linear:
            return "the output layer is not a plain torch.nn.Linear, or it is trained"
        if output.bias is not None or output.weight.requires_grad:
            return "the output layer is trained, or has a bias"
        if (transform := find_transform(self.base)) is None:
            return f"{settings.model_type} computes its logits in a way of its own"
        if transform != PLAIN and not getattr(self.context.objective, "takes_transform", False):
            return f"{settings.model_type} scales or caps its logits, which the objective does not compute"
        self.transform = transform
        return None

    @property
    def transform_options(self) -> dict[str, Any]:
        """What the objective's `prepare` is told of the model's logits."""
        return {} if self.transform == PLAIN else {"scale": self.transform.scale, "cap": self.transform.cap}

    def loss(self, batch: dict[str, Any], targets: int | None) -> Tensor:
        """Returns the loss of a batch with at most `targets` labels that count; None: their number is not known."""
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch", None)
        hidden = hidden_states(self.base, batch)
        if labels.shape[1] > hidden.shape[1]:  # of a shared row, whose last token may have a label
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
        if targets is not None and getattr(self.context.objective, "is_tokenwise", False):
            hidden, labels = before_labels(hidden, labels, targets)
        hidden, weight = self.operands(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.context.objective.loss_on_hidden(hidden, weight, labels, count)

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states and the output matrix [vocabulary, width] in the dtype in which they are multiplied."""
        weight = self.base.get_output_embeddings().weight
        kind = hidden.device.type
        # As autocast computes any other linear layer: the matrix may be stored in 32 bits.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return hidden.to(dtype), weight.to(dtype)


def before_labels(hidden: Tensor, labels: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """Returns the hidden states whose next token has a label, and those labels, as one row of a batch.

    `hidden` is [rows, tokens, width], `labels` [rows, tokens] with at most `targets` labels that count. The number of
    tokens in the row follows from `targets` alone, so that nothing waits for the device; what is left of the row has no
    labels. Where the row would be as long as the batch, both are returned as they are.
    """
    tokens, size = labels.numel(), BUCKET * (targets // BUCKET + 1)  # at least one more, for the row's first label
    if size >= tokens:
        return hidden, labels
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    kept = torch.nonzero_static(following != IGNORED, size=size, fill_value=tokens - 1).view(-1)
    row = hidden.reshape(tokens, -1).index_select(0, kept)[None]
    # The label of a token stands at the token after it; the last token of a batch has none.
    return row, torch.nn.functional.pad(following[kept[:-1]], (1, 0), value=IGNORED)[None]
