"""Losses of what a head says of whole texts: what they have in common.

A head is a linear layer without a bias on the hidden state of a text's last token, as in transformers' models for
sequence classification. `classify.py` and `regress.py` make a loss of its outputs, `reward.py` one of two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import SHIPPED
from qlora.config.schema import HeadConfig, LossConfig
from qlora.objectives.protocol import IGNORED, TRUTH, TokenWork
from qlora.objectives.row_loss import RowLoss

if TYPE_CHECKING:
    from torch import Tensor


class HeadLoss(RowLoss):
    """An objective over whole texts; a loss of its own writes `rows`, `losses` and the methods behind it."""

    columns: tuple[str, ...]

    def __init__(self, config: LossConfig, head: HeadConfig) -> None:
        super().__init__(config)
        self.head = head

    @property
    def constant_name(self) -> str:
        """What it is called to say the same of all texts; empty: the untuned base says something by itself."""
        return SHIPPED[self.config.name].constant

    def losses(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Returns the loss of each text, float32 [rows]; `outputs` are those of the head, float32 [rows, outputs]."""
        raise NotImplementedError

    def measures(self, outputs: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Returns what is logged of each text beside its loss, by name: float [rows]."""
        raise NotImplementedError

    def statistics(self, outputs: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns what measures of all rows together compare, by their names: what is said and what is true."""
        return {}

    def constant(self, truth: Tensor, classes: int) -> Tensor:
        """Returns the outputs, the same for all rows, that fit what is true of them best; float32 [rows, outputs]."""
        raise NotImplementedError

    def describe(self, outputs: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Returns what is said of each text, for people and programs: `prediction`, and maybe more."""
        raise NotImplementedError

    def describe_truth(self, truth: Tensor, labels: Sequence[str]) -> list[str | None]:
        """Returns what is true of each text, as `describe` writes a prediction; None: nothing is."""
        raise NotImplementedError

    def outputs(self, batch: Mapping[str, Any], passes: Any) -> Tensor:
        """Returns what the head makes of the texts of a batch, float32 [rows, outputs]."""
        texts = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        last = last_token(texts["attention_mask"].bool())
        return passes.head_outputs(texts, last[:, None], bf16=self.head.computes_bf16)[:, 0]

    def loss_on_batch(self, batch: dict[str, Any], passes: Any) -> Tensor:
        """Returns the mean loss of the texts that count."""
        import torch

        count, truth = batch.pop("num_items_in_batch", None), batch[TRUTH]
        counts = (batch["labels"] != IGNORED).flatten(1).any(1)
        outputs = self.outputs(batch, passes)
        rows = counts.sum().clamp(min=1) if count is None else count[0]
        with torch.no_grad():
            self.note(self.measures(outputs, truth), counts)
        return torch.where(counts, self.losses(outputs, truth), 0).sum() / rows

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns which rows count, twice."""
        counts = (batch["labels"] != IGNORED).flatten(1).any(1).float()
        return counts[:, None].expand(-1, 2)

    def prepare(self, *, compiled: bool) -> None:
        """Prepares nothing: a head is one small matrix."""

    def activation_bytes(self, work: TokenWork) -> tuple[float, float]:
        """Returns the gradient of the hidden states, of which a few tokens have one: no logits are computed."""
        return 0, work.tokens * work.hidden * work.width


def last_token(is_in: Tensor) -> Tensor:
    """Returns the last token of each row, int64 [..., rows]; `is_in` [..., rows, tokens] says which are in it."""
    import torch

    return torch.where(is_in, torch.arange(is_in.shape[-1], device=is_in.device), 0).amax(-1)
