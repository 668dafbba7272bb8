"""What an objective answers; docs/extending.md shows one of another package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qlora.config.registries.objectives import RowKind

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that has no loss."""
TRUTH = "truth"
"""The column of a batch with what a head is to say of each row."""
HEAD = "score"
"""The name of a head in the model, as in transformers' models for sequence classification."""
SHARED_ROWS = ("token_of", "first_cell", "second_cell")
"""The columns of a batch of pairs whose answers share their prompt; `qlora.data.batching.shared_prompts` makes them."""
REFERENCE = "reference_log_probs"
"""The column of rows whose reference was computed before training: the log-probability that it gives each answer,
float32 [sides]; of packs those of all sides, one after the other."""
CHUNK = 2048
"""Tokens whose logits exist at a time in the fused loss."""


@dataclass(frozen=True)
class TokenWork:
    """The size of a micro-batch's output layer."""

    tokens: int
    hidden: int
    vocabulary: int
    width: int
    """Bytes of a number in matmuls."""
    fused: bool
    """Whether the loss is computed from the hidden states (`trainer.fused_loss`)."""
    targets: int | None = None
    """How many of the tokens the loss counts, at most; None: all of them."""
    capped: bool = False
    """Whether the architecture passes its logits through tanh."""

    @property
    def read(self) -> int:
        """The hidden states that the output layer reads where the loss is computed from them, token by token."""
        return self.tokens if self.targets is None else min(self.tokens, self.targets)


def entropy_bytes(work: TokenWork) -> tuple[float, float]:
    """Returns what logits, their gradients and the softmax of a cross entropy hold, forward and backward, in bytes."""
    if work.fused:  # a chunk's logits and their gradient; the gradient of the hidden states that are read
        chunk = min(work.read, CHUNK) * work.vocabulary * 2 * work.width
        read, all_tokens = (count * work.hidden * work.width for count in (work.read, work.tokens))
        if work.read == work.tokens:
            return chunk + read, 0
        return chunk + 2 * read, 2 * read + all_tokens  # their copy; their scaled gradient, and that of all tokens
    capped = work.width if work.capped else 0
    # As computed, in float32, and their logarithms; then those, and two gradients in float32.
    logits = work.tokens * work.vocabulary
    return logits * (work.width + 8 + capped), logits * (12 + capped)


class Objective(Protocol):
    """A training objective over tokens; built with the group `loss` of the config as its only argument.

    One over the answers of a row, such as a preference, is an `AnswerLoss` of `qlora.objectives.answers`: it has
    `loss_on_batch` instead of the two methods that compute a loss here.
    """

    rows: RowKind
    """What a row is to it. An objective may leave it out, which says `tokens`."""

    columns: Sequence[str]
    """The columns that the data pipeline must supply for each row."""

    is_model_loss: bool
    """Whether transformers' models compute this loss themselves when they are given `labels`. The plain step then
    leaves it to the model, with what an architecture adds to it, such as the loss of a router."""

    is_tokenwise: bool
    """Whether the loss is a sum over tokens, each of its own hidden state and the label after it. `loss_on_hidden` then
    gets the hidden states before a label alone, as one row. An objective may leave it out, which says no."""

    takes_transform: bool
    """Whether `prepare` takes what an architecture does to its logits, for `loss_on_hidden`. An objective may leave it
    out, which says no; such models are then trained by `loss_on_logits`."""

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the labels of a batch of rows or packs on the host, int64 [rows, tokens]: -100 means no loss.

        The batch has `input_ids` and `labels`, which are the tokens of what `data.train_on` names and else -100.
        """

    def prepare(self, *, compiled: bool, scale: float = 1.0, cap: float | None = None) -> None:
        """Prepares for a step, once; `compiled`: its decoder layers are compiled, and so may be the loss.

        The model's logits are `scale` times the product with the output matrix, and with `cap` then
        cap * tanh(logits / cap). Both are passed only where they are others than these, and to an objective that
        `takes_transform`.
        """

    def loss_on_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Returns the loss of a micro-batch without the logits of all tokens.

        `hidden` is [rows, tokens, width], `weight` the frozen output matrix [vocabulary, width], `labels` int64
        [rows, tokens] as `labels` returns them. `count` is the number of tokens that the loss of the whole optimizer
        step counts, in all processes; None: the micro-batch is by itself.
        """

    def loss_on_logits(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Returns the same loss of `logits` [rows, tokens, vocabulary]."""

    def metrics(self) -> dict[str, float]:
        """Returns what is logged beside the loss, of this process since the last call."""

    def activation_bytes(self, work: TokenWork) -> tuple[float, float]:
        """Returns what the output layer and the loss hold in the forward and in the backward pass, in bytes."""
