"""Measures a model on held-out rows: loss, perplexity, generated answers and their metrics."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from qlora.config.schema import GenerationConfig
from qlora.errors import DataError
from qlora.evaluation.generation import (
    Answer,
    AnswerReader,
    end_token_ids,
    generate,
    plan_batches,
    prompt_lengths,
)
from qlora.evaluation.metrics import Metric
from qlora.evaluation.row_loss import Collate, measure_loss
from qlora.evaluation.row_statistics import RowStatistic
from qlora.evaluation.statistics import Estimate, Score
from qlora.generation.answering import Slots, answer_batches
from qlora.runtime import console

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What was measured, by plain names such as `loss` and `exact_match`."""

    metrics: dict[str, float] = field(default_factory=dict)
    scores: Mapping[str, Score | RowStatistic] = field(default_factory=dict)
    """What each item earned, of the metrics that are means over items: for intervals and paired differences."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """The answers behind the metrics, as `Measurer.predict` returns them."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """A suite's record of each of its items."""

    def __or__(self, other: Measurement) -> Measurement:
        return Measurement(
            self.metrics | other.metrics,
            {**self.scores, **other.scores},
            [*self.predictions, *other.predictions],
            [*self.records, *other.records],
        )

    def intervals(self) -> dict[str, list[float]]:
        """Returns the ends of the 95 % interval of every mean over items."""
        return {name: list(score.estimate()[1:]) for name, score in self.scores.items()}

    def gains(self, base: Measurement) -> dict[str, Estimate]:
        """Returns the paired difference to `base` of every mean over items that both measured."""
        return {
            name: score.gain(base.scores[name])  # type: ignore[arg-type] # of one name, so of one kind
            for name, score in self.scores.items()
            if name in base.scores and len(base.scores[name].values) == len(score.values)
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns metrics and scores in JSON's types, for `from_dict`."""
        return {"metrics": self.metrics, "scores": {name: score.to_dict() for name, score in self.scores.items()}}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Measurement:
        """Returns the measurement that `to_dict` wrote."""
        return cls(saved["metrics"], {name: _read_score(score) for name, score in saved["scores"].items()})


def _read_score(saved: dict[str, Any]) -> Score | RowStatistic:
    return RowStatistic.from_dict(saved) if "statistic" in saved else Score.from_dict(saved)


class Suite(Protocol):
    """A test of its own, apart from the held-out rows: MMLU, or the tasks of lm-eval."""

    at_each_evaluation: bool
    """Whether it is cheap enough to run at every evaluation during training."""

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measures a model that is in evaluation mode, under autocast."""


class Answered(NamedTuple):
    """A batch of rows with their answers."""

    rows: np.ndarray
    """Indices of the rows."""
    answers: list[Answer]
    seconds: float


@dataclass(frozen=True)
class Measurer:
    """Measures any model on the same rows in the same way: before, during and after training.

    The rows stay on disk but for those of a batch.
    """

    rows: Dataset
    collate: Collate
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    metrics: dict[str, Metric]
    pad_token_id: int
    batch_size: int
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[None]]
    seed: int = 0
    """What sampled answers are drawn from, with the number of their row."""
    dtype: torch.dtype = torch.float32
    """What the model computes in."""
    compare: Callable[[torch.nn.Module], Measurement] | None = None
    """Measures what a loss over answers asks for besides; None: the loss is one over tokens."""
    reads_tokens: bool = True
    """Whether the next tokens of rows are measured; not those of whole texts, which `compare` measures alone."""

    def measure(self, model: torch.nn.Module, *, answers: int | None) -> Measurement:
        """Returns loss and perplexity of all rows, what the training objective compares in them, and the metrics of
        answers to the first `answers` rows.

        `answers=None` answers all rows, 0 none.
        """
        with evaluation_mode(model), self.autocast():
            measured = Measurement(self._measure_tokens(model) if self.reads_tokens else {})
            if self.compare is not None:
                measured |= self.compare(model)
        if answers == 0:
            return measured
        predictions = self.predict(model, answers)
        return measured | Measurement(predictions=predictions) | self.score(predictions)

    def _measure_tokens(self, model: torch.nn.Module) -> dict[str, float]:
        return measure_loss(
            model, self._good_rows, collate=self.collate, batch_size=self.batch_size, device=self.device
        )

    def predict(self, model: torch.nn.Module, count: int | None) -> list[dict[str, Any]]:
        """Returns a record for each of the first `count` rows, or of all (None), in their order."""
        rows = self.rows if count is None else self.rows.select(range(min(count, len(self.rows))))
        batches = dict(enumerate(plan_batches(prompt_lengths(rows), self.generation.rows)))
        answers: dict[int, Answer] = {}
        with console.progress("answering", len(rows)) as update:
            for batch in self.answer(model, rows, batches):
                answers.update(zip(batch.rows.tolist(), batch.answers, strict=True))
                update(len(answers))
        return list(self.records(rows, (answers[index] for index in range(len(rows)))))

    @property
    def _good_rows(self) -> Dataset:
        """The rows without those whose answer is a bad one, unless all are."""
        if "desirable" not in self.rows.column_names:
            return self.rows
        good = np.flatnonzero(self.rows.with_format("numpy", columns=["desirable"])[:]["desirable"])
        return self.rows.select(good) if len(good) else self.rows

    @property
    def unanswered(self) -> int:
        """How many rows ask and hold no answer."""
        column = self.rows.select_columns("reference").with_format("arrow")
        return sum(part["reference"].null_count for part in column.iter(batch_size=1000))

    def answer(self, model: torch.nn.Module, rows: Dataset, batches: Mapping[int, np.ndarray]) -> Iterator[Answered]:
        """Yields the answers to batches of rows, given by their numbers, each as soon as all of its rows have ended."""
        slots = Slots(self.generation, self.device, self.dtype, self.autocast)
        with evaluation_mode(model):
            reason = slots.unsupported_reason(model)
        if reason is None:
            yield from self._answer_in_slots(slots, model, rows, batches)
            return
        log.info("answers by transformers' own loop: %s", reason)
        prompts = rows.select_columns("prompt_ids")
        for number, indices in batches.items():
            started = time.monotonic()
            with evaluation_mode(model), self.autocast(), seeded(self.seed, number, device=self.device):
                answers = generate(
                    self.generation,
                    model,
                    self.tokenizer,
                    prompts=prompts[indices]["prompt_ids"],
                    pad_token_id=self.pad_token_id,
                    device=self.device,
                )
            yield Answered(indices, answers, time.monotonic() - started)

    def _answer_in_slots(
        self, slots: Slots, model: torch.nn.Module, rows: Dataset, batches: Mapping[int, np.ndarray]
    ) -> Iterator[Answered]:
        prompts = rows.select_columns("prompt_ids")
        end_ids = end_token_ids(model, self.tokenizer)
        to_answer = AnswerReader(self.tokenizer, end_ids)
        asked = ((number, indices.tolist(), prompts[indices]["prompt_ids"]) for number, indices in batches.items())
        length = int(prompt_lengths(rows).max(initial=0)) + self.generation.new_tokens
        with evaluation_mode(model):
            answered = answer_batches(slots, model, asked, end_ids=end_ids, seed=self.seed, length=length)
            for number, answers, seconds in answered:
                yield Answered(batches[number], [to_answer(ids) for ids in answers], seconds)

    def records(self, rows: Dataset, answers: Iterable[Answer]) -> Iterator[dict[str, Any]]:
        """Yields the records of `predictions.jsonl`, one for each row and its answer."""
        columns = [name for name in ("prompt", "prompt_ids", "reference", "task") if name in rows.column_names]
        for row, answer in zip(rows.select_columns(columns), answers, strict=True):
            yield {
                "input": row["prompt"],
                "prompt": self.tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False),
                "prediction": answer.text,
                "reference": row["reference"],
                "finish": answer.finish,
                "prompt_tokens": len(row["prompt_ids"]),
                "answer_tokens": answer.tokens,
                **({"task": row["task"]} if row.get("task") else {}),
            }

    def score(self, records: Iterable[dict[str, Any]]) -> Measurement:
        """Returns the metrics of records that hold an answer to compare with."""
        if not self.metrics:
            return Measurement()
        pairs = [(record["prediction"], record["reference"]) for record in records if record["reference"] is not None]
        if not pairs:
            return Measurement()
        predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        measured = Measurement()
        for name, metric in self.metrics.items():
            measured |= read_result(name, metric(predictions, references), len(pairs))
        return measured


def read_result(name: str, result: Any, rows: int) -> Measurement:
    """Returns what a metric function gave of `rows` answers as a measurement.

    It may be a number, one number per row, whose mean is measured, or a mapping: its numbers are called `NAME_KEY`.
    Raises `DataError` for anything else.
    """
    if isinstance(result, Mapping):
        return Measurement({f"{name}_{key}": float(value) for key, value in result.items() if _is_number(value)})
    if _is_number(result):
        return Measurement({name: float(result)})
    try:
        score = Score([float(value) for value in result])
    except (TypeError, ValueError):
        score = None
    if score is None or len(score.values) != rows:
        given = f"{len(score.values)} numbers" if score else f"a {type(result).__name__}"
        raise DataError(
            f"evaluation.metrics: {name} must return a number, or one for each of the {rows} answers, got {given}"
        )
    return Measurement({name: score.estimate().value}, {name: score})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and back to what was; gradient checkpointing rests outside of training by itself."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def seeded(*seed: int, device: torch.device) -> Iterator[None]:
    """Draws random numbers from `seed` inside the block, and leaves none of that behind."""
    with random_state_kept(device):
        set_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        yield


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restores the state of the random number generators after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = device.type if device.type != "cpu" else "cuda"
    try:
        with torch.random.fork_rng(range(getattr(torch, kind).device_count()), device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
