"""Kahneman-Tversky optimization (Ethayarajh et al., arXiv 2402.01306): answers that are labelled good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.config.registries.objectives import RowKind
from qlora.objectives.answers import AnswerLoss, Answers

if TYPE_CHECKING:
    from torch import Tensor

MATCHED, MISMATCHED = 0, 1
"""The sides of a row: its answer, and the answer of another row of the micro-batch to its prompt."""


class KahnemanTversky(AnswerLoss):
    """The objective `kto`: equation 8 of the paper.

    The point from which gains and losses are counted is the divergence from the reference, estimated over a
    micro-batch by prompts with the answers of other rows. No gradient follows it.
    """

    rows = RowKind.labelled
    columns = ("input_ids", "labels", "answer_start", "desirable")
    graded_sides = 1
    is_separable = False

    def losses(self, answers: Answers) -> Tensor:
        """Returns how far the value of each answer lies below what is desired, by its weight."""
        import torch

        rewards, counts, good = self.rewards(answers), answers.counts, answers.rest["desirable"]
        divergence = torch.where(counts, rewards[:, MISMATCHED].detach(), 0).sum() / counts.sum().clamp(min=1)
        gain = rewards[:, MATCHED] - divergence.clamp(min=0)
        weight = torch.where(good, self.config.desirable_weight or 0.0, self.config.undesirable_weight or 0.0)
        return weight * (1 - torch.sigmoid(torch.where(good, gain, -gain)))

    def rewards(self, answers: Answers) -> Tensor:
        """Returns beta times the log-ratios to the reference."""
        return self.beta * answers.ratios

    def measures(self, answers: Answers) -> dict[str, Tensor]:
        """Returns whether the sign of each reward is that of its label, the reward towards it, and the divergence."""
        rewards = self.rewards(answers)
        towards = rewards[:, MATCHED] * (answers.rest["desirable"].float() * 2 - 1)
        return {"reward_accuracy": (towards.sign() + 1) / 2, "reward_margin": towards,
                "reference_divergence": answers.ratios[:, MISMATCHED]}  # fmt: skip
