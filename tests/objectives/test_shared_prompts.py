"""Answers that share their prompt in the step: the loss and the gradients are those of each row by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from qlora import adapters
from qlora.data.batching.collate import Collator, SharedPromptsCollator, SidesCollator, count_work
from qlora.data.batching.packing import PackedRows
from qlora.data.batching.shared_prompts import count_shared
from qlora.objectives.protocol import SHARED_ROWS
from qlora.step.fast_step import FastStep
from qlora.step.kernels import shared_prompts
from qlora.step.part import ON, Packs
from qlora.training.batches import COUNTS, SAVED, TARGETS, WEIGHTS, CountingCollator
from qlora.upstream.transformers_model import mixes_by_attention_alone
from tests.objectives.test_answer_losses import PLACEMENT, composed, objective, step_of
from tests.step.test_special_attention import KINDS, build

IGNORED = -100
KINDS.setdefault("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32})
SHARING = ("trainer.fused_attention=true", "trainer.fused_loss=true")


def pair(prompt: int, chosen: int, rejected: int, same: int = 0, seed: int = 0) -> dict[str, Any]:
    """Returns a pair of tokens; `same` tokens at the beginning of both answers are equal."""
    stream = np.random.RandomState(seed)
    shared, *rests = (stream.randint(3, 90, size) for size in (prompt + same, chosen - same, rejected - same))
    rests[0][0], rests[1][0] = 91, 92
    ids = [np.concatenate([shared, rest]).tolist() for rest in rests]
    labels = [[*[IGNORED] * prompt, *row[prompt:]] for row in ids]
    row = {"input_ids": ids[0], "labels": labels[0], "rejected_ids": ids[1], "rejected_labels": labels[1],
           "answer_start": prompt, "length": len(ids[0]) + len(ids[1]),
           "shared": count_shared((ids[0], labels[0]), (ids[1], labels[1]))}  # fmt: skip
    assert row["shared"] == prompt + same
    return row


PAIRS = [pair(6, 3, 5, seed=1), pair(1, 8, 1, seed=2), pair(4, 6, 4, same=2, seed=3), pair(0, 5, 3, seed=4)]


def packs_of(rows: list[dict[str, Any]], *packs: list[int]) -> tuple[dict[str, Tensor], Packs]:
    packed = PackedRows(Dataset.from_list(rows), [np.array(pack) for pack in packs], shares_prompts=True)
    assert packed.most_cells is not None
    width = int(packed.lengths.max()) + 3
    batch = Collator(0, width=width, most_cells=packed.most_cells + 2)([packed[index] for index in range(len(packed))])
    assert batch["first_cell"].shape[1] == width < batch["input_ids"].shape[1]
    return batch, Packs(batch["input_ids"].shape[1], packed.most_rows, packed.longest_row)


def learn(model: Any, step: FastStep, batch: dict[str, Tensor]) -> Tensor:
    """Returns the loss of a batch and all gradients."""
    model.zero_grad()
    with step:
        loss = model(**{name: value.clone() for name, value in batch.items()}).loss
        loss.backward()
    gradients = [p.grad.reshape(-1) for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat([loss.detach().reshape(1), *gradients])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm()) < 1e-5 * float(expected.norm())
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_rows_and_packs_that_share_prompts_learn_what_each_answer_by_itself_teaches(kind: str) -> None:
    model = build(kind)
    # ORPO reads the tokens of prompts, too.
    for name in ("simpo", "orpo"):

        def step(*overrides: str, packs: Packs | None = None, name: str = name) -> FastStep:
            config = composed("quantization=fp32", "lora.r=4", *overrides)
            return FastStep(model, config.trainer, config.quantization, PLACEMENT, packs, objective(f"loss={name}"))

        plain = learn(model, step(), SidesCollator(0)(PAIRS))
        sharing = step(*SHARING)
        assert sharing.parts["fused_attention"] == ON
        assert sharing.shares_prompts
        assert_same(learn(model, sharing, SharedPromptsCollator(0)(PAIRS)), plain)
        batch, packs = packs_of(PAIRS, [2, 0, 1], [3])
        assert_same(learn(model, step(*SHARING, packs=packs), batch), plain)


def test_the_reference_checkpointing_and_logits_see_the_same_answers_and_give_the_same_bits_again() -> None:
    model, plain = step_of(objective("loss=dpo"), "trainer.gradient_checkpointing=false")
    reference = adapters.reference_at_start(model, is_base=True)
    expected = learn(model, plain, SidesCollator(0)(PAIRS))
    for more in ((), ("trainer.gradient_checkpointing=true",), ("trainer.fused_loss=false",)):
        config = composed(*SHARING, *more, "device=cpu", "trainer.fused_linear=false")
        step = FastStep(
            model, config.trainer, config.quantization, PLACEMENT, None, objective("loss=dpo"), reference
        )  # fmt: skip
        sharing = learn(model, step, SharedPromptsCollator(0)(PAIRS))
        assert_same(sharing, expected)
        assert torch.equal(learn(model, step, SharedPromptsCollator(0)(PAIRS)), sharing)


def test_the_layers_compute_each_token_of_a_prompt_once() -> None:
    model, step = step_of(objective("loss=dpo"), *SHARING)
    seen: list[int] = []
    step.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    learn(model, step, SharedPromptsCollator(0)(PAIRS[:1]))
    assert seen == [6 + 3 + 5] * 2  # with the reference


def test_what_both_rows_of_a_pair_begin_with_is_shared_up_to_where_tokens_or_labels_part() -> None:
    row = [5, 6, 7, 8]
    assert count_shared((row, [IGNORED, IGNORED, 7, 8]), ([5, 6, 7, 9], [IGNORED, IGNORED, 7, 9])) == 3
    assert count_shared((row, [IGNORED, IGNORED, 7, 8]), (row, [IGNORED, IGNORED, IGNORED, 8])) == 2
    assert count_shared((row, row), (row[:2], row[:2])) == 1  # each keeps a token of its own
    assert count_shared((row, row), ([1], [1])) == 0
    assert count_shared((row, row), ([6, *row[1:]], [6, *row[1:]])) == 0


def test_a_batch_says_where_each_token_stands() -> None:
    batch = SharedPromptsCollator(0)([pair(2, 1, 2), pair(0, 1, 1)])
    token_of, first, second = (batch[name].tolist() for name in SHARED_ROWS)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5]]
    assert token_of == [[0, 1, 2, 0, 1, 3, 4, 4], [0, 1, 4, 4, 4, 4, 4, 4]]
    assert first == [[0, 1, 2, 5, 6], [0, 1, 2, 2, 2]]
    assert second == [[3, 4, -1, -1, -1], [-1, -1, -1, -1, -1]]


def test_the_gradient_of_a_token_is_the_sum_over_its_cells_and_its_output_is_read_once() -> None:
    batch = SharedPromptsCollator(0)([pair(2, 1, 2), pair(0, 1, 1)])
    shared_rows = shared_prompts.SharedRows.of(batch)
    tokens = torch.randn(10, 3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(16, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(16, 3, 4, dtype=torch.float64)
    weights[[7, *range(10, 16)]] = 0  # nothing reads padding
    shared_prompts.to_cells(tokens, shared_rows).mul(weights).sum().backward()
    expected = torch.zeros_like(tokens).index_add(0, shared_rows.token_of, weights)
    torch.testing.assert_close(tokens.grad, expected)
    kept = shared_prompts.to_tokens(values, shared_rows)
    assert torch.equal(kept[[0, 1, 3, 5, 6]], values[[0, 1, 5, 8, 9]])
    (kept * expected).sum().backward()
    assert values.grad is not None
    assert not values.grad[[3, 4]].any()
    torch.testing.assert_close(values.grad[[0, 5, 8]], expected[[0, 3, 5]])


def test_layers_that_show_a_token_to_the_next_by_other_means_than_attention_share_no_prompt() -> None:
    model = build("llama")
    assert mixes_by_attention_alone(model)
    layer = model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda hidden: forward(hidden + 0.5 * hidden.roll(1, 1))
    assert not mixes_by_attention_alone(model)
    config = composed("quantization=fp32", "lora.r=4", *SHARING)
    step = FastStep(model, config.trainer, config.quantization, PLACEMENT, None, objective("loss=simpo"))
    assert (step.parts["fused_attention"], step.shares_prompts) == (ON, False)
    batch = SharedPromptsCollator(0)(PAIRS[:1])  # is laid out as rows, then
    seen: list[int] = []
    step.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    learn(model, step, batch)
    assert seen == [batch["input_ids"].shape[1]]


def test_both_answers_count_with_their_prompt_and_what_is_computed_is_known() -> None:
    loss = objective("loss=orpo")
    counted = [
        CountingCollator(collate, lambda batch: count_work(batch, 0), loss, PAIRS[0])(PAIRS[:3])
        for collate in (SidesCollator(0), SharedPromptsCollator(0))
    ]
    for name in (COUNTS, TARGETS, WEIGHTS):
        assert np.array_equal(counted[0][name], counted[1][name])
    assert [micro[SAVED] for micro in counted] == [0, 6 + 1 + 4 + 2]
