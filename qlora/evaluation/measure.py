"""Measures a model on held-out rows: loss, perplexity, generated answers and their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora.evaluation.generation import generate
from qlora.evaluation.loss import Collate, measure_loss
from qlora.evaluation.metrics import Metric
from qlora.schema import GenerationConfig


@dataclass(frozen=True)
class Measurement:
    """What was measured: `metrics` by plain name (`loss`, `exact_match`), and the answers behind them."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Measurer:
    """Measures any model on the same rows in the same way: before, during and after training."""

    rows: Sequence[dict[str, Any]]
    collate: Collate
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    metrics: dict[str, Metric]
    pad_token_id: int
    batch_size: int
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[None]]

    def measure(self, model: torch.nn.Module, *, answers: int | None) -> Measurement:
        """Returns loss and perplexity of all rows, and the metrics of answers to the first `answers` rows.

        `answers=None` answers all rows, 0 none.
        """
        with evaluation_mode(model), self.autocast():
            metrics = measure_loss(
                model, self.rows, collate=self.collate, batch_size=self.batch_size, device=self.device
            )
        predictions = (
            self.predict(model, self.rows[:answers] if answers is not None else self.rows) if answers != 0 else []
        )
        if predictions:
            metrics |= self.score(predictions)
        return Measurement(metrics, predictions)

    def score(self, predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Returns the metrics of records that `predict` made."""
        texts, references = [row["prediction"] for row in predictions], [row["reference"] for row in predictions]
        return {name: float(metric(texts, references)) for name, metric in self.metrics.items()}

    def predict(
        self, model: torch.nn.Module, rows: Sequence[dict[str, Any]], on_progress: Callable[[int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Returns a record for each row: prompt, prediction, reference, finish reason and token counts."""
        prompts = [row["prompt_ids"] for row in rows]
        with evaluation_mode(model), self.autocast():
            answers = generate(
                self.generation,
                model,
                self.tokenizer,
                prompts=prompts,
                pad_token_id=self.pad_token_id,
                device=self.device,
                on_progress=on_progress,
            )
        return [
            {
                "prompt": row["prompt"],
                "prediction": answer.text,
                "reference": row["reference"],
                "finish": answer.finish,
                "prompt_tokens": len(row["prompt_ids"]),
                "answer_tokens": answer.tokens,
                **({"task": row["task"]} if row.get("task") else {}),
            }
            for row, answer in zip(rows, answers, strict=True)
        ]


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and back to what was; gradient checkpointing rests outside of training by itself."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
