"""Losses over whole answers: what the step hands them, and what they have in common.

The step computes the log-probability of every answer of a micro-batch, once with the trained weights and, where the
loss compares, once with those of the reference, without building the logits of all tokens. A loss makes of these few
numbers a loss for each row. So a preference loss is a few lines of arithmetic: see `dpo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import LossConfig
from qlora.objectives.protocol import IGNORED, TokenWork, entropy_bytes
from qlora.objectives.row_loss import RowLoss

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN, REJECTED = 0, 1
"""The sides of a pair, the last dimension of what follows."""


@dataclass(frozen=True)
class Answers:
    """What the model says of the answers of a micro-batch, in nats; all but `rest` are [rows, sides].

    A row without a token in an answer counts nothing: a process that has no rows left takes part with one.
    """

    log_probs: Tensor
    """The log-probability of an answer: the sum over its tokens, float32."""
    tokens: Tensor
    """The number of its tokens, int64."""
    reference: Tensor
    """As `log_probs`, of the reference; 0 where there is none."""
    text_log_probs: Tensor
    """The sum over what the likelihood term counts: the answer, or (`reads_prompt`) prompt and answer."""
    text_tokens: Tensor
    """The number of these tokens."""
    rest: Mapping[str, Tensor]
    """The other columns of the rows, each [rows]."""

    @property
    def ratios(self) -> Tensor:
        """The logarithm of how much likelier the answers are than by the reference."""
        return self.log_probs - self.reference

    @property
    def counts(self) -> Tensor:
        """Which rows count: bool [rows]."""
        return (self.tokens > 0).all(1)


class AnswerLoss(RowLoss):
    """An objective over the answers of rows; a loss of its own writes `losses` and `rewards`."""

    rows = RowKind.pairs
    columns: tuple[str, ...] = ("input_ids", "labels", "answer_start", "rejected_ids", "rejected_labels")
    takes_transform = True
    """Whether it computes what an architecture does to its logits: scales and caps."""
    reads_prompt = False
    """Whether the likelihood term counts the tokens of the prompt, too."""
    graded_sides: int | None = None
    """How many sides, the first ones, the gradient follows; None: all."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self._chunk_losses: Any = None

    @property
    def beta(self) -> float:
        """The setting `loss.beta`."""
        assert self.config.beta is not None, "LossConfig checks it"
        return self.config.beta

    @property
    def likelihood_weight(self) -> float:
        """The weight of the likelihood term: the mean cross entropy of the chosen answers."""
        return self.config.sft_weight or 0.0

    def losses(self, answers: Answers) -> Tensor:
        """Returns the loss of each row, float32 [rows]."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> Tensor:
        """Returns what the loss takes for the rewards of the answers, float32 [rows, sides]."""
        raise NotImplementedError

    @property
    def compares(self) -> bool:
        """Whether the model is compared with a reference."""
        return self.config.compares

    def loss_on_batch(self, batch: dict[str, Any], passes: Any) -> Tensor:
        """Returns the loss of a micro-batch, which the passes of the model (`Passes`) are asked for."""
        from qlora.objectives.answer_passes import read_answers

        count = batch.pop("num_items_in_batch", None)
        answers = read_answers(
            batch,
            passes,
            reads_prompt=self.reads_prompt,
            graded_sides=self.graded_sides,
            chunk_losses=self._chunk_losses,
        )
        return self.loss(answers, count)

    def reference_on_batch(self, batch: dict[str, Any], passes: Any) -> Tensor:
        """Returns the log-probability that the reference gives each answer of a micro-batch, float32 [rows, sides]."""
        from qlora.objectives.answer_passes import read_reference

        return read_reference(batch, passes, chunk_losses=self._chunk_losses)

    def loss(self, answers: Answers, count: Tensor | None) -> Tensor:
        """Returns the loss of a micro-batch, and notes its rewards.

        `count` is float [2]: the rows that count, and the tokens of the likelihood term, of the whole optimizer step
        in all processes; None: the micro-batch is by itself. Every row weighs the same, whichever micro-batch it is in.
        """
        import torch

        counts = answers.counts
        if count is None:
            count = torch.stack([counts.sum(), answers.text_tokens[counts, CHOSEN].sum()]).clamp(min=1)
        total = torch.where(counts, self.losses(answers), 0).sum() / count[0]
        if weight := self.likelihood_weight:
            total = total - weight * torch.where(counts, answers.text_log_probs[:, CHOSEN], 0).sum() / count[1]
        with torch.no_grad():
            self.note(self.measures(answers), counts)
        return total

    def measures(self, answers: Answers) -> dict[str, Tensor]:
        """Returns what is logged and measured of each row beside its loss, by name: float [rows].

        A pair whose rewards are equal is half right: so is a model before it is trained.
        """
        rewards = self.rewards(answers)
        margin = rewards[:, CHOSEN] - rewards[:, REJECTED]
        return {"reward_accuracy": (margin.sign() + 1) / 2, "reward_margin": margin}

    # What every objective answers

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the rows that count and the tokens of the likelihood term of each row of a batch, float [rows, 2].

        Of packs it returns these numbers of each pack.
        """
        import torch

        labels = batch["labels"] != IGNORED
        if "position_ids" in batch:
            return self._count_packs(batch["position_ids"], labels)
        counts = labels.any(2).all(1)
        texts = labels[:, CHOSEN]
        if self.reads_prompt:
            texts = batch["attention_mask"][:, CHOSEN, 1:].bool() & counts[:, None]
        return torch.stack([counts.float(), texts.sum(1).float()], 1)

    def _count_packs(self, positions: Tensor, labels: Tensor) -> Tensor:
        import torch

        sides = pack_sides(positions)
        counts, texts = [], []
        for side, labelled in zip(sides, labels, strict=True):
            number = int(side.max()) + 2  # of sides, in pairs
            tokens = torch.bincount(side[labelled], minlength=number)[: number // 2 * 2].view(-1, 2)
            is_pair = (tokens > 0).all(1)
            whole = torch.bincount(side, minlength=number)[: number // 2 * 2].view(-1, 2)[:, CHOSEN] - 1
            counts.append(is_pair.sum())
            texts.append((whole if self.reads_prompt else tokens[:, CHOSEN])[is_pair].sum())
        return torch.stack([torch.stack(counts).float(), torch.stack(texts).float()], 1)

    def prepare(self, *, compiled: bool, scale: float = 1.0, cap: float | None = None) -> None:
        """Compiles the cross entropy of a chunk with the decoder layers.

        The model's logits are `scale` times the products with the output matrix, and with `cap` then
        cap * tanh(logits / cap).
        """
        import torch

        from qlora.objectives.linear_cross_entropy import entropies_and_gradient

        chunk_losses = partial(entropies_and_gradient, scale=scale, cap=cap)
        self._chunk_losses = torch.compile(chunk_losses) if compiled else chunk_losses

    def activation_bytes(self, work: TokenWork) -> tuple[float, float]:
        """Returns the bytes of a cross entropy: the log-probabilities are computed as one."""
        return entropy_bytes(work)


def sides_of(positions: Tensor, count: int) -> Tensor:
    """Returns which tokens of packs are in each of `count` sides, bool [packs, sides, tokens], for `position_ids`."""
    import torch

    return pack_sides(positions)[:, None] == torch.arange(count, device=positions.device)[:, None]


def pack_sides(positions: Tensor) -> Tensor:
    """Returns which side of a pack each of its tokens is in, from 0, for `position_ids` [packs, tokens]."""
    return (positions == 0).cumsum(1) - 1
