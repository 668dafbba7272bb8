"""Direct preference optimization (Rafailov et al., arXiv 2305.18290): a classification of which answer is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.objectives.answers import CHOSEN, REJECTED, AnswerLoss, Answers

if TYPE_CHECKING:
    from torch import Tensor


class DirectPreference(AnswerLoss):
    """The objective `dpo`: equation 7 of the paper, with smoothed labels (cDPO) where they are asked for."""

    def losses(self, answers: Answers) -> Tensor:
        """Returns the negative log-likelihood of the order of each pair."""
        from torch.nn.functional import logsigmoid

        rewards, smoothing = self.rewards(answers), self.config.label_smoothing or 0.0
        margin = rewards[:, CHOSEN] - rewards[:, REJECTED]
        return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)

    def rewards(self, answers: Answers) -> Tensor:
        """Returns beta times the log-ratios to the reference, by the token where they are normalised."""
        ratios = answers.ratios
        if self.config.length_normalize:
            ratios = ratios / answers.tokens.clamp(min=1)
        return self.beta * ratios
