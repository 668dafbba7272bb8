"""Identity preference optimization (Azar et al., arXiv 2310.12036): a margin that is not to grow without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.objectives.answers import CHOSEN, REJECTED, Answers
from qlora.objectives.dpo import DirectPreference

if TYPE_CHECKING:
    from torch import Tensor


class IdentityPreference(DirectPreference):
    """The objective `ipo`: equation 17 of the paper, with `beta` for its tau; its rewards are those of DPO."""

    def losses(self, answers: Answers) -> Tensor:
        """Returns the squared distance of each pair's log-ratio to 1 / (2 beta)."""
        rewards = self.rewards(answers)
        margin = (rewards[:, CHOSEN] - rewards[:, REJECTED]) / self.beta
        return (margin - 1 / (2 * self.beta)) ** 2
