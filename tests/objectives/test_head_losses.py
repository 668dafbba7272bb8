"""Losses of heads: what a micro-batch counts, and that every row of an optimizer step weighs the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.config.registries.objectives import SHIPPED, WHOLE_TEXTS, RowKind
from qlora.config.schema import HeadConfig, LossConfig
from qlora.objectives import build_objective
from qlora.objectives.head_loss import HeadLoss
from qlora.objectives.protocol import IGNORED, TRUTH

NAMES = [name for name, shipped in SHIPPED.items() if shipped.rows in WHOLE_TEXTS]


class Passes:
    """Passes that make of each token's id a hidden state, and of it outputs."""

    def hidden_states(self, texts: dict[str, Any]) -> torch.Tensor:
        ids = texts["input_ids"]
        return torch.stack([ids.sin(), ids.cos(), (ids / 3).sin()], -1)

    def head_outputs(self, texts: dict[str, Any], last: torch.Tensor, *, bf16: bool = False) -> torch.Tensor:
        return self.hidden_states(texts).gather(1, last[..., None].expand(-1, -1, 3))


def loss_of(name: str) -> HeadLoss:
    settings: dict[str, Any] = {"temperature": 0.1} if "temperature" in SHIPPED[name].settings else {}
    loss = build_objective(LossConfig(name=name, **settings), HeadConfig(name=SHIPPED[name].head))
    assert isinstance(loss, HeadLoss)
    return loss


def batch_of(kind: RowKind) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (6, 2, 5) if kind is RowKind.texts else (6, 5))
    mask = torch.ones_like(ids)
    mask[..., 3:] = torch.arange(6).view(-1, *[1] * (ids.dim() - 1)) % 2
    truth = {RowKind.classes: torch.arange(6) % 3, RowKind.values: torch.randn(6, 3), RowKind.texts: torch.rand(6, 1)}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), TRUTH: truth[kind]}


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_step_add_up_to_the_whole_and_rows_without_a_label_count_nothing(name: str) -> None:
    loss = loss_of(name)
    batch = batch_of(loss.rows)
    whole = loss.loss_on_batch(dict(batch), Passes())
    count = loss.count(batch).sum(0)
    assert count.tolist() == [6, 6]
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(2), slice(2, 6))]
    added = sum(loss.loss_on_batch({**part, "num_items_in_batch": count}, Passes()) for part in parts)
    assert float(added) == pytest.approx(float(whole), rel=1e-5)
    blank = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    assert float(loss.loss_on_batch(blank, Passes())) == 0


@pytest.mark.parametrize("name", NAMES)
def test_saying_the_same_of_all_texts_is_never_better_than_what_is_true(name: str) -> None:
    loss = loss_of(name)
    if not loss.constant_name:
        pytest.skip("the untuned base says something by itself")
    truth = batch_of(loss.rows)[TRUTH]
    constant = loss.constant(truth, 3)
    assert constant.shape == (6, 3)
    assert torch.equal(constant, constant[:1].expand(6, -1))
    for shift in (-0.3, 0.3):
        other = constant + shift * torch.eye(3)[0]
        assert loss.losses(constant, truth).mean() <= loss.losses(other, truth).mean()
