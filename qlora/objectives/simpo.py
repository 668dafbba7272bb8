"""Simple preference optimization (Meng et al., arXiv 2405.14734): mean log-probabilities, a margin, no reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.objectives.answers import CHOSEN, REJECTED, AnswerLoss, Answers

if TYPE_CHECKING:
    from torch import Tensor


class SimplePreference(AnswerLoss):
    """The objective `simpo`: equation 6 of the paper, with smoothed labels where they are asked for."""

    def losses(self, answers: Answers) -> Tensor:
        """Returns the negative log-likelihood that the chosen reward is larger by `gamma`."""
        from torch.nn.functional import logsigmoid

        rewards, smoothing = self.rewards(answers), self.config.label_smoothing or 0.0
        margin = rewards[:, CHOSEN] - rewards[:, REJECTED] - (self.config.gamma or 0.0)
        return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)

    def rewards(self, answers: Answers) -> Tensor:
        """Returns beta times the mean log-probabilities."""
        return self.beta * answers.log_probs / answers.tokens.clamp(min=1)
