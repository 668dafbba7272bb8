import numpy as np
import torch

from qlora.data.batching.collate import Collator, count_work, token_mask

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [8], "length": 1},
]
PACKS = [
    {
        "input_ids": np.array([5, 6, 7, 5, 9], np.int32),
        "labels": [-100, 6, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
    },
    {"input_ids": np.array([4, 4], np.int32), "labels": [-100, -100], "position_ids": [0, 1]},
]


def test_batches_are_padded_on_the_right_and_padding_carries_no_loss():
    batch = Collator(9)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert "position_ids" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_token_equal_to_the_padding_keeps_attention_and_loss():
    batch = Collator(8)(ROWS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"][1].tolist() == [8, -100, -100]


def test_packs_have_positions_in_place_of_a_mask_and_padding_is_a_row_of_its_own():
    batch = Collator(0)(PACKS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 9], [4, 4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert "attention_mask" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packs_of_one_length_are_not_padded():
    assert Collator(0)(PACKS[:1])["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_tokens_are_told_from_padding_with_and_without_a_mask():
    assert token_mask(Collator(9)(ROWS), 9).tolist() == [[True] * 3, [True, False, False]]
    assert token_mask(Collator(0)(PACKS), 0).tolist() == [[True] * 5, [True] * 2 + [False] * 3]


def test_an_end_token_that_also_pads_counts_as_a_token():
    packs = [PACKS[0], {"input_ids": [9, 7, 9], "labels": [-100, -100, 9], "position_ids": [0, 1, 2]}]
    assert token_mask(Collator(9)(packs), 9).tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_pairs_are_counted_inside_each_row_and_not_in_padding():
    assert count_work(Collator(9)(ROWS), 9) == (4, (1 + 2 + 3) + 1)
    assert count_work(Collator(0)(PACKS), 0) == (7, (1 + 2 + 3) + (1 + 2) + (1 + 2))


def test_pairs_are_counted_inside_of_each_window():
    inside = (1 + 2 + 2) + (1 + 2) + (1 + 2)
    assert count_work(Collator(0)(PACKS), 0, (None, 2, 8)) == (7, (1 + 2 + 3) + (1 + 2) + (1 + 2), inside, 6 + 3 + 3)
