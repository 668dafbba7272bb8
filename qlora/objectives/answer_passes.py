"""The log-probabilities of answers: a pass with the reference, and a pass with the trained weights.

They are summed from the hidden states before an answer's tokens, in chunks, where the step has these; else from logits.
Both passes see the same batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora.objectives.answers import Answers, sides_of
from qlora.objectives.linear_cross_entropy import entropies_and_gradient, linear_entropies
from qlora.objectives.protocol import IGNORED, REFERENCE, SHARED_ROWS

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", *SHARED_ROWS)
"""The columns of a batch that the step reads; the others are the loss's."""
BUCKET = 256
"""The number of hidden states that are read is a multiple of it: compiled code meets few shapes."""


class Passes(Protocol):
    """The forward passes of a model; a batch has `input_ids` and `labels` [rows, tokens], and maybe a mask."""

    targets: int | None
    """The number of labels in the batch, or more; None: it is not known."""

    @property
    def sides(self) -> int:
        """The most sides of pairs in a pack."""

    def operands(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Returns hidden states [rows, tokens, width] and the output matrix [vocabulary, width]; None: only logits."""

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Returns logits [rows, tokens, vocabulary]."""

    def reference(self) -> contextlib.AbstractContextManager[None] | None:
        """Returns the context in which the model is the reference; None: there is none."""


def read_answers(
    batch: dict[str, Any],
    passes: Passes,
    *,
    reads_prompt: bool = False,
    graded_sides: int | None = None,
    chunk_losses: Callable[..., Any] = entropies_and_gradient,
) -> Answers:
    """Returns what the model says of a batch whose `input_ids` and `labels` are [rows, sides, tokens], or of packs.

    A batch with the column `REFERENCE` has no pass of the reference.
    `reads_prompt` and `graded_sides` are those of the `AnswerLoss`; `chunk_losses` computes a chunk's cross entropy.
    """
    texts = _texts(batch)
    rest = {name: value for name, value in batch.items() if name not in (*texts, "labels", REFERENCE)}
    targets = read = _next(batch["labels"])
    most, compute = passes.targets, partial(_log_probs, passes, chunk_losses)
    summed = _Sums(texts.get("position_ids"), passes.sides)
    if reads_prompt:
        read = _next(summed.text_tokens(texts))
    if (saved := batch.get(REFERENCE)) is not None:
        reference = summed.of_sides(saved)
    elif (active := passes.reference()) is not None:
        with torch.no_grad(), active:
            reference = summed(compute(texts, targets, most))
    else:
        reference = torch.zeros_like(summed(targets), dtype=torch.float32)
    log_probs = _graded(compute, texts, read, None if reads_prompt else most, graded_sides)
    return Answers(
        summed(torch.where(targets != IGNORED, log_probs, 0)),
        summed((targets != IGNORED).long()),
        reference,
        summed(log_probs),
        summed((read != IGNORED).long()),
        rest,
    )


def read_reference(
    batch: dict[str, Any], passes: Passes, *, chunk_losses: Callable[..., Any] = entropies_and_gradient
) -> Tensor:
    """Returns what the reference says of a batch as `Answers.reference` holds it; the batch has a reference."""
    summed, active = _Sums(batch.get("position_ids"), passes.sides), passes.reference()
    assert active is not None, "a loss that compares has a reference"
    with torch.no_grad(), active:
        return summed(_log_probs(passes, chunk_losses, _texts(batch), _next(batch["labels"]), passes.targets))


def _texts(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


class _Sums:
    """Sums over the tokens of each answer: of rows [rows, sides, tokens], or of packs of pairs [packs, tokens]."""

    def __init__(self, positions: Tensor | None, sides: int) -> None:
        """Takes the `position_ids` of packs, and the most sides that one holds."""
        self.is_in: Tensor | None = None
        if positions is not None:
            self.is_in = sides_of(positions, sides)
        self.positions, self.sides = positions, sides

    def __call__(self, values: Tensor) -> Tensor:
        """Returns [rows, sides]; padding is a side without tokens."""
        if self.is_in is None:
            return values.sum(-1)
        # The token after one may be in the next side: that one has no target, so its value is 0.
        return torch.where(self.is_in, values[:, None], 0).sum(-1).view(-1, 2)

    def of_sides(self, values: Tensor) -> Tensor:
        """Returns the values of the sides of rows [rows, sides], or of packs [packs, sides], as `__call__` does."""
        if self.is_in is None:
            return values
        return torch.nn.functional.pad(values, (0, self.sides - values.shape[1])).view(-1, 2)

    def text_tokens(self, texts: dict[str, Tensor]) -> Tensor:
        """Returns the tokens of prompts and answers as labels, with -100 for padding and the first of each side."""
        if self.positions is None:
            return texts["input_ids"].masked_fill(texts["attention_mask"] == 0, IGNORED)
        return texts["input_ids"].masked_fill(self.positions == 0, IGNORED)


def _graded(
    compute: Callable[..., Tensor], texts: dict[str, Tensor], targets: Tensor, most: int | None, sides: int | None
) -> Tensor:
    """Returns the log-probabilities of all sides; the gradient follows the first `sides`, or all."""
    if sides is None:
        return compute(texts, targets, most)
    with torch.no_grad():
        rest = compute({name: value[:, sides:] for name, value in texts.items()}, targets[:, sides:], most)
    graded = compute({name: value[:, :sides] for name, value in texts.items()}, targets[:, :sides], most)
    return torch.cat([graded, rest], 1)


def _log_probs(
    passes: Passes, chunk_losses: Callable[..., Any], texts: dict[str, Tensor], targets: Tensor, most: int | None
) -> Tensor:
    """Returns the log-probability of the token after each, float32 like `targets`; 0 where it has no target."""
    flat = targets.reshape(-1)

    def batch() -> dict[str, Any]:
        named = {**texts, "labels": targets}
        return named if targets.dim() == 2 else {name: value.flatten(0, 1) for name, value in named.items()}

    if (operands := passes.operands(batch())) is None:
        logits = passes.logits(batch()).flatten(0, 1).float()
        losses = torch.nn.functional.cross_entropy(logits, flat, reduction="none", ignore_index=IGNORED)
        return -losses.view(targets.shape)
    hidden, weight = operands
    with torch.autocast(hidden.device.type, enabled=False):
        losses = _entropies(chunk_losses, hidden.reshape(len(flat), -1), weight, flat, most)
    return -losses.view(targets.shape)


def _entropies(
    chunk_losses: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor, most: int | None
) -> Tensor:
    """Returns the cross entropy of each token; those without a target are not multiplied with the output matrix.

    The number of tokens that are, at most `most`, follows from what the host knows: nothing waits for the device.
    """
    tokens = len(targets)
    size = tokens if most is None else BUCKET * (most // BUCKET + 1)
    if size >= tokens:
        return linear_entropies(hidden, weight, targets, chunk_losses)
    read = torch.nonzero_static(targets != IGNORED, size=size, fill_value=tokens - 1).view(-1)  # the last has none
    losses = linear_entropies(hidden.index_select(0, read), weight, targets[read], chunk_losses)
    return torch.zeros(tokens, device=losses.device).index_copy(0, read, losses)


def _next(labels: Tensor) -> Tensor:
    """Returns what each token is to predict: the label of the token after it, and -100 at the end of a row."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
