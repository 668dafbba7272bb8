"""The loss of embeddings: in-batch negatives, equal texts, ranks."""

from __future__ import annotations

import math

import pytest
import torch

from qlora.config.schema import HeadConfig, LossConfig
from qlora.objectives import embed
from qlora.objectives.embed import Embedding, last_of, mean_of

TEMPERATURE = 0.1


def loss() -> Embedding:
    return Embedding(LossConfig(name="embed", temperature=TEMPERATURE), HeadConfig())


def vectors(rows: int, texts: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(rows, texts, 8), dim=-1)


@pytest.mark.parametrize("texts", [2, 3])
def test_the_loss_is_the_cross_entropy_of_the_own_partner_among_all(texts: int) -> None:
    outputs = vectors(4, texts)
    truth = torch.arange(4 * (texts - 1)).view(4, texts - 1)
    partners = outputs[:, 1:].flatten(0, 1)
    expected = []
    for row in range(4):
        scores = [math.exp(float(outputs[row, 0] @ other) / TEMPERATURE) for other in partners]
        expected.append(-math.log(scores[row * (texts - 1)] / sum(scores)))
    assert loss().losses(outputs, truth).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_text_equal_to_the_right_one_is_no_wrong_answer_whatever_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs = vectors(3, 2)
    outputs[1, 1] = outputs[0, 1]
    equal, distinct = torch.tensor([[7], [7], [8]]), torch.tensor([[7], [6], [8]])
    first = loss().losses(outputs, equal)
    assert first[0] < loss().losses(outputs, distinct)[0]
    assert first[2] == loss().losses(outputs, distinct)[2]
    monkeypatch.setattr(embed, "ANCHORS", 2)
    assert torch.allclose(loss().losses(outputs, equal), first)


def test_ranks_count_equals_as_nearer_than_the_right_text() -> None:
    outputs = torch.eye(4)[:, None].repeat(1, 2, 1)
    truth = torch.arange(4)[:, None]
    assert loss().measures(outputs, truth)["mrr"].tolist() == [1] * 4
    same = torch.ones(4, 2, 4) / 2  # all alike: nothing is found
    measured = loss().measures(same, truth)
    assert measured["mrr"].tolist() == [1 / 4] * 4
    assert measured["ndcg"].tolist() == pytest.approx([1 / math.log2(5)] * 4)


def test_scores_are_compared_with_cosines() -> None:
    outputs, truth = vectors(3, 2), torch.tensor([[0.5], [0.0], [1.0]])
    cosine = (outputs[:, 0] * outputs[:, 1]).sum(-1)
    assert torch.allclose(loss().losses(outputs, truth), (cosine - truth[:, 0]) ** 2)
    assert loss().measures(outputs, truth) == {}
    assert {*loss().statistics(outputs, truth)} == {"pearson", "spearman"}


@pytest.mark.parametrize("is_left", [False, True])
def test_padding_on_either_side_is_not_pooled(is_left: bool) -> None:
    text, padding = torch.randn(3, 8), torch.randn(2, 8)
    parts = [padding, text] if is_left else [text, padding]
    hidden, mask = torch.cat(parts)[None], torch.tensor([[0, 0, 1, 1, 1] if is_left else [1, 1, 1, 0, 0]])
    assert torch.equal(last_of(hidden, mask)[0], text[-1])
    assert torch.allclose(mean_of(hidden, mask)[0], text.mean(0))
