"""Odds ratio preference optimization (Hong et al., arXiv 2403.07691): likelihood and preference, no reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.objectives.answers import CHOSEN, REJECTED, AnswerLoss, Answers

if TYPE_CHECKING:
    from torch import Tensor


class OddsRatio(AnswerLoss):
    """The objective `orpo`: equations 6 and 7 of the paper, whose lambda is `beta`.

    As in the authors' code, its likelihood term is the mean over the tokens of prompts and chosen answers.
    """

    reads_prompt = True

    @property
    def likelihood_weight(self) -> float:
        """The likelihood term of the paper stands by itself; `beta` weighs the other one."""
        return 1.0

    def losses(self, answers: Answers) -> Tensor:
        """Returns beta times the negative log-likelihood that the odds of the chosen answer are the better ones."""
        import torch

        means = answers.log_probs / answers.tokens.clamp(min=1)
        odds = means - torch.log(
            -torch.expm1(means.clamp(max=-1e-7))
        )  # where a probability is 1, its odds are infinite
        return -self.beta * torch.nn.functional.logsigmoid(odds[:, CHOSEN] - odds[:, REJECTED])

    def rewards(self, answers: Answers) -> Tensor:
        """Returns beta times the mean log-probabilities."""
        return self.beta * answers.log_probs / answers.tokens.clamp(min=1)
