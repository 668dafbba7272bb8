"""A reward model (Bradley and Terry, 1952; Ouyang et al., arXiv 2203.02155): a number for a text, from pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora.objectives.answers import CHOSEN, REJECTED, AnswerLoss, Answers, sides_of
from qlora.objectives.head_loss import last_token
from qlora.objectives.protocol import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from qlora.config.schema import HeadConfig, LossConfig


class RewardModel(AnswerLoss):
    """The objective `reward`: the likelihood of the order of each pair, of the rewards that a head gives both texts."""

    def __init__(self, config: LossConfig, head: HeadConfig) -> None:
        super().__init__(config)
        self.head = head

    def loss_on_batch(self, batch: dict[str, Any], passes: Any) -> Tensor:
        """Returns the loss of a micro-batch; `passes` give the rewards of texts."""
        count = batch.pop("num_items_in_batch", None)
        if "position_ids" in batch:
            is_in = sides_of(batch["position_ids"], passes.sides)
            labels = batch["labels"][:, None].masked_fill(~is_in, IGNORED).unflatten(1, (-1, 2))
            rewards = self._scores(batch, last_token(is_in), passes).unflatten(1, (-1, 2))
            return self.loss(rewarded(rewards.flatten(0, 1), labels.flatten(0, 1)), count)
        labels, mask = batch["labels"], batch["attention_mask"]
        texts = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        rewards = self._scores(texts, last_token(texts["attention_mask"][:, None].bool()), passes)
        return self.loss(rewarded(rewards.view(mask.shape[:2]), labels), count)

    def text_rewards(self, texts: dict[str, Any], passes: Any) -> Tensor:
        """Returns the rewards of texts that were read one by one, float32 [rows]."""
        return self._scores(texts, last_token(texts["attention_mask"].bool())[:, None], passes)[:, 0]

    def _scores(self, batch: dict[str, Any], last: Tensor, passes: Any) -> Tensor:
        return passes.head_outputs(batch, last, bf16=self.head.computes_bf16)[..., 0]

    def losses(self, answers: Answers) -> Tensor:
        """Returns the negative log-likelihood of each order, and the squared sums that keep rewards around 0."""
        from torch.nn.functional import logsigmoid

        rewards = self.rewards(answers)
        centered = (self.config.center_rewards or 0.0) * rewards.sum(1).square()
        return centered - logsigmoid(rewards[:, CHOSEN] - rewards[:, REJECTED])

    def rewards(self, answers: Answers) -> Tensor:
        """Returns what the head gave."""
        return answers.log_probs

    def measures(self, answers: Answers) -> dict[str, Tensor]:
        """Returns the measures of all pairs, and both rewards."""
        rewards = self.rewards(answers)
        both = {"chosen_reward": rewards[:, CHOSEN], "rejected_reward": rewards[:, REJECTED]}
        return {**super().measures(answers), **both}


def rewarded(rewards: Tensor, labels: Tensor) -> Answers:
    """Returns rewards [rows, sides] in the place of log-probabilities, for `labels` [rows, sides, tokens]."""
    import torch

    tokens = (labels != IGNORED).sum(-1)
    return Answers(rewards, tokens, torch.zeros_like(rewards), rewards, tokens, {})
