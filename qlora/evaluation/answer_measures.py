"""What held-out rows of preference say of a model: rewards, their margins, the distance to the reference, lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from qlora.evaluation.head_measures import PlainPasses
from qlora.evaluation.measure import Measurement
from qlora.evaluation.row_loss import Collate
from qlora.evaluation.statistics import Score
from qlora.objectives.answers import AnswerLoss, Answers
from qlora.objectives.protocol import IGNORED
from qlora.objectives.reward import RewardModel, rewarded
from qlora.runtime import console

Reference = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class AnswerMeasurer:
    """Measures any model on the same rows of preference, as the loss sees them."""

    rows: Dataset
    collate: Collate
    loss: AnswerLoss
    reference: Callable[[], Reference | None]
    """Returns the context in which the model is its reference; None: there is no reference."""
    batch_size: int
    device: torch.device

    @torch.inference_mode()
    def measure(self, model: torch.nn.Module) -> Measurement:
        """Returns the means over rows with what each row gave; the caller sets autocast and evaluation mode."""
        columns = [name for name in self.loss.columns if name in self.rows.column_names]
        rows, order = self.rows.select_columns(columns), np.argsort(-np.asarray(self.rows["length"]), kind="stable")
        parts: list[dict[str, Tensor]] = []
        with console.progress("comparing", len(order)) as update:
            for start in range(0, len(order), self.batch_size):
                cells = rows[order[start : start + self.batch_size]]
                batch = self.collate([dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)])
                parts.append(self._measure(model, {name: tensor.to(self.device) for name, tensor in batch.items()}))
                update(min(start + self.batch_size, len(order)))
        back, scores = np.argsort(order, kind="stable"), {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).double().cpu().numpy()[back]
            scores[name] = Score(values.tolist(), may_be_share=name == "reward_accuracy")
        return Measurement({name: float(np.mean(score.values)) for name, score in scores.items()}, scores)

    def _measure(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch.pop("labels")
        if isinstance(self.loss, RewardModel):
            return self._measure_rewards(model, batch, labels)
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        texts = {name: value.flatten(0, 1) for name, value in batch.items() if name not in rest}
        targets = labels[..., 1:].flatten(0, 1)
        read = targets != IGNORED
        log_probs = _log_probs(model, texts, read)
        reference, active = None, self.reference()
        if active is not None:
            with active():
                reference = _log_probs(model, texts, read)
        chosen = targets[read][:, None]

        def summed(values: Tensor) -> Tensor:
            return (
                torch.zeros(read.shape, device=read.device).masked_scatter(read, values).sum(1).view(labels.shape[:2])
            )

        sums, tokens = summed(log_probs.gather(1, chosen)), read.sum(1).view(labels.shape[:2])
        of_reference = torch.zeros_like(sums) if reference is None else summed(reference.gather(1, chosen))
        answers = Answers(sums, tokens, of_reference, sums, tokens, rest)
        measured = {"preference_loss": self.loss.losses(answers), **self.loss.measures(answers)}
        sides = self.loss.graded_sides or labels.shape[1]
        if reference is not None:
            divergence = summed((log_probs.exp() * (log_probs - reference)).sum(1))
            measured["reference_kl"] = divergence[:, :sides].sum(1) / tokens[:, :sides].sum(1)
        return measured | _lengths(tokens[:, :sides])

    def _measure_rewards(self, model: torch.nn.Module, batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        texts = {name: value.flatten(0, 1) for name, value in batch.items()}
        assert isinstance(self.loss, RewardModel)
        rewards = self.loss.text_rewards(texts, PlainPasses(model))
        answers = rewarded(rewards.view(labels.shape[:2]), labels)
        return {"preference_loss": self.loss.losses(answers), **self.loss.measures(answers), **_lengths(answers.tokens)}


def _lengths(tokens: Tensor) -> dict[str, Tensor]:
    names = ("chosen_tokens", "rejected_tokens") if tokens.shape[1] > 1 else ("answer_tokens",)
    return {name: tokens[:, side].float() for side, name in enumerate(names)}


def _log_probs(model: torch.nn.Module, texts: dict[str, Tensor], read: Tensor) -> Tensor:
    """Returns the log-probabilities of all tokens at the places that are read, float32 [places, vocabulary]."""
    logits = model(**texts, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits[read.to(logits.device)].float(), 1).to(read.device)
