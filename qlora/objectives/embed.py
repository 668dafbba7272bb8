"""Embeddings: unit vectors of texts, near where texts belong together and far where they do not.

The loss is the cross entropy of finding a text's partner among those of a micro-batch (InfoNCE, van den Oord et al.,
arXiv 1807.03748; in-batch negatives, Karpukhin et al., arXiv 2004.04906), or the squared error of the cosine of pairs
with scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora.config.registries.objectives import RowKind
from qlora.objectives.head_loss import HeadLoss, last_token

if TYPE_CHECKING:
    from torch import Tensor

NDCG_AT = 10
ANCHORS = 1024
"""Anchors whose cosines with all partners are in memory at a time."""


class Embedding(HeadLoss):
    """The objective `embed`; outputs are unit vectors, float32 [rows, texts, width], of an anchor and its partners.

    What is true of a row are the numbers of its partners' texts, int64 [rows, partners], of which the first one is the
    right one and equal texts have equal numbers; or the score of a pair, float32 [rows, 1].
    """

    rows = RowKind.texts
    columns = ("input_ids", "labels", "partners", "values")
    is_separable = False

    def outputs(self, batch: Mapping[str, Any], passes: Any) -> Tensor:
        """Returns the vectors of all texts."""
        from torch.nn.functional import normalize

        ids, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
        texts = {"input_ids": ids, "attention_mask": mask, "labels": batch["labels"].flatten(0, 1)}
        hidden = passes.hidden_states(texts).view(*ids.shape, -1)  # it may be laid out as one row
        pooled = mean_of(hidden, mask) if self.head.pools_mean else last_of(hidden, mask)
        return normalize(pooled, dim=-1).unflatten(0, batch["input_ids"].shape[:2])

    def losses(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Returns the loss of each row."""
        import torch
        from torch.nn.functional import cross_entropy

        if truth.is_floating_point():
            return (cosines(outputs) - truth[:, 0]).square()
        assert self.config.temperature is not None, "LossConfig checks it"
        temperature = self.config.temperature
        parts = _similarities(outputs, truth)
        return torch.cat([cross_entropy(part / temperature, right, reduction="none") for part, right in parts])

    def measures(self, outputs: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Returns the reciprocal rank of the right partner of each anchor, and its nDCG at 10; none beside scores."""
        import torch

        if truth.is_floating_point():
            return {}
        # Of equal cosines the right one comes last.
        ranks = [(part >= part.gather(1, right[:, None])).sum(1) for part, right in _similarities(outputs, truth)]
        rank = torch.cat(ranks)
        gain = 1 / (1 + rank.float()).log2()
        return {"mrr": 1 / rank.float(), "ndcg": gain.masked_fill(rank > NDCG_AT, 0)}

    def statistics(self, outputs: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the cosines that correlations compare with scores."""
        if not truth.is_floating_point():
            return {}
        said = cosines(outputs), truth[:, 0]
        return {"pearson": said, "spearman": said}

    def describe(self, outputs: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the cosine of each anchor and its first partner, and the vectors of all texts of the row."""
        values = zip(cosines(outputs).tolist(), outputs.tolist(), strict=True)
        return [{"prediction": f"{cosine:.4f}", "match": None, "vectors": vectors} for cosine, vectors in values]

    def describe_truth(self, truth: Tensor, labels: Sequence[str]) -> list[str | None]:
        """Returns the score of each pair; None: there is none."""
        if not truth.is_floating_point():
            return [None] * len(truth)
        return [f"{score:.6g}" for score in truth[:, 0].tolist()]


def _similarities(outputs: Tensor, truth: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the cosines of some anchors with all partners [anchors, all], and the indices of the right ones [anchors].

    A text that is equal to the right one, but another row's, is no wrong answer: its cosine is minus infinity.
    """
    import torch

    right = torch.arange(len(outputs), device=outputs.device) * truth.shape[1]
    for anchors in torch.arange(len(outputs), device=outputs.device).split(ANCHORS):
        cosine = outputs[anchors, 0] @ outputs[:, 1:].flatten(0, 1).t()
        is_equal = truth.flatten()[None] == truth[anchors, :1]
        is_equal.scatter_(1, right[anchors, None], value=False)
        yield cosine.masked_fill(is_equal, -torch.inf), right[anchors]


def cosines(outputs: Tensor) -> Tensor:
    """Returns the cosine of each anchor and its first partner."""
    return (outputs[:, 0] * outputs[:, 1]).sum(-1)


def last_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Returns the hidden states of last tokens, float32 [rows, width]."""
    import torch

    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last_token(mask.bool())].float()


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of the hidden states of each text's tokens, float32 [rows, width]."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
