"""What held-out texts say of a head: its loss, what its objective measures, and what it says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from qlora.evaluation.measure import Measurement
from qlora.evaluation.row_loss import Collate
from qlora.evaluation.row_statistics import RowStatistic
from qlora.evaluation.statistics import Score
from qlora.objectives.head_loss import HeadLoss
from qlora.objectives.protocol import TRUTH
from qlora.runtime import console
from qlora.step.forward_passes import outputs_of_head
from qlora.upstream.peft import base_of


class PlainPasses:
    """The forward passes of a model as it is outside of training steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.base: Any = base_of(model) if isinstance(model, PeftModel) else model

    def hidden_states(self, texts: dict[str, Tensor]) -> Tensor:
        """Returns the last hidden states [rows, tokens, width]."""
        inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
        hidden: Tensor = self.base.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def head_outputs(self, texts: dict[str, Tensor], last: Tensor, *, bf16: bool = False) -> Tensor:
        """Returns what the head makes of the tokens `last` int64 [rows, ends], float32 [rows, ends, outputs]."""
        hidden = self.hidden_states(texts)
        rows = torch.arange(len(last), device=hidden.device)[:, None]
        return outputs_of_head(self.base, hidden[rows, last], bf16=bf16)


@dataclass(frozen=True)
class HeadMeasurer:
    """Measures any model with a head on the same texts."""

    rows: Dataset
    collate: Collate
    loss: HeadLoss
    labels: Sequence[str]
    """The classes, in the order of the outputs; empty: there are none."""
    batch_size: int
    device: torch.device

    @torch.inference_mode()
    def measure(self, model: torch.nn.Module) -> Measurement:
        """Returns the measures, and what was said of each text; the caller sets autocast and evaluation mode."""
        passes = PlainPasses(model)
        outputs, truth = self._read(lambda batch: self.loss.outputs(batch, passes))
        measured = self._measurement(outputs, truth)
        said = zip(self.loss.describe(outputs, self.labels), self.loss.describe_truth(truth, self.labels), strict=True)
        texts = self.rows.select_columns("prompt")["prompt"]
        records = [
            {"input": text, "prompt": text, **answer, "reference": reference}
            for text, (answer, reference) in zip(texts, said, strict=True)
        ]
        return measured | Measurement(predictions=records)

    def measure_constant(self) -> Measurement:
        """Returns the measures of saying the same of all texts: what is said best of these."""
        _, truth = self._read(lambda batch: batch[TRUTH])
        return self._measurement(self.loss.constant(truth, len(self.labels)), truth)

    def _read(self, outputs_of: Any) -> tuple[Tensor, Tensor]:
        """Returns what is said of all texts and what is true of them, in their order, on the host."""
        columns = [name for name in self.loss.columns if name in self.rows.column_names]
        rows, order = self.rows.select_columns(columns), np.argsort(-np.asarray(self.rows["length"]), kind="stable")
        outputs, truth = list[Tensor](), list[Tensor]()
        with console.progress("measuring", len(order)) as update:
            for start in range(0, len(order), self.batch_size):
                cells = rows[order[start : start + self.batch_size]]
                batch = self.collate([dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)])
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                outputs.append(outputs_of(batch).cpu())
                truth.append(batch[TRUTH].cpu())
                update(min(start + self.batch_size, len(order)))
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        return torch.cat(outputs)[back], torch.cat(truth)[back]

    def _measurement(self, outputs: Tensor, truth: Tensor) -> Measurement:
        rows = {"loss": self.loss.losses(outputs, truth), **self.loss.measures(outputs, truth)}
        scores: dict[str, Score | RowStatistic] = {
            name: Score(values.double().tolist(), may_be_share=name == "accuracy") for name, values in rows.items()
        }
        for name, (said, true) in self.loss.statistics(outputs, truth).items():
            scores[name] = RowStatistic(name, said.tolist(), true.tolist())
        return Measurement({name: score.estimate().value for name, score in scores.items()}, scores)
