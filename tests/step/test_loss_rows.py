"""The output layer reads only the hidden states before a label, and the loss and its gradients stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora.config.schema import LossConfig
from qlora.objectives import build_objective
from qlora.objectives.linear_cross_entropy import LinearCrossEntropy
from qlora.step.parts import loss as part
from qlora.step.parts.loss import before_labels
from qlora.training.batches import COUNTS, SAVED, TARGETS, CountingCollator, split, take_targets
from tests.objectives.test_objectives import FAST, train
from tests.step.test_fast import batch, build, build_step, learn

ANSWERED = [f"trainer.{name}" for name in ("per_device_train_batch_size=4", "gradient_accumulation_steps=2")]


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes buckets small; returns a list that gets the number of hidden states of each loss."""
    monkeypatch.setattr(part, "BUCKET", 8)
    read: list[int] = []
    forward = LinearCrossEntropy.forward

    def count(ctx: Any, hidden: torch.Tensor, *args: Any) -> Any:
        read.append(len(hidden))
        return forward(ctx, hidden, *args)

    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(count))
    return read


def with_labels(kind: str, *, packed: bool) -> dict[str, torch.Tensor]:
    """Returns a batch of 48 tokens whose labels are of one kind."""
    rows = batch(packed=packed)
    labels = rows["labels"]
    if kind == "answers":
        labels[:, 8:20] = -100
    elif kind == "last":  # the last token of both rows, and the first that can be predicted
        labels[:] = -100
        labels[:, -1] = labels[1, 1] = 5
    elif kind == "none":
        labels[:] = -100
    return rows


@pytest.mark.matrix(8)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("kind", ["answers", "last", "all", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_all_tokens(
    smoothing: float, kind: str, packed: bool, rows_read: list[int]
) -> None:
    model, config = build()
    rows = with_labels(kind, packed=packed)
    objective = build_objective(LossConfig(), label_smoothing=smoothing)
    step = build_step(model, config)
    step.objective = step._context.objective = objective
    objective.prepare(compiled=False)
    results = []
    for targets in (None, int((rows["labels"] != -100).sum())):
        step.targets = targets
        with step:
            results.append(learn(model, rows, num_items_in_batch=31))
    (loss, gradients), (other, others) = results
    assert other == pytest.approx(loss, rel=1e-6)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert rows_read == [48, 8 * (int((rows["labels"] != -100).sum()) // 8 + 1)]
    assert step.targets is None  # the next batch has a number of its own


def test_a_batch_whose_tokens_are_all_trained_is_read_as_it_is() -> None:
    hidden, labels = torch.randn(2, 128, 4), torch.ones(2, 128, dtype=torch.long)
    assert before_labels(hidden, labels, 254) == (hidden, labels)


@pytest.mark.parametrize("seed", range(5))
def test_each_kept_state_stands_before_its_label(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 50, (3, 700), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.8] = -100
    hidden = torch.arange(3 * 700, dtype=torch.float32).view(3, 700, 1)
    count = int((labels != -100).sum())
    row, kept = before_labels(hidden, labels, count)
    assert row.shape == (1, 256 * (count // 256 + 1), 1)
    assert kept.shape == row.shape[:2]
    indices = (labels[:, 1:] != -100).nonzero()
    expected = [(float(line * 700 + token), int(labels[line, token + 1])) for line, token in indices.tolist()]
    pairs = zip(row[0, :-1, 0].tolist(), kept[0, 1:].tolist(), strict=True)
    assert [pair for pair in pairs if pair[1] != -100] == expected


def test_numbers_of_labels_that_differ_from_batch_to_batch_do_not_compile_the_loss_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part, "BUCKET", 4)
    torch._dynamo.reset()
    objective = build_objective(LossConfig())
    objective.prepare(compiled=True)
    weight, compiled = torch.randn(30, 8), []
    for count in (3, 8, 14, 23, 31, 5, 40):
        hidden, labels = torch.randn(1, 64, 8, requires_grad=True), torch.full((1, 64), -100)
        labels[0, 1 : 1 + count] = 3
        torch._dynamo.utils.counters.clear()
        row, kept = before_labels(hidden, labels, count)
        objective.loss_on_hidden(row, weight, kept, count).backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert sum(compiled[:2]) <= 2
    assert not any(compiled[2:])


def test_a_run_learns_the_same_whether_the_step_knows_the_number_of_labels(
    tmp_path: Path, rows_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = train(tmp_path / "kept", *FAST, *ANSWERED)
    read = list(rows_read)
    rows_read.clear()
    monkeypatch.setattr(part, "before_labels", lambda hidden, labels, _: (hidden, labels))
    usual = train(tmp_path / "all", *FAST, *ANSWERED)
    assert len(read) == len(rows_read) == 6
    assert sum(read) < 0.6 * sum(rows_read)
    assert [entry["loss"] for entry in fast] == pytest.approx([entry["loss"] for entry in usual], rel=1e-5)


def test_the_collator_counts_labels_by_row_and_parts_of_a_batch_keep_theirs() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    rows = [{"input_ids": [1, 2, 3], "labels": labels} for labels in ([-100, 2, 3], [-100, -100, 3], [-100] * 3)]
    collator = CountingCollator(collate, lambda batch: (9, 18), build_objective(LossConfig()), rows[2])
    counted = collator(rows)
    assert (counted.pop(COUNTS), counted.pop(SAVED)) == ((9, 18), 0)
    assert isinstance(counted[TARGETS], np.ndarray)  # on the host, wherever the batch goes
    tensors, count = take_targets(counted)
    assert (tensors.keys(), count) == ({"input_ids", "labels"}, 3)
    first, second = split(counted, 2)
    assert [take_targets(half)[1] for half in (first, second)] == [3, 0]
    assert [len(half["labels"]) for half in (first, second)] == [2, 1]
    assert take_targets(collator([]))[1] == 0
