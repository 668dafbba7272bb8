"""The forward passes that a loss over whole answers asks a step for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.step.hidden_states import hidden_states
from qlora.step.kernels.shared_prompts import NAMES, to_cells
from qlora.step.part import Packs
from qlora.step.parts.attention import FusedAttention
from qlora.step.parts.loss import FusedLoss
from qlora.step.reference import ReferenceWeights

HEAD = "score"
"""The name of a head in the model."""


def outputs_of_head(base: torch.nn.Module, hidden: Tensor, *, bf16: bool = False) -> Tensor:
    """Returns what the head of a model makes of hidden states [..., width], float32 [..., outputs].

    It multiplies in 32 bits, or in 16 as plain models of that precision do; its weights have 32.
    """
    head = base.get_submodule(HEAD)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=bf16):
        outputs: Tensor = head(hidden.bfloat16() if bf16 else hidden.float())
    return outputs.float()


class ForwardPasses:
    """Passes of a model through the parts of its step; a batch has `input_ids` and `labels`, both [rows, tokens]."""

    def __init__(
        self,
        base: PreTrainedModel,
        attention: FusedAttention | None,
        loss: FusedLoss | None,
        reference: ReferenceWeights | None,
        measure_weights: Callable[[], None],
        packs: Packs | None,
    ) -> None:
        """Takes the parts that are on, and what measures the trained weights anew where a part needs that."""
        self.base, self._attention, self._loss, self._reference = base, attention, loss, reference
        self._measure_weights = measure_weights
        self.packs = packs
        """The limits of the packs in the data set; None: rows are not packed."""
        self.targets: int | None = None
        """The number of labels in the batch, or more; None: it is not known."""

    @property
    def sides(self) -> int:
        """The most sides of pairs in a pack; a row whose answers share their prompt is a pack of one pair."""
        return 2 if self.packs is None else self.packs.rows

    def operands(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Returns hidden states [rows, tokens, width] and the output matrix; None where `trainer.fused_loss` is off."""
        if self._loss is None:
            return None
        return self._loss.operands(self.hidden_states(batch))

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Returns logits [rows, tokens, vocabulary]."""
        batch = self._laid_out(batch)
        return _in_cells(type(self.base).forward(self.base, use_cache=False, **batch).logits, batch)

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """Returns the last hidden states [rows, tokens, width]."""
        batch = self._laid_out(batch)
        return _in_cells(hidden_states(self.base, batch), batch)

    def head_outputs(self, batch: dict[str, Any], last: Tensor, *, bf16: bool = False) -> Tensor:
        """Returns what the head makes of the tokens `last` int64 [rows, ends], float32 [rows, ends, outputs]."""
        hidden = self.hidden_states(batch).view(*batch["input_ids"].shape, -1)  # it may be laid out as one row
        rows = torch.arange(len(last), device=hidden.device)[:, None]
        return outputs_of_head(self.base, hidden[rows, last], bf16=bf16)

    def reference(self) -> contextlib.AbstractContextManager[None] | None:
        """Returns the context in which the model is the reference; None: there is none."""
        return None if self._reference is None else self._as_reference(self._reference)

    @contextlib.contextmanager
    def _as_reference(self, reference: ReferenceWeights) -> Iterator[None]:
        with reference.active():
            self._measure_weights()
            yield
        self._measure_weights()

    def _laid_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = batch if self._attention is None else self._attention.lay_out(batch, self.packs)
        return {name: value for name, value in batch.items() if name not in ("labels", *NAMES)}


def _in_cells(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Returns what was computed of each token where it stands in the rows of a batch that is laid out."""
    return values if (shared_rows := batch.get("shared_rows")) is None else to_cells(values[0], shared_rows)[None]
